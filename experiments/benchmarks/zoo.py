"""Measures one network of each family against PyTorch, each in a process of its own (`zoo`).

Rows are written as they are measured, and the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.gpu import ROOT
from experiments.benchmarks.gpu_table import FAILED, OK, Measure, Origin, ResultTable, lock
from experiments.benchmarks.report import Bars, BenchmarkReport, check_writable, draw_bars
from experiments.benchmarks.zoo_networks import (
    NETWORKS,
    ZooNetwork,
    ZooSettings,
    end_with_parent,
    measure_network,
    measure_roofline,
)
from flax_cnns.analysis.device import describe_environment
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError, did_you_mean
from flax_cnns.runtime.preflight import find_versions

COLUMNS = (
    *("network", "batch", "trace", "lower", "XLA", "memory"),
    *("training", "ours / PyTorch", "inference", "ours / PyTorch"),
)
PART, MACHINE = "zoo", "machine"
WORST = 12
GUESS = 45.0  # seconds that a network takes on two CPU cores
CHILD = (sys.executable, "-m", "experiments.benchmarks.zoo")
LIMIT = 900.0  # seconds after which a network has failed


def add_zoo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", default="", help="such as resnet,vit; if not given, all")
    parser.add_argument("--rounds", type=parse_positive_int, default=5, help="number of rounds")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="time for this command; 0: as long as it takes"
    )
    parser.add_argument("--retry", action="store_true", help="measure what failed again")


def measure_zoo(args: argparse.Namespace, report: BenchmarkReport) -> int:
    """Measures the training and inference step, the first step and the memory of one network of
    each family in float32, and PyTorch's steps where torchvision or timm has the network.

    The CSV file given by --out has a row for each number; the same command measures what is not in
    it yet. Exit codes: 0, all is measured; 1, a network failed; 75, --minutes were over.
    """
    began = time.time()
    families = _select_families(args.families)
    path = Path(args.out or f"runs/benchmarks/{PART}.csv")
    if path.suffix != ".csv":
        raise UserError(f"--out: expected the name of a .csv file, got {args.out!r}")
    check_writable(path)
    running = path.with_name(f"{path.name}.running")
    lock(running)
    settings = ZooSettings(args.rounds, warmup=1, at_least=0.2)
    table = ResultTable(path, describe_origin(settings))
    if args.retry:
        table.forget(PART, (FAILED,))
    table.drop_changed(PART, {name: NETWORKS[name].describe() for name in families})
    left = [name for name in (MACHINE, *families) if not table.is_done(PART, name)]
    _print_forecast(left, table)
    for i, name in enumerate(left):
        if args.minutes and time.time() > began + 60 * args.minutes:
            print(f"--minutes={args.minutes:g} are over; {len(left) - i} networks are left")
            break
        print(f"{i + 1} of {len(left)}: {name}", flush=True)
        _measure_in_process(name, settings, table)
    running.unlink()
    add_rows(table, families, report)
    failed = [row["case"] for row in table.rows if row["status"] == FAILED]
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}; --retry measures them again")
    if any(not table.is_done(PART, name) for name in families):
        return EXIT_PREEMPTED
    return EXIT_FAULT if failed else 0


def describe_origin(settings: ZooSettings) -> Origin:
    """Returns what all rows of a table have in common."""
    environment = describe_environment()
    versions = environment["versions"]
    names = ("python", "jax", "jaxlib", "flax", "optax", "torch")
    code = find_versions()["flax_cnns (code)"]
    found = {name: versions[name] or "" for name in names}
    return Origin(settings=f"{settings}, code {code}", device=environment["device_kind"], **found)


def _select_families(text: str) -> list[str]:
    if not text:
        return list(NETWORKS)
    families = text.split(",")
    for family in families:
        if family not in NETWORKS:
            raise UserError(f"--families: unknown {family!r}{did_you_mean(family, NETWORKS)}")
    return families


def _print_forecast(left: Sequence[str], table: ResultTable) -> None:
    times = [float(row["value"]) for row in table.rows if row["measure"] == "seconds"]
    each = sum(times) / len(times) if times else GUESS
    source = "by the networks so far" if times else "a guess for two CPU cores"
    print(f"{len(left)} left, about {each * len(left) / 60:.0f} minutes, {source}", flush=True)


def _measure_in_process(name: str, settings: ZooSettings, table: ResultTable) -> None:
    """Measures a network, or the machine, in a process; adds its rows to the table."""
    began = time.time()
    job = {"name": name, "settings": settings._asdict()}
    if name != MACHINE:
        job["network"] = NETWORKS[name]._asdict()
    environment = {**os.environ, "JAX_PLATFORMS": jax.devices()[0].platform}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        child = subprocess.Popen(CHILD, cwd=ROOT, env=environment, stderr=errors, **pipes)
        assert child.stdin is not None  # it is a pipe
        assert child.stdout is not None
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        try:
            child.wait(LIMIT)
        except subprocess.TimeoutExpired:
            note = f"took {LIMIT:.0f} s"
            table.add(PART, name, [], seconds=LIMIT, status=FAILED, note=note)
            return
        finally:
            child.kill()
        lines, seconds = child.stdout.read().splitlines(), time.time() - began
        errors.seek(0)
        said = errors.read()
    if child.returncode:
        print(said, end="", file=sys.stderr)
        note = f"exit code {child.returncode}: {(said.splitlines() or [''])[-1]}"
        table.add(PART, name, [], seconds=seconds, status=FAILED, note=note)
        print(f"{name}: {note}", flush=True)
        return
    measures = [Measure(*each) for each in json.loads(lines[-1])]
    note = "" if name == MACHINE else NETWORKS[name].describe()
    table.add(PART, name, measures, seconds=seconds, note=note)


def run_child() -> None:
    """Measures what standard input says, and writes the measures as the last line of output."""
    job = json.loads(sys.stdin.readline())
    end_with_parent()
    if job["name"] == MACHINE:
        measures = measure_roofline()
    else:
        measures = measure_network(ZooNetwork(**job["network"]), ZooSettings(**job["settings"]))
    print(json.dumps(measures), flush=True)


def add_rows(table: ResultTable, families: Sequence[str], report: BenchmarkReport) -> None:
    """Adds a row for each measured family to the report, and names the slowest against PyTorch."""
    ratios: dict[str, float] = {}
    for family in families:
        found = {
            row["measure"]: row
            for row in table.rows
            if row["case"] == family and row["status"] == OK
        }
        if not found:
            continue
        network = NETWORKS[family]
        size = network.size or ""
        ratio = found.get("training, ours / PyTorch")
        if ratio is not None:
            ratios[network.name] = float(ratio["value"])
        cells = (
            network.name,
            f"{network.batch} x {size}" if size else str(network.batch),
            *(f"{float(found[name]['value']):.1f} s" for name in ("tracing", "lowering", "XLA")),
            f"{float(found['memory of the training step']['value']) / 1e9:.2f} GB",
            *_describe(found, "training"),
            *_describe(found, "inference"),
        )
        report.add({"family": family, "model": network.name}, cells)
    worst = sorted(ratios, key=lambda name: -ratios[name])[:WORST]
    if worst:
        shown = ", ".join(f"{name} {ratios[name]:.2f}" for name in worst)
        report.print_line(f"slowest training steps, ours / PyTorch: {shown}")
        bars = Bars(
            list(ratios), {"": [*ratios.values()]}, "training step, ours / PyTorch", reference=1
        )
        try:
            draw_bars(bars, report.title, table.path.with_suffix(".png"))
        except ModuleNotFoundError as error:
            report.print_line(f"no chart: {error.name} is not installed")


def _describe(found: Mapping[str, Any], kind: str) -> tuple[str, str]:
    ratio = found.get(f"{kind}, ours / PyTorch")
    seconds = float(found[f"{kind}, ours"]["value"])
    if ratio is None:
        return f"{1000 * seconds:.1f} ms", ""
    low, high = float(ratio["low"]), float(ratio["high"])
    return f"{1000 * seconds:.1f} ms", f"{float(ratio['value']):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    run_child()
