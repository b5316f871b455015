"""Forecasts how long the cells of an ablation will take, as numbers and as a table."""

from __future__ import annotations

import collections
import heapq
import pathlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from flax_cnns import config as configs
from flax_cnns.analysis.cost import cost
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import RunComponents
from flax_cnns.runs.plan import dry_run
from flax_cnns.studies import own_parts
from flax_cnns.studies.ablation.plan import SweepCell, SweepRow, is_final, read_recorded_rows
from flax_cnns.train import metrics
from flax_cnns.train.progress import format_duration


class RowCost(NamedTuple):
    """What a run of a row costs, and what it will see and log."""

    params: int
    macs: int  # of one image
    images_seen: int  # training images, each counted as often as it is seen
    data: fingerprints.DataSnapshot = fingerprints.DataSnapshot({})  # the data as they are now
    metrics: tuple[str, ...] = ()  # the test metrics that the run will log

    @property
    def total_macs(self) -> float:
        """Multiply-adds of one forward pass over all images seen."""
        return float(self.macs) * self.images_seen


def measure_rows(cells: Sequence[SweepCell]) -> dict[str, RowCost]:
    """Returns the cost of each row. Computes shapes only, and prints what the data sets hold.

    Raises UserError for everything that a run would refuse before its first step, see `dry_run`.
    """
    waiting = {cell.row.name for cell in cells if not is_final(cell.read_status()["status"])}
    costs: dict[str, RowCost] = {}
    sources: dict[Any, Any] = {}
    printed: set[str] = set()
    recorded = read_recorded_rows(cells[0].folder.parent if cells else None)
    for row in {cell.row.name: cell.row for cell in cells}.values():
        try:
            begun = recorded.get(row.name) == row.overrides
            needed = sources if row.name in waiting else None
            components, steps = dry_run(row.config, needed, begun=begun)
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from None
        for line in components.dataset.describe():
            if line not in printed:
                print(line)
                printed.add(line)
        network = cost(components.model, (1, *components.dataset.image_shape), train=False)
        costs[row.name] = RowCost(
            params=network.params,
            macs=network.macs,
            images_seen=steps * row.config.data.batch_size,
            data=components.dataset.snapshot,
            metrics=tuple(_list_test_metrics(components)),
        )
    return costs


def _list_test_metrics(components: RunComponents) -> list[str]:
    """Returns the metrics that the run's test will log; [] if there is no test split."""
    if "test" not in components.dataset.splits:
        return []
    own = components.own_parts.metrics
    return metrics.list_names(components.num_classes, task=components.dataset.task, own_metrics=own)


def check_metric(metric: str, costs: Mapping[str, RowCost]) -> str:
    """Returns the metric's name without "test/".

    Raises UserError if the test of a row will not log it.
    """
    name = metric.removeprefix("test/")
    for row, row_cost in costs.items():
        if name not in row_cost.metrics:
            near = did_you_mean(name, row_cost.metrics) or "; its data have no test split"
            raise UserError(f"--metric: the test of row {row} logs no {name!r}{near}")
    return name


def estimate_seconds(costs: Mapping[str, RowCost], cells: Iterable[SweepCell]) -> dict[str, float]:
    """Returns the expected seconds of a cell of each row; {} if no cell is complete.

    A row's complete cells give its time. A row without complete cells is estimated from all rows'
    complete cells in proportion to `RowCost.total_macs`.
    """
    seconds = collections.defaultdict(list)
    for cell in cells:
        known = cell.read_status()
        if known["status"] == "complete" and known["seconds"] and cell.row.name in costs:
            seconds[cell.row.name].append(known["seconds"])
    if not seconds:
        return {}
    macs = sum(len(times) * costs[name].total_macs for name, times in seconds.items())
    seconds_per_mac = sum(map(sum, seconds.values())) / macs
    return {
        name: float(np.mean(seconds[name]))
        if name in seconds
        else seconds_per_mac * row_cost.total_macs
        for name, row_cost in costs.items()
    }


