"""The parts of `gpu` and their cases, and how the cases of a part run in one process."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn

from experiments.benchmarks import convolutions, gpu_steps, savings, torch_side
from experiments.benchmarks.gpu_steps import GpuSettings, Skipped, scale
from experiments.benchmarks.gpu_table import FAILED, SKIPPED, Measure, ResultTable
from experiments.benchmarks.report import BenchmarkReport
from experiments.benchmarks.shapes import SHAPES, ConvShape
from flax_cnns import layers
from flax_cnns.analysis.timing import Spread, time_candidates
from flax_cnns.errors import UserError

Cases = Mapping[str, Callable[[], list[Measure]]]


class Part(NamedTuple):
    """A part of the benchmark."""

    title: str
    make_cases: Callable[[GpuSettings, ResultTable], Cases]
    guess: float  # seconds for a case on a GPU; nobody has measured it
    alone: bool = False  # each case in a process of its own


DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"  # what train.deterministic sets
# Depthwise and grouped convolutions, with more images than on a CPU.
CONVOLUTIONS = (
    *("depthwise", "depthwise-112-down", "depthwise5-28", "depthwise-14", "depthwise7-14"),
    *("resnext", "resnext-96-1", "groups2-alexnet"),
)
IMAGES = 128


def _make_resnet50_cases(settings: GpuSettings, table: ResultTable) -> Cases:
    return {
        "ours, plain flax": partial(gpu_steps.measure_against_plain_flax, settings),
        "ours, torch.compile": partial(gpu_steps.measure_against_torch, settings),
    }


def _make_memory_cases(settings: GpuSettings, table: ResultTable) -> Cases:
    return {
        "resnet50": partial(gpu_steps.measure_plan, settings),
        "recipe": partial(gpu_steps.measure_recipe, settings),
    }


def _make_profile_cases(settings: GpuSettings, table: ResultTable) -> Cases:
    folder = table.path.parent / f"{table.path.stem}-files"
    return {"resnet50": partial(gpu_steps.measure_profile, settings, folder)}


def _make_convolution_cases(settings: GpuSettings, table: ResultTable) -> Cases:
    shapes = {shape.name: shape._replace(n=IMAGES) for shape in SHAPES}
    chosen = [shapes[name] for name in CONVOLUTIONS]
    if settings.smoke:
        small = dict(n=2, size=7, inputs=8, outputs=8)
        chosen = [shapes["depthwise"]._replace(groups=8, **small)]
        chosen += [shapes["resnext"]._replace(groups=2, **small)]
    return {
        f"{shape.name}: {shape}": partial(_measure_convolution, shape, settings) for shape in chosen
    }


def _measure_convolution(shape: ConvShape, settings: GpuSettings) -> list[Measure]:
    """Times a convolution with its gradients: ours, Flax's and PyTorch's, in turn."""
    make = partial(
        convolutions.make_jax_convolution, shape=shape, dtype=gpu_steps.DTYPE, passes="gradient"
    )
    candidates = {"ours": make(layers.Conv), "nn.Conv": make(nn.Conv)}
    note = "forward and backward"
    torch = torch_side.find_torch()
    try:
        if torch is not None:
            candidates["torch"] = torch_side.make_torch_convolution(
                torch, shape, gpu_steps.DTYPE, "gradient"
            )
    except UserError as error:
        note = f"{note}; {error}"
    times = time_candidates(candidates, **settings.timing)
    rows = [
        Measure(name, *scale(Spread.of(seconds), 1e3, "ms"), note=note)
        for name, seconds in times.seconds.items()
    ]
    for name in list(candidates)[1:]:
        rows.append(Measure(f"ours / {name}", *scale(times.ratio("ours", name), 1), note=note))
    return rows


def _make_drop_path_cases(settings: GpuSettings, table: ResultTable) -> Cases:
    measure = partial(_measure_drop_path, settings)
    if settings.smoke:
        small = dict(depths=(2,), widths=(4,))
        return {"cifar_resnet20": partial(measure, "cifar_resnet20", 8, scan=False, **small)}
    return {
        "resnet50": partial(measure, "resnet50", settings.size, scan=False),
        "cifar_resnet110": partial(measure, "cifar_resnet110", 32, scan=True),
    }


def _measure_drop_path(
    settings: GpuSettings, name: str, size: int, *, scan: bool, **fields: Any
) -> list[Measure]:
    """Runs `benchmark drop-path` at rate 0.5."""
    report = BenchmarkReport("", savings.DROP_COLUMNS, None)
    args = argparse.Namespace(model=name, rates=[0.5], batch=settings.batch, size=size, scan=scan)
    args.dtype, args.steps = gpu_steps.DTYPE, 2 if settings.smoke else 10
    vars(args).update(settings.timing)
    savings.measure_drop_path(args, report, **fields)
    rows = []
    for row in report.rows:
        label = f"rate {row['drop_path']:g}, {row['mode']}"
        note = f"{row['computed']:.0%} of the branches computed"
        rows.append(Measure(label, float(f"{1e3 * row['seconds']:.6g}"), "ms", note=note))
        if row["drop_path"]:
            ratio = Spread(**row["ratio"])
            rows.append(Measure(f"{label} / rate 0", *scale(ratio, 1), note=note))
    return rows


def _make_deterministic_cases(settings: GpuSettings, table: ResultTable) -> Cases:
    cases = {
        name: partial(gpu_steps.measure_digest, settings)
        for name in (("off 1", "on 1") if settings.smoke else ("off 1", "on 1", "off 2", "on 2"))
    }
    return {**cases, "on / off": partial(_compare_deterministic, table, list(cases))}


def _compare_deterministic(table: ResultTable, names: list[str]) -> list[Measure]:
    """Compares the processes with and without the flag."""
    part, digest = "deterministic", f"weights after {gpu_steps.STEPS} steps"
    steps = {name: table.find(part, name, "step") for name in names}
    missing = [name for name, value in steps.items() if value is None]
    if missing:
        raise Skipped(f"nothing was measured in {', '.join(missing)}")
    pairs = zip(names[::2], names[1::2])
    ratios = [float(steps[on] or "nan") / float(steps[off] or "nan") for off, on in pairs]
    rows = [Measure("on / off", *scale(Spread.of(ratios), 1), note="time of a step")]
    for kind in ("off", "on"):
        found = [table.find(part, name, digest) for name in names if name.startswith(kind)]
        if len(found) > 1:
            same = "yes" if len(set(found)) == 1 else "no"
            rows.append(Measure(f"{kind}: the same bits in both processes", same))
    return rows


def find_xla_flags(part: str, case: str) -> str:
    """Returns the flags that the process of a case adds to XLA_FLAGS."""
    return DETERMINISTIC_FLAG if part == "deterministic" and case.startswith("on ") else ""


def _make_family_cases(settings: GpuSettings, table: ResultTable) -> Cases:
    names: Iterable[str] = gpu_steps.SMOKE_NETWORKS if settings.smoke else gpu_steps.NETWORKS
    return {name: partial(gpu_steps.measure_network, name, settings) for name in names}


# The most valuable ones first.
PARTS = {
    "resnet50": Part("ResNet-50, training step: speed and MFU", _make_resnet50_cases, 150),
    "memory": Part("Peak memory and the bound of `fits`", _make_memory_cases, 75, alone=True),
    "profile": Part("Profile of ten steps of ResNet-50", _make_profile_cases, 75),
    "convolutions": Part("Depthwise and grouped convolutions", _make_convolution_cases, 15),
    "drop-path": Part("What stochastic depth saves", _make_drop_path_cases, 180),
    "deterministic": Part(
        "Deterministic kernels: cost, equal bits", _make_deterministic_cases, 50, alone=True
    ),
    "families": Part("A network of each family", _make_family_cases, 45),
}


def run_cases(
    part: str,
    names: Iterable[str],
    settings: GpuSettings,
    table: ResultTable,
    *,
    deadline: float = float("inf"),
    begin: Callable[[str], None] = lambda case: None,
) -> None:
    """Runs cases of a part that are not in the table, and adds their rows.

    A case that raises becomes a row, and the next case runs. No case begins after `deadline`, a
    `time.time()`. `begin` is called with the name of a case before it runs.
    """
    cases = PARTS[part].make_cases(settings, table)
    for name in names:
        if table.is_done(part, name) or time.time() > deadline:
            continue
        begin(name)
        began = time.perf_counter()
        measures: list[Measure] = []
        status: dict[str, str] = {}
        try:
            measures = cases[name]()
        except Skipped as error:
            status = dict(status=SKIPPED, note=str(error))
        except Exception as error:
            status = dict(status=FAILED, note=describe(error))
        table.add(part, name, measures, seconds=time.perf_counter() - began, **status)
        gc.collect()
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(describe_case(table, part, name), flush=True)


def describe(error: BaseException) -> str:
    """Returns an error in one line of at most 300 characters."""
    first = (str(error).strip().splitlines() or [""])[0]
    kind = type(error).__name__
    if "RESOURCE_EXHAUSTED" in first or kind in ("OutOfMemoryError", "MemoryError"):
        kind = "out of memory"
    return f"{kind}: {first}"[:300]


def describe_case(table: ResultTable, part: str, case: str) -> str:
    """Returns the rows of a case as lines."""
    lines = [f"{part}, {case}"]
    for row in table.rows:
        if (row["part"], row["case"]) == (part, case):
            spread = f" ({row['low']} to {row['high']})" if row["low"] else ""
            note = f"  {row['note']}" if row["note"] else ""
            status = "" if row["status"] == "ok" else f"{row['status']}: "
            number = f"{row['value']} {row['unit']}".strip()
            lines.append(f"  {row['measure']:34} {number}{spread}  {status}{note}".rstrip())
    return "\n".join(lines)
