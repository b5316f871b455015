"""Times the evaluation of corrupted images against that of clean images (`corruptions`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.report import Bars, BenchmarkReport, format_milliseconds
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.train import parallel

COLUMNS = ("corruption", "first call", "corrupted", "clean", "corrupted / clean")


def add_corruption_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="cifar_resnet20", help="name of a network")
    parser.add_argument("--images", type=parse_positive_int, default=1000, help="number of images")
    parser.add_argument("--batch", type=parse_positive_int, default=250, help="images at once")
    parser.add_argument(
        "--corruptions", default="all", help="names or groups of corruptions, separated by commas"
    )
    parser.add_argument(
        "--severities", default="1,2,3,4,5", help="severities of a round, separated by commas"
    )


def measure_corruptions(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times the evaluation of each corruption at some severities against as many evaluations of
    clean images: CPU time of this process.

    All severities of a corruption are one compiled program. "First call" is the time of a
    corruption alone, the first time, which is mostly compilation; the other columns are without
    it. Images are noise. The last row is the sum.
    """
    # Imported late: they need packages that a GPU machine may lack.
    from flax_cnns.evaluation.corruptions import table
    from flax_cnns.evaluation.corruptions.steps import make_corrupted_step
    from flax_cnns.evaluation.predictions import make_predict_step, predict_batches

    try:
        severities = [int(severity) for severity in args.severities.split(",")]
    except ValueError:
        raise UserError(f"--severities: expected numbers, got {args.severities!r}") from None
    model = create_model(args.model)
    variables = init_variables(model, jax.random.key(0))
    images = np.random.default_rng(0).integers(
        256, size=(args.images, *model.input_size), dtype=np.uint8
    )
    parts = np.array_split(np.arange(args.images), max(1, round(args.images / args.batch)))
    batches = [{"image": images[part], "label": np.zeros(len(part), np.int32)} for part in parts]
    mesh = parallel.make_mesh()
    clean = make_predict_step(
        model.apply, normalize=lambda x: x.astype(np.float32) / 255, transform=None, mesh=mesh
    )

    def evaluate(steps: list[Any]) -> Callable[[], Any]:
        return lambda: [
            predict_batches(model, variables, batches, step=step, mesh=mesh).logits
            for step in steps
        ]

    timing = dict(
        rounds=args.rounds, warmup=args.warmup, at_least=args.at_least, clock=time.process_time
    )
    sums = np.zeros(2)
    for corruption in table.select_corruptions(args.corruptions.split(",")):
        constants = table.prepare_constants(corruption, images.shape[1:])
        began = time.process_time()
        chosen = table.pick_severity(constants, severities[0])
        jax.block_until_ready(
            table.make_corrupt(corruption.name)(images[parts[0]], np.int32(parts[0]), chosen)
        )
        first = time.process_time() - began
        at = make_corrupted_step(clean, corruption, mesh)
        steps = [at(table.pick_severity(constants, severity), 0) for severity in severities]
        candidates = {"corrupted": evaluate(steps), "clean": evaluate([clean] * len(severities))}
        times = time_candidates(candidates, **timing)
        medians = np.array([times.median("corrupted"), times.median("clean")])
        sums += medians
        ratio = times.ratio("corrupted", "clean")
        row = {
            "corruption": corruption.name,
            "first_call_seconds": first,
            "seconds": medians[0],
            "baseline_seconds": medians[1],
            "ratio": ratio._asdict(),
            "rounds": times.as_dict(),
        }
        shown = [format_milliseconds(seconds) for seconds in (first, *medians)]
        report.add(row, (corruption.name, *shown, str(ratio)))
    total = {
        "corruption": "all",
        "first_call_seconds": sum(row["first_call_seconds"] for row in report.rows),
        "seconds": sums[0],
        "baseline_seconds": sums[1],
        "ratio": {"median": sums[0] / sums[1]},
    }
    shown = [format_milliseconds(each) for each in (total["first_call_seconds"], *sums)]
    report.add(total, ("all", *shown, f"{sums[0] / sums[1]:.2f}"))
    report.bars = Bars(
        [row["corruption"] for row in report.rows],
        {"CPU time": [row["ratio"]["median"] for row in report.rows]},
        f"{args.model}: corrupted images relative to clean ones",
    )