TIMING_STEPS = 20


def time_steps(row: SweepRow, slot: child.DeviceSlot) -> tuple[float, float]:
    """Times a run of `TIMING_STEPS` steps.

    Returns (seconds per training image, seconds of everything else).
    """
    config = ConfigDict(row.config.to_dict())
    config.schedule.update(dict(name="constant", warmup="0 steps"))
    config.train.update(
        dict(duration=f"{TIMING_STEPS} steps", eval_every="0 steps", early_stopping=0)
    )
    config.checkpoint.every = "0 steps"
    names, config.train.callbacks = own_parts.find_names(config), ()  # callbacks may write files
    own_parts.remove_fields(config, names - own_parts.find_names(config))
    config = configs.reset_inert_fields(config)
    with tempfile.TemporaryDirectory() as folder:
        workdir, log = pathlib.Path(folder) / "run", pathlib.Path(folder) / "log.txt"
        start_time = time.perf_counter()
        out = child.lock_log(log)
        assert out is not None  # the folder is new
        with out:
            process = child.start(config, workdir, out, slot)
        try:
            code = process.wait()
        except BaseException:  # the child does not get Ctrl-C, because it has its own session
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start_time
        if code:
            raise UserError(f"row {row.name}: {child.read_outcome(code, log).error}")
        per_image = 1 / workdirs.read_json(workdir / "summary.json")["images_per_second"]
    return per_image, max(0.0, seconds - TIMING_STEPS * config.data.batch_size * per_image)


def forecast_seconds(
    cells: Sequence[SweepCell], costs: Mapping[str, RowCost], slot: child.DeviceSlot
) -> tuple[dict[str, float], str]:
    """Returns (seconds of a cell of each row, the basis of this estimate in words).

    If no cell is complete, times a few steps of the first row.
    """
    if seconds := estimate_seconds(costs, cells):
        return seconds, "from complete cells; for a row without complete cells, by MACs and images"
    row = cells[0].row
    per_image, rest = time_steps(row, slot)
    per_mac = per_image / max(costs[row.name].macs, 1)
    seconds = {name: rest + per_mac * row_cost.total_macs for name, row_cost in costs.items()}
    basis = f"from {TIMING_STEPS} steps of {row.name}, by MACs and images, without validations"
    return seconds, basis


def make_plan_table(
    cells: Sequence[SweepCell], costs: Mapping[str, RowCost], seconds: Mapping[str, float]
) -> Table:
    """Makes a table of the rows: what they cost and how many of their cells are complete."""
    table = Table()
    columns = ("row", "parameters", "MACs", "images seen", "complete", "per cell", "left")
    for column in columns:
        table.add_column(column, justify="left" if column == "row" else "right")
    counts = count_cells(cells)
    for name, row_cost in costs.items():
        total, complete = counts[name, None], counts[name, "complete"]
        table.add_row(
            name,
            f"{row_cost.params:,}",
            f"{row_cost.macs / 1e6:.2f} M",
            f"{row_cost.images_seen:,}",
            f"{complete}/{total}",
            format_duration(seconds[name]),
            format_duration((total - complete) * seconds[name]),
        )
    return table


def compute_makespan(seconds: Iterable[float], jobs: int) -> float:
    """Returns the seconds until all cells are done, if `jobs` of them run at once, in order."""
    ends = [0.0] * jobs
    for cell_seconds in seconds:
        heapq.heapreplace(ends, ends[0] + cell_seconds)
    return max(ends)


def count_cells(cells: Iterable[SweepCell]) -> collections.Counter:
    """Counts the cells of each row, (name, None), and of each status, (name, status)."""
    counts: collections.Counter = collections.Counter()
    for cell in cells:
        counts[cell.row.name, None] += 1
        counts[cell.row.name, cell.read_status()["status"]] += 1
    return counts
