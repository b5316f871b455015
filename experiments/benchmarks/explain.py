"""Times saliency methods against the gradients that they are made of (`explain`)."""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax

from experiments.benchmarks.flags import parse_dtype, parse_positive_int
from experiments.benchmarks.report import Bars, BenchmarkReport, format_milliseconds
from experiments.benchmarks.training import make_network
from flax_cnns.analysis.explain import cams, gradients, targets
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.models.registry import init_variables

COLUMNS = ("method", "images", "time", "compared with", "its time", "ratio")


def add_explain_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", help="name of a network")
    parser.add_argument(
        "--batch", type=parse_positive_int, default=64, help="images of Grad-CAM and its gradient"
    )
    parser.add_argument(
        "--integrated-batch",
        type=parse_positive_int,
        default=8,
        help="images of integrated gradients and its gradients",
    )
    parser.add_argument(
        "--steps", type=parse_positive_int, default=50, help="steps of integrated gradients"
    )
    parser.add_argument(
        "--size", type=int, default=64, help="image height and width; 0: the network's"
    )
    parser.add_argument("--dtype", type=parse_dtype, default="float32", help="float32 or bfloat16")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of this process, for a machine that is busy with other work",
    )


def measure_explain(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times Grad-CAM against a gradient with respect to the images, and integrated gradients
    against as many gradients as it has steps.

    All methods explain given classes, so that no prediction is part of the time.
    """
    model = make_network(args.model, args)
    variables = init_variables(model, jax.random.key(0))
    shape = model.input_size

    def make_arguments(batch: int) -> tuple:
        images = jax.random.normal(jax.random.key(1), (batch, *shape))
        goal = targets.make_target([0] * batch, model, variables, images)
        return model, variables, images, goal

    def take_gradients() -> Any:
        return [gradients.gradient(*few) for _ in range(args.steps)]

    many, few = make_arguments(args.batch), make_arguments(args.integrated_batch)
    pairs = [
        (
            ("grad_cam", lambda: cams.grad_cam(*many)),
            ("a gradient", lambda: gradients.gradient(*many)),
            args.batch,
        ),
        (
            (
                f"integrated_gradients, {args.steps} steps",
                lambda: gradients.integrated_gradients(*few, steps=args.steps),
            ),
            (f"{args.steps} gradients", take_gradients),
            args.integrated_batch,
        ),
    ]
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least, clock=clock)
    for (name, method), (other, gradient), images in pairs:
        report.print_line(f"{name}: compiling")
        times = time_candidates({name: method, other: gradient}, **timing)
        ratio = times.ratio(name, other)
        row = {
            "model": args.model,
            "method": name,
            "images": images,
            "compared_with": other,
            "seconds": times.median(name),
            "baseline_seconds": times.median(other),
            "ratio": ratio._asdict(),
            "rounds": times.as_dict(),
        }
        cells = (
            name,
            str(images),
            format_milliseconds(times.median(name)),
            other,
            format_milliseconds(times.median(other)),
            str(ratio),
        )
        report.add(row, cells)
    report.bars = Bars(
        [f"{row['method']} / {row['compared_with']}" for row in report.rows],
        {"time": [row["ratio"]["median"] for row in report.rows]},
        f"{args.model}: time relative to the gradients",
    )
