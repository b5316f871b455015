"""Times training steps with frozen layers (`frozen`) or skipped blocks (`drop-path`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.flags import parse_dtype, parse_positive_int
from experiments.benchmarks.report import (
    Bars,
    BenchmarkReport,
    format_gigabytes,
    format_milliseconds,
    format_number,
)
from experiments.benchmarks.training import Trainee, make_network
from flax_cnns.analysis import device
from flax_cnns.analysis.cost import cost
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.layers import drop_rates

# ---------------------------------------------------------------------------- frozen

FROZEN_COLUMNS = ("learns", "parameters", "step", "images/s", "against all", "memory")


def add_frozen_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", help="name of a network")
    parser.add_argument("--batch", type=parse_positive_int, default=32)
    parser.add_argument(
        "--size", type=int, default=0, help="image height and width; 0: the network's"
    )
    parser.add_argument("--dtype", type=parse_dtype, default="float32", help="float32 or bfloat16")
    parser.add_argument("--mode", default="shard_map", choices=("shard_map", "pmap"))


def measure_frozen(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times training steps that learn all layers, the last stage and the head, or the head alone.

    The other layers are frozen, with their BatchNorm.
    """
    model = make_network(args.model, args)
    # Top-level modules that have MACs, in the order in which images pass them.
    modules = dict.fromkeys(x.path.partition("/")[0] for x in cost(model).layers if x.macs)
    *_, last, head = (module for module in modules if not module.startswith("aux"))
    cases = {
        "all": (),
        f"{last}, {head}": ((rf"params/({last}|{head})/.*", True), (".*", False)),
        head: ((rf"params/{head}/.*", True), (".*", False)),
    }
    steps_of, memory, params = {}, {}, {}
    for name, rules in cases.items():
        report.print_line(f"{name}: compiling")
        trainee = Trainee(model, args.batch, mode=args.mode, trainable=rules)
        compiled, _, _ = trainee.compile()
        steps_of[name] = trainee.make_train_call(compiled)
        memory[name], params[name] = device.program_memory(compiled), trainee.trainable_params
    timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
    times = time_candidates(steps_of, **timing)
    for name, timed in times.as_dict().items():
        seconds, ratio = timed["median"], times.ratio(name, "all")
        row = {
            "model": args.model,
            "learns": name,
            "trainable_params": params[name],
            "seconds": seconds,
            "images_per_second": args.batch / seconds,
            "ratio": ratio._asdict(),
            "program_memory": memory[name],
            "rounds": timed["rounds"],
        }
        cells = (
            name,
            f"{params[name]:,}",
            format_milliseconds(seconds),
            format_number(args.batch / seconds),
            str(ratio),
            format_gigabytes(memory[name]),
        )
        report.add(row, cells)
    report.bars = Bars(
        [row["learns"] for row in report.rows],
        {"step": [row["ratio"]["median"] for row in report.rows]},
        f"{args.model}: step time relative to a step that learns everything",
    )


# ---------------------------------------------------------------------------- drop-path

DROP_COLUMNS = ("drop_path", "mode", "branches computed", "step", "against 0")


def parse_rates(text: str) -> list[float]:
    """ "0.2,0.5" -> [0.2, 0.5]"""
    try:
        rates = [float(number) for number in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        message = f"expected rates above 0 and below 1, separated by commas, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return rates


def add_drop_path_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="cifar_resnet110", help="name of a residual network")
    parser.add_argument(
        "--rates", type=parse_rates, default="0.2,0.5,0.8", help="drop rates of the last block"
    )
    parser.add_argument("--batch", type=parse_positive_int, default=32)
    parser.add_argument(
        "--size", type=int, default=0, help="image height and width; 0: the network's"
    )
    parser.add_argument("--dtype", type=parse_dtype, default="float32", help="float32 or bfloat16")
    parser.add_argument(
        "--steps", type=parse_positive_int, default=10, help="number of steps averaged for a time"
    )
    parser.add_argument(
        "--scan", action="store_true", help="run repeated blocks of a stage by nn.scan"
    )


def measure_drop_path(args: argparse.Namespace, report: BenchmarkReport, **fields: Any) -> None:
    """Times training steps at several rates of stochastic depth.

    With decisions per batch, dropped branches are not computed. For comparison, one case decides
    per image, at the middle rate, and computes all branches. Every step drops other branches, so a
    time is the average over --steps steps. `fields` are those of the network.
    """
    fields |= {"scan": True} if args.scan else {}
    middle = args.rates[len(args.rates) // 2]
    cases = [("batch", 0.0), *(("batch", rate) for rate in args.rates), ("sample", middle)]
    runs = {}
    for mode, rate in cases:
        report.print_line(f"drop_path={rate} {mode}: compiling")
        model = make_network(args.model, args, drop_path=rate, drop_path_mode=mode, **fields)
        train = Trainee(model, args.batch).make_train_call()

        def take_steps(train: Callable = train) -> Any:
            for _ in range(args.steps):
                result = train()
            return result

        runs[mode, rate] = take_steps
    timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
    times = time_candidates({f"{mode} {rate}": run for (mode, rate), run in runs.items()}, **timing)
    blocks = sum(model.depths)
    for mode, rate in cases:
        name, survival = f"{mode} {rate}", 1 - drop_rates(rate, blocks).mean()
        computed = float(survival) if mode == "batch" else 1.0
        seconds = times.median(name) / args.steps
        ratio = times.ratio(name, "batch 0.0")
        row = {
            "model": args.model,
            "drop_path": rate,
            "mode": mode,
            "computed": computed,
            "seconds": seconds,
            "ratio": ratio._asdict(),
        }
        cells = (f"{rate:g}", mode, f"{computed:.0%}", format_milliseconds(seconds), str(ratio))
        report.add(row, cells)
    report.bars = Bars(
        [f"{row['drop_path']:g}, {row['mode']}" for row in report.rows],
        {
            "step time relative to rate 0": [row["ratio"]["median"] for row in report.rows],
            "branches computed": [row["computed"] for row in report.rows],
        },
        f"{args.model}: ratios by the rate of the last block and the mode",
    )
