"""Time to an accuracy: a fast recipe on Fashion-MNIST by flax_cnns and by PyTorch (`fast`).

The two sides run in turns, one seed after another, each in a process of its own. The same command
goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.gpu import ROOT
from experiments.benchmarks.gpu_table import FAILED, OK, Measure, Origin, ResultTable, lock
from experiments.benchmarks.report import BenchmarkReport, check_writable
from experiments.benchmarks.zoo_networks import end_with_parent
from flax_cnns.analysis.device import describe_environment
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError
from flax_cnns.runtime.preflight import find_versions

PART, TARGETS = "fast", (90, 92, 93)  # percent of the test images
NAMES = ("flax_cnns", "PyTorch")
COLUMNS = (
    *("side", "seeds", "test accuracy", "compilation", "training"),
    *(f"to {target} %" for target in TARGETS),
)
CHILD = (sys.executable, "-m", "experiments.benchmarks.fast")
IMAGES, SPEEDS = 60_000, {"flax_cnns": 900, "PyTorch": 2000}  # images/s, a guess for two cores
LIMIT = 900.0  # seconds after which a run has failed


def add_fast_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="", help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--seeds", type=parse_positive_int, default=3)
    parser.add_argument("--epochs", type=parse_positive_int, default=4)
    parser.add_argument("--batch", type=parse_positive_int, default=250)
    parser.add_argument("--mock", type=int, default=0, help="random images instead of the data")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="time for this command; 0: as long as it takes"
    )


def measure_fast(args: argparse.Namespace, report: BenchmarkReport) -> int:
    """Trains configs/fashion_mnist_fast.py and the same recipe in PyTorch; tests after each epoch.

    Times are of training alone, without evaluations. Exit codes: 0, all is measured; 1, a run
    failed; 75, --minutes were over.
    """
    began = time.time()
    path = Path(args.out or f"runs/benchmarks/{PART}.csv")
    if path.suffix != ".csv":
        raise UserError(f"--out: expected the name of a .csv file, got {args.out!r}")
    check_writable(path)
    running = path.with_name(f"{path.name}.running")
    descriptor = lock(running)
    try:
        return measure_runs(args, report, path, began)
    finally:
        os.close(descriptor)
        running.unlink(missing_ok=True)


def measure_runs(
    args: argparse.Namespace, report: BenchmarkReport, path: Path, began: float
) -> int:
    """Trains what the table of `path` lacks; returns an exit code."""
    settings = f"epochs={args.epochs}, batch={args.batch}, mock={args.mock}"
    table = ResultTable(path, describe_origin(settings))
    cases = [(name, seed) for seed in range(args.seeds) for name in NAMES]
    left = [case for case in cases if not table.is_done(PART, name_case(*case))]
    print_forecast(left, args.epochs, table)
    for i, (name, seed) in enumerate(left):
        if args.minutes and time.time() > began + 60 * args.minutes:
            print(f"--minutes={args.minutes:g} are over; {len(left) - i} runs are left")
            break
        print(f"{i + 1} of {len(left)}: {name}, seed {seed}", flush=True)
        job = dict(side=name, seed=seed, data=args.data, epochs=args.epochs)
        run_in_process(job | dict(batch=args.batch, mock=args.mock), table)
    add_rows(table, report)
    if any(not table.is_done(PART, name_case(*case)) for case in cases):
        return EXIT_PREEMPTED
    return EXIT_FAULT if any(row["status"] == FAILED for row in table.rows) else 0


def name_case(name: str, seed: int) -> str:
    return f"{name} seed {seed}"


def describe_origin(settings: str) -> Origin:
    """Returns what all rows of the table have in common."""
    environment = describe_environment()
    names = ("python", "jax", "jaxlib", "flax", "optax", "torch")
    found = {name: environment["versions"][name] or "" for name in names}
    code = find_versions()["flax_cnns (code)"]
    return Origin(f"{settings}, code {code}", device=environment["device_kind"], **found)


def print_forecast(left: Sequence[tuple[str, int]], epochs: int, table: ResultTable) -> None:
    """Says how long the runs that are left take, by those of the table, else by a guess."""
    total = 0.0
    for name, _ in left:
        done = [
            float(row["value"])
            for row in table.rows
            if row["case"].startswith(f"{name} ") and row["measure"] == "seconds"
        ]
        total += (
            statistics.mean(done)
            if done
            else 20 + epochs * IMAGES / SPEEDS.get(name, min(SPEEDS.values()))
        )
    print(f"{len(left)} runs left, about {total / 60:.0f} minutes", flush=True)


def run_in_process(job: dict[str, Any], table: ResultTable) -> None:
    """Trains one side with one seed in a process; adds its rows to the table."""
    began, case = time.time(), name_case(job["side"], job["seed"])
    environment = {**os.environ, "JAX_PLATFORMS": jax.devices()[0].platform}
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen(CHILD, cwd=ROOT, env=environment, **pipes)
    assert child.stdin is not None  # it is a pipe
    assert child.stdout is not None
    child.stdin.write(json.dumps(job) + "\n")
    child.stdin.flush()
    try:
        child.wait(LIMIT)
    except subprocess.TimeoutExpired:
        table.add(PART, case, [], seconds=LIMIT, status=FAILED, note=f"took {LIMIT:.0f} s")
        return
    finally:
        child.kill()
    seconds = time.time() - began
    if child.returncode:
        note = f"exit code {child.returncode}"
        table.add(PART, case, [], seconds=seconds, status=FAILED, note=note)
        print(f"{case}: {note}", flush=True)
        return
    epochs = json.loads(child.stdout.read().splitlines()[-1])
    table.add(PART, case, list_measures(epochs), seconds=seconds)


def list_measures(epochs: Sequence[Sequence[float]]) -> list[Measure]:
    """Returns the rows of a run from (accuracy, training seconds, compilation) of its epochs."""
    compilation = epochs[0][2]
    found = [Measure("compilation", round(compilation, 2), "s")]
    for i, (accuracy, seconds, _) in enumerate(epochs, 1):
        found.append(Measure(f"accuracy after epoch {i}", round(100 * accuracy, 2), "%"))
        found.append(Measure(f"training until epoch {i}", round(seconds, 2), "s"))
    for target in TARGETS:
        reached = [s for accuracy, s, _ in epochs if round(100 * accuracy, 2) >= target]
        if reached:
            found.append(Measure(f"to {target} %", round(reached[0], 2), "s"))
            whole = round(reached[0] + compilation, 2)
            found.append(Measure(f"to {target} % with compilation", whole, "s"))
    return found


def add_rows(table: ResultTable, report: BenchmarkReport) -> None:
    """Adds a row for each side to the report: means over seeds, and ranges of times."""
    for name in NAMES:
        runs: dict[str, dict[str, float]] = {}
        for row in table.rows:
            if row["status"] == OK and row["case"].startswith(f"{name} "):
                runs.setdefault(row["case"], {})[row["measure"]] = float(row["value"])
        if not runs:
            continue
        first = next(iter(runs.values()))
        last = max(int(m.rpartition(" ")[2]) for m in first if "after epoch" in m)
        accuracies = [run[f"accuracy after epoch {last}"] for run in runs.values()]
        spread = f" (sd {statistics.stdev(accuracies):.2f})" if len(runs) > 1 else ""
        cells = [name, str(len(runs)), f"{statistics.mean(accuracies):.2f} %{spread}"]
        for measure in ("compilation", f"training until epoch {last}"):
            cells.append(f"{statistics.mean(run[measure] for run in runs.values()):.1f} s")
        for target in TARGETS:
            times = [run[f"to {target} %"] for run in runs.values() if f"to {target} %" in run]
            mean = f"{statistics.mean(times):.0f} s" if times else "not reached"
            cells.append(f"{mean}, {len(times)} of {len(runs)}" if times else mean)
        report.add({"side": name, "runs": runs}, tuple(cells))


def run_child() -> None:
    """Trains what standard input says; writes the epochs as the last line of output."""
    from configs import fashion_mnist_fast
    from experiments.benchmarks.fast_sides import SIDES

    job = json.loads(sys.stdin.readline())
    end_with_parent()
    config = fashion_mnist_fast.get_config()
    config.seed, config.data.dir, config.data.mock = job["seed"], job["data"], job["mock"]
    config.data.batch_size, config.train.duration = job["batch"], f"{job['epochs']} epochs"
    epochs = []
    for epoch in SIDES[job["side"]](config, job["epochs"]):
        print(f"accuracy {epoch.accuracy:.4f} after {epoch.seconds:.1f} s", file=sys.stderr)
        epochs.append(epoch)
    print(json.dumps(epochs), flush=True)


if __name__ == "__main__":
    run_child()
