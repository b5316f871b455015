"""Measures: steps, convolutions, the input pipeline, and all of it against stock Flax and PyTorch.

python -m experiments.benchmark step --model=resnet18,resnet50 --batch=32 --size=64
python -m experiments.benchmark conv --stage='resnext*'
python -m experiments.benchmark vs-torch --model=resnet18 --batch=32 --size=64
python -m experiments.benchmark pipeline --config=configs/digits_lenet5.py
python -m experiments.benchmark cond
python -m experiments.benchmark compile --model=cifar_resnet110
python -m experiments.benchmark frozen --model=resnet18 --size=64
python -m experiments.benchmark drop-path --model=cifar_resnet110
python -m experiments.benchmark learn --models=lenet5

What is compared runs in turn, A B A B; a time is the median of its rounds, a ratio the median of
the rounds' ratios with the smallest and the largest. Every command prints a table and writes JSON
with each round, the versions and the device, and a bar chart beside it. PyTorch is an extra:
pip install -e ".[bench]".
"""

from __future__ import annotations

import sys

if not __package__:  # run by its path: experiments/inspect.py must not hide Python's
    sys.path[0] = sys.path[0].removesuffix("experiments")

import argparse
import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

# Before JAX starts: it would take three quarters of a GPU's memory, and PyTorch needs some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from experiments.benchmarks import (
    convolutions,
    flags,
    inputs,
    learning,
    savings,
    torch_side,
    training,
)
from experiments.benchmarks.report import BenchmarkReport
from flax_cnns.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from flax_cnns.runtime import compilation_cache, launch, output


class Command(NamedTuple):
    title: str
    columns: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, BenchmarkReport], int | None]  # an exit code; None: 0
    at_least: float | None = 0.2  # seconds a round; None: nothing is timed in rounds


COMMANDS = {
    "step": Command(
        "Training and inference",
        training.STEP_COLUMNS,
        training.add_step_flags,
        training.measure_steps,
    ),
    "conv": Command(
        "Convolutions",
        convolutions.COLUMNS,
        convolutions.add_conv_flags,
        convolutions.measure_convolutions,
        0.05,
    ),
    "pipeline": Command(
        "Input pipeline", inputs.COLUMNS, inputs.add_pipeline_flags, inputs.measure_pipeline
    ),
    "vs-torch": Command(
        "Training step against PyTorch",
        torch_side.COLUMNS,
        torch_side.add_vs_torch_flags,
        torch_side.compare_with_torch,
    ),
    "cond": Command(
        "Skipped branches against masked ones",
        convolutions.COND_COLUMNS,
        convolutions.add_cond_flags,
        convolutions.measure_cond,
    ),
    "compile": Command(
        "Compilation of the training step",
        training.COMPILE_COLUMNS,
        training.add_compile_flags,
        training.measure_compilation,
    ),
    "frozen": Command(
        "Training step with the lower layers frozen",
        savings.FROZEN_COLUMNS,
        savings.add_frozen_flags,
        savings.measure_frozen,
    ),
    "drop-path": Command(
        "Training step against the rate of stochastic depth",
        savings.DROP_COLUMNS,
        savings.add_drop_path_flags,
        savings.measure_drop_path,
    ),
    "learn": Command(
        "Learning of the digits",
        learning.COLUMNS,
        learning.add_learn_flags,
        learning.measure_learning,
        None,
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def make_parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="experiments.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.title,
            description=command.run.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        if command.at_least is not None:
            sub.add_argument(
                "--rounds", type=flags.parse_positive_int, default=5, help="what the median is of"
            )
            sub.add_argument("--warmup", type=int, default=1, help="calls before the first round")
            sub.add_argument(
                "--at-least",
                type=float,
                default=command.at_least,
                help="seconds a round; what is shorter is called several times",
            )
        sub.add_argument("--device", default="", help="cpu, gpu or tpu; JAX's choice if not given")
        sub.add_argument(
            "--out",
            default=None,
            help="the JSON file, with the picture beside it; none: write nothing; "
            "runs/benchmarks/COMMAND-TIME.json if not given",
        )
        sub.add_argument(
            "--compilation-cache",
            default="",
            help="its folder, or off; step and compile, which time compilation, use none",
        )
        sub.add_argument(
            "--memory",
            choices=("keep", "system"),
            default="keep",
            help="keep: freed memory stays with the process, for all that is compared, as in a "
            "run; system: as the C library does by itself",
        )
    return top


@output.safe()
def main(argv: list[str]) -> int:
    """Exit codes: 0 done; 1 a network did not learn; 2 something that the user can mend, said in
    one line; 130 interrupted, with what was measured so far written."""
    try:
        args = make_parser().parse_args(argv)
        command = COMMANDS[args.command]
        if args.memory == "keep":
            launch.keep_memory()
        _choose_device(args.device)
        compilation_cache.enable(args.compilation_cache)
        report = BenchmarkReport(command.title, command.columns, _out(args), vars(args))
        try:
            code = command.run(args, report)
        except KeyboardInterrupt:
            report.close(interrupted=True)
            print("error: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            report.close(interrupted=True)
            if "RESOURCE_EXHAUSTED" in str(error):
                raise UserError("the device is out of memory; take a smaller --batch") from error
            raise
        report.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return code or 0


def _choose_device(platform: str) -> None:
    if platform == "cpu":  # the others are JAX's choice anyway, where they are there
        jax.config.update("jax_platforms", "cpu")
    kind = jax.devices()[0].platform
    if platform and kind != platform:
        raise UserError(f"--device={platform}: JAX finds no such device here; it has {kind}")


def _out(args: argparse.Namespace) -> Path | None:
    if args.out == "none":
        return None
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(args.out or f"runs/benchmarks/{args.command}-{now}.json")
    if path.suffix != ".json":
        raise UserError(f"--out names a .json file (the picture lies beside it); got {args.out!r}")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
