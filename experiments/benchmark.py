"""Benchmarks of steps, convolutions and the input pipeline; some against stock Flax and PyTorch.

python -m experiments.benchmark step --model=resnet18,resnet50 --batch=32 --size=64
python -m experiments.benchmark conv --stage='resnext*'
python -m experiments.benchmark vs-torch --model=resnet18 --batch=32 --size=64
python -m experiments.benchmark pipeline --config=configs/digits_lenet5.py
python -m experiments.benchmark input --images=photos --images-per-second=3000
python -m experiments.benchmark cond
python -m experiments.benchmark compile --model=cifar_resnet110
python -m experiments.benchmark frozen --model=resnet18 --size=64
python -m experiments.benchmark drop-path --model=cifar_resnet110
python -m experiments.benchmark explain --model=resnet18
python -m experiments.benchmark corruptions --model=cifar_resnet20
python -m experiments.benchmark crops --model=cifar_resnet20
python -m experiments.benchmark calls --model=lenet5 --steps=10
python -m experiments.benchmark seeds --model=lenet5 --seeds=8
python -m experiments.benchmark learn --models=lenet5
python -m experiments.benchmark compiled --topology=h100 --device=cpu
python -m experiments.benchmark zoo --out=zoo.csv
python -m experiments.benchmark fast --data=FOLDER --out=fast.csv
python -m experiments.benchmark gpu --out=gpu.csv

Candidates run in turn, A B A B. A time is the median over the rounds. A ratio is the median of the
rounds' ratios, shown with the smallest and the largest. Every command prints a table and writes two
files: a JSON file with each round, the versions and the device, and a bar chart next to it. PyTorch
is optional: pip install -e ".[bench]". `zoo`, `fast` and `gpu` measure many things in processes
of their own, and write one CSV file, with which a killed command goes on.
"""

from __future__ import annotations

import sys

if not __package__:  # run by path: experiments/inspect.py must not shadow Python's inspect
    sys.path[0] = sys.path[0].removesuffix("experiments")

import argparse
import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

# Set before JAX starts: JAX would take three quarters of a GPU's memory, and PyTorch needs some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from experiments.benchmarks import (
    calls,
    compiled,
    convolutions,
    corruptions,
    crops,
    explain,
    fast,
    flags,
    gpu,
    input_stages,
    inputs,
    learning,
    savings,
    seeds,
    torch_side,
    training,
    zoo,
)
from experiments.benchmarks.report import BenchmarkReport
from flax_cnns.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from flax_cnns.runtime import compilation_cache, launch, output


class Command(NamedTuple):
    """A command of the benchmark."""

    title: str
    columns: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, BenchmarkReport], int | None]  # an exit code; None: 0
    at_least: float | None = 0.2  # seconds per round; None: no timing in rounds
    writes_json: bool = True  # otherwise, the command itself writes what --out names


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
    "input": Command(
        "Stages of the input pipeline on one core",
        input_stages.COLUMNS,
        input_stages.add_input_flags,
        input_stages.measure_input,
        None,
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
    "explain": Command(
        "Saliency against the gradients that it is made of",
        explain.COLUMNS,
        explain.add_explain_flags,
        explain.measure_explain,
    ),
    "corruptions": Command(
        "Corrupted images against clean ones",
        corruptions.COLUMNS,
        corruptions.add_corruption_flags,
        corruptions.measure_corruptions,
        0.0,
    ),
    "crops": Command(
        "Evaluation on crops", crops.COLUMNS, crops.add_crop_flags, crops.measure_crops, 0.0
    ),
    "calls": Command(
        "Several training steps in one call",
        calls.COLUMNS,
        calls.add_call_flags,
        calls.measure_calls,
    ),
    "seeds": Command(
        "Several seeds in one program", seeds.COLUMNS, seeds.add_seed_flags, seeds.measure_seeds
    ),
    "compiled": Command(
        "Compiled training step of ResNet-50 against plain Flax",
        compiled.COLUMNS,
        compiled.add_compiled_flags,
        compiled.compare_compiled,
        None,
    ),
    "learn": Command(
        "Learning of the digits",
        learning.COLUMNS,
        learning.add_learn_flags,
        learning.measure_learning,
        None,
    ),
    "zoo": Command(
        "One network of each family against PyTorch",
        zoo.COLUMNS,
        zoo.add_zoo_flags,
        zoo.measure_zoo,
        None,
        writes_json=False,
    ),
    "fast": Command(
        "Time to an accuracy against PyTorch",
        fast.COLUMNS,
        fast.add_fast_flags,
        fast.measure_fast,
        None,
        writes_json=False,
    ),
    "gpu": Command(
        "What to measure on a GPU", (), gpu.add_gpu_flags, gpu.measure_gpu, 0.5, writes_json=False
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands and their flags."""
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
                "--rounds", type=flags.parse_positive_int, default=5, help="number of rounds"
            )
            sub.add_argument("--warmup", type=int, default=1, help="calls before the first round")
            sub.add_argument(
                "--at-least",
                type=float,
                default=command.at_least,
                help="minimum seconds per round; a shorter call is repeated",
            )
        sub.add_argument("--device", default="", help="cpu, gpu or tpu; if not given, JAX's choice")
        sub.add_argument(
            "--out",
            default=None,
            help="the JSON file, with the chart next to it; none: write nothing; if not "
            "given, runs/benchmarks/COMMAND-TIME.json"
            if command.writes_json
            else f"the CSV file; if not given, runs/benchmarks/{name}.csv",
        )
        sub.add_argument(
            "--compilation-cache",
            default="",
            help="folder of the cache, or off; step and compile never use a cache",
        )
        sub.add_argument(
            "--memory",
            choices=("keep", "system"),
            default="keep",
            help="keep: the process keeps freed memory for all candidates, as in a run; system: "
            "the C library's default",
        )
    return top


@output.safe()
def main(argv: list[str]) -> int:
    """Runs a command and returns an exit code.

    0: success. 1: a network did not learn. 2: user error, explained in one line. 130: interrupted,
    after the results so far were written.
    """
    try:
        args = make_parser().parse_args(argv)
        command = COMMANDS[args.command]
        if args.memory == "keep":
            launch.keep_memory()
        _select_device(args.device)
        compilation_cache.enable(args.compilation_cache)
        out = _out(args) if command.writes_json else None
        report = BenchmarkReport(command.title, command.columns, out, vars(args))
        try:
            code = command.run(args, report)
        except KeyboardInterrupt:
            report.close(interrupted=True)
            print("error: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            report.close(interrupted=True)
            if "RESOURCE_EXHAUSTED" in str(error):
                raise UserError("the device is out of memory; choose a smaller --batch") from error
            raise
        report.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return code or 0


def _select_device(platform: str) -> None:
    if platform == "cpu":  # JAX prefers an accelerator by itself
        jax.config.update("jax_platforms", "cpu")
    kind = jax.devices()[0].platform
    if platform and kind != platform:
        raise UserError(f"--device={platform}: JAX finds no such device; it has {kind}")


def _out(args: argparse.Namespace) -> Path | None:
    if args.out == "none":
        return None
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(args.out or f"runs/benchmarks/{args.command}-{now}.json")
    if path.suffix != ".json":
        raise UserError(f"--out: expected the name of a .json file, got {args.out!r}")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
