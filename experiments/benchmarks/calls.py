"""Times several training steps in one call against single steps (`calls`)."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.report import (
    Bars,
    BenchmarkReport,
    format_milliseconds,
    format_number,
)
from flax_cnns import config as configs
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.train import loop, parallel
from flax_cnns.train.state import TrainState

COLUMNS = ("model", "steps per call", "step", "steps/s", "against single steps")


def add_call_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="lenet5,cifar_resnet20", help="networks, separated by commas"
    )
    parser.add_argument("--batch", type=parse_positive_int, default=64)
    parser.add_argument("--steps", type=parse_positive_int, default=10, help="steps per call")


def measure_calls(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times `--steps` training steps on the digits: one by one, and in one call.

    Both take their batches as a run does: single steps from the loader's thread, calls from images
    on the device.
    """
    for name in args.model.split(","):
        with contextlib.ExitStack() as stack:
            candidates = {}
            for steps in (1, args.steps):
                report.print_line(f"{name}, steps per call {steps}: compiling")
                candidates[str(steps)] = _make_candidate(name, args, steps, stack)
            timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
            times = time_candidates(candidates, **timing)
        for steps, timed in times.as_dict().items():
            seconds, ratio = timed["median"] / args.steps, times.ratio(steps, "1")
            row = {
                "model": name,
                "steps_per_call": int(steps),
                "seconds": seconds,
                "ratio": ratio._asdict(),
                "rounds": timed["rounds"],
            }
            cells = (name, steps, format_milliseconds(seconds), format_number(1 / seconds))
            report.add(row, (*cells, str(ratio)))
    calls = [row for row in report.rows if row["steps_per_call"] > 1]
    report.bars = Bars(
        [row["model"] for row in calls],
        {f"{args.steps} steps per call": [row["ratio"]["median"] for row in calls]},
        "step time relative to single steps",
        reference=1,
    )


def _make_candidate(
    name: str, args: argparse.Namespace, steps: int, stack: contextlib.ExitStack
) -> Callable[[], Any]:
    """Returns a function that takes `args.steps` training steps, `steps` of them in each call."""
    from flax_cnns.runs import build
    from flax_cnns.runs.plan import RunPlan

    never = {"every": "0 steps"}
    config = configs.complete(
        {
            "model": {"name": name},
            "data": {"name": "digits", "batch_size": args.batch},
            "train": {
                "steps_per_call": steps,
                "duration": "1000000 steps",
                "eval_every": "0 steps",
            },
            "log": never,
            "checkpoint": never,
        }
    )
    components = build.build_components(config)
    plan = RunPlan(components)
    variables = components.init_variables()
    optimizer = plan.make_optimizer(variables)
    state = TrainState.create(variables, optimizer.init(variables["params"]), ema=False)
    state = parallel.replicate(state, components.mesh)
    key = parallel.replicate(build.make_training_key(config), components.mesh)
    if steps == 1:
        step = build.make_train_step(components, optimizer, plan.steps_per_epoch)
        feed = build.train_batches(components)
    else:
        step = build.make_train_call(components, optimizer, plan.steps_per_epoch)
        feed = build.train_calls(components, 0, plan.total_steps)
    batches: Iterator[Any] = stack.enter_context(contextlib.closing(loop.prefetch(feed)))

    def take() -> Any:
        nonlocal state
        for _ in range(args.steps // steps):
            state, sums = step(state, next(batches), key)
        return sums

    return take
