"""What to measure once a GPU is at hand (`gpu`): each part in a process of its own, into one CSV.

A part that fails leaves a row, and the others are measured. Rows are written as they are measured,
and the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import gpu_parts
from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.gpu_parts import PARTS
from experiments.benchmarks.gpu_steps import GpuSettings
from experiments.benchmarks.gpu_table import FAILED, OK, SKIPPED, Origin, ResultTable, lock
from experiments.benchmarks.report import BenchmarkReport, check_writable
from flax_cnns.analysis.device import describe_environment
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError, did_you_mean

ROOT = Path(__file__).parents[2]
CHILD = (sys.executable, "-m", "experiments.benchmarks.gpu_child")
DEFAULT_OUT = "runs/benchmarks/gpu.csv"


def add_gpu_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what to measure, in this order, with commas"
    )
    parser.add_argument(
        "--cases", default="*", help="cases, with commas; * and ? are wildcards: vit*,resnet50"
    )
    parser.add_argument("--batch", type=parse_positive_int, default=256, help="images per step")
    parser.add_argument(
        "--size", type=parse_positive_int, default=224, help="of ResNet-50's images"
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="time for this command; 0: as long as it takes"
    )
    parser.add_argument(
        "--case-minutes", type=float, default=7.0, help="time after which a case has failed"
    )
    parser.add_argument(
        "--retry", action="store_true", help="measure what was skipped or failed again"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny networks and images, to try the command"
    )


def measure_gpu(args: argparse.Namespace, report: BenchmarkReport) -> int:
    """Measures ResNet-50 in bfloat16 against plain Flax and PyTorch, its memory and a profile;
    depthwise and grouped convolutions, stochastic depth, deterministic kernels, and a network of
    each family.

    The CSV file given by --out has a row for each number. The same command measures what is not
    in it yet. Exit codes: 0, all is measured or was skipped; 1, a case failed; 75, --minutes were
    over.
    """
    began = time.time()
    parts = _select_parts(args.parts)
    platform = jax.devices()[0].platform
    if platform == "cpu" and not args.smoke:
        raise UserError("JAX finds only a CPU, where this takes hours; add --smoke to try it")
    settings = make_settings(args)
    path = _find_path(args.out)
    running = path.with_name(f"{path.name}.running")  # the lock; its text is the case that runs
    lock(running)
    job = {
        "out": str(path),
        "running": str(running),
        "origin": describe_origin(settings)._asdict(),
        "settings": settings._asdict(),
        "keep_memory": args.memory == "keep",
        "cpu": platform == "cpu",
        "cache": args.compilation_cache,
        "deadline": began + 60 * args.minutes if args.minutes else float("inf"),
    }
    table = _open(job)
    if args.retry:
        for part in parts:
            table.forget(part, (SKIPPED, FAILED))
    print_forecast(parts, args.cases, settings, table)
    for part in parts:
        table = run_part(part, args.cases, job, case_seconds=60 * args.case_minutes)
    running.unlink()
    left = {part: find_left(part, args.cases, settings, table) for part in parts}
    failed = [
        f"{row['part']}, {row['case']}"
        for row in table.rows
        if row["status"] == FAILED and row["part"] in parts and row["measure"] == "seconds"
    ]
    print(f"{len(table.rows)} rows in {path}")
    if failed:
        print(f"failed: {'; '.join(failed)}; --retry measures them again")
    if count := sum(map(len, left.values())):
        print(f"--minutes={args.minutes:g} are over; {count} cases are left; run the same command")
        return EXIT_PREEMPTED
    return EXIT_FAULT if failed else 0


def make_settings(args: argparse.Namespace) -> GpuSettings:
    """Returns the flags' settings; --smoke has its own."""
    if args.smoke:
        return GpuSettings(batch=4, size=32, rounds=2, warmup=1, at_least=0.0, smoke=True)
    return GpuSettings(args.batch, args.size, args.rounds, args.warmup, args.at_least, smoke=False)


def describe_origin(settings: GpuSettings) -> Origin:
    """Returns what the rows of this process's table have in common."""
    environment = describe_environment()
    versions = environment["versions"]
    names = ("python", "jax", "jaxlib", "flax", "optax", "torch")
    found = {name: versions[name] or "" for name in names}
    return Origin(settings=str(settings), device=environment["device_kind"], **found)


def _find_path(out: str | None) -> Path:
    path = Path(out or DEFAULT_OUT)
    if path.suffix != ".csv":
        raise UserError(f"--out: expected the name of a .csv file, got {out!r}")
    check_writable(path)
    return path


def _select_parts(text: str) -> list[str]:
    parts = text.split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: unknown part {part!r}{did_you_mean(part, PARTS)}")
    return parts


def _open(job: Mapping[str, Any]) -> ResultTable:
    return ResultTable(Path(job["out"]), Origin(**job["origin"]))


def find_left(part: str, patterns: str, settings: GpuSettings, table: ResultTable) -> list[str]:
    """Returns the cases of a part that match a pattern and are not in the table."""
    return [
        name
        for name in PARTS[part].make_cases(settings, table)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split(","))
        and not table.is_done(part, name)
    ]


def print_forecast(
    parts: list[str], patterns: str, settings: GpuSettings, table: ResultTable
) -> None:
    """Prints how long each part may take: by its measured cases, otherwise by a guess."""
    total = 0.0
    for part in parts:
        left = find_left(part, patterns, settings, table)
        times = [
            float(row["value"])
            for row in table.rows
            if row["part"] == part and row["measure"] == "seconds" and row["status"] == OK
        ]
        each = statistics.mean(times) if times else PARTS[part].guess
        source = "by the cases so far" if times else "a guess for a GPU"
        total += each * len(left)
        about = f"about {each * len(left) / 60:.1f} minutes, {source}" if left else ""
        print(f"{part:14} {PARTS[part].title:42} {len(left):3} cases left  {about}".rstrip())
    print(f"{'together':14} {'':42} about {total / 60:.0f} minutes", flush=True)


def run_part(
    part: str, patterns: str, job: Mapping[str, Any], *, case_seconds: float
) -> ResultTable:
    """Runs the cases of a part that are left in processes of their own; returns the table.

    A case that ends its process, or takes longer than `case_seconds`, becomes a row; the next
    process runs the others.
    """
    settings = GpuSettings(**job["settings"])
    while True:
        table = _open(job)
        left = find_left(part, patterns, settings, table)
        if not left or time.time() > job["deadline"]:
            return table
        cases = left[:1] if PARTS[part].alone else left
        running = Path(job["running"])
        running.write_text("")
        problem, output = _run_child({**job, "part": part, "cases": cases}, case_seconds)
        if not problem:
            continue
        table, case = _open(job), running.read_text() or cases[0]
        if problem == TIME_OVER:
            return table  # no row: the case is measured the next time
        if not table.is_done(part, case):
            note = f"{problem}: {output}" if output else problem
            table.add(part, case, [], seconds=0.0, status=FAILED, note=note[:300])
            print(gpu_parts.describe_case(table, part, case), flush=True)


TIME_OVER = "--minutes are over"


def _run_child(job: Mapping[str, Any], case_seconds: float) -> tuple[str, str]:
    """Runs a process; returns (what went wrong, its last line of errors), "" for nothing."""
    flags = gpu_parts.find_xla_flags(job["part"], job["cases"][0])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        # One device, also where there are several.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    }
    errors = Path(job["running"]).with_suffix(".errors")
    with errors.open("wb") as file:
        process = subprocess.Popen(CHILD, env=environment, stdin=subprocess.PIPE, stderr=file)
        assert process.stdin is not None  # it is a pipe
        try:
            problem = _watch(process, job, case_seconds)
        finally:
            process.kill()
            process.wait()
    text = errors.read_text(errors="replace").strip()
    errors.unlink()
    return problem, text.splitlines()[-1] if text and problem else ""


def _watch(process: subprocess.Popen, job: Mapping[str, Any], case_seconds: float) -> str:
    """Waits until a process ends, or ends it; returns what went wrong."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    case, since = "", time.time()
    while process.poll() is None:
        time.sleep(0.2)
        if (current := Path(job["running"]).read_text()) != case:
            case, since = current, time.time()
        if time.time() > job["deadline"]:
            return TIME_OVER
        if time.time() - since > case_seconds:
            return f"the case took longer than {case_seconds:.0f} s"
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    return f"exit code {process.returncode}" if process.returncode else ""
