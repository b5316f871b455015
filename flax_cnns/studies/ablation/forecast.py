"""How long the cells of an ablation will take, and the table that shows it."""

from __future__ import annotations

import collections
import heapq
import pathlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

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
    """Of a row's run."""

    params: int
    macs: int  # of one image
    images_seen: int  # that it is trained on, each as often as it is seen
    data: fingerprints.DataSnapshot = fingerprints.DataSnapshot({})  # as it is now
    metrics: tuple[str, ...] = ()  # that its test logs

    @property
    def total_macs(self) -> float:
        return float(self.macs) * self.images_seen


def measure_rows(cells: Sequence[SweepCell]) -> dict[str, RowCost]:
    """The sizes by row. Computes shapes only, and prints what the data sets hold.

    Raises `UserError` for what a run would refuse before its first step: see `make_rows`."""
    waiting = {cell.row.name for cell in cells if not is_final(cell.read_status()["status"])}
    sizes, sources, said = {}, {}, set()
    recorded = read_recorded_rows(cells[0].folder.parent if cells else None)
    for row in {cell.row.name: cell.row for cell in cells}.values():
        try:
            begun = recorded.get(row.name) == row.overrides
            needed = sources if row.name in waiting else None
            components, steps = dry_run(row.config, needed, begun=begun)
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from None
        for line in components.dataset.describe():
            if line not in said:
                print(line)
                said.add(line)
        found = cost(components.model, (1, *components.dataset.image_shape), train=False)
        images = steps * row.config.data.batch_size
        seen, logged = components.dataset.snapshot, tuple(_metrics(components))
        sizes[row.name] = RowCost(found.params, found.macs, images, seen, logged)
    return sizes


def _metrics(components: RunComponents) -> list[str]:
    """What the test of a run logs: none without a test split."""
    if "test" not in components.dataset.splits:
        return []
    own = components.own_parts.metrics
    return metrics.list_names(components.num_classes, task=components.dataset.task, own_metrics=own)


def check_metric(metric: str, sizes: Mapping[str, RowCost]) -> str:
    """The name of a metric, without "test/". Raises `UserError` for one that a row's test will not
    log."""
    name = metric.removeprefix("test/")
    for row, size in sizes.items():
        if name not in size.metrics:
            near = did_you_mean(name, size.metrics) or "; its data have no test split"
            raise UserError(f"--metric: the test of row {row} logs no {name!r}{near}")
    return name


def estimate_seconds(sizes: Mapping[str, RowCost], cells: Iterable[SweepCell]) -> dict[str, float]:
    """Seconds of a cell of each row: what its complete ones took, else what those of all rows took,
    by MACs and images. {} where none is complete."""
    seconds = collections.defaultdict(list)
    for cell in cells:
        known = cell.read_status()
        if known["status"] == "complete" and known["seconds"] and cell.row.name in sizes:
            seconds[cell.row.name].append(known["seconds"])
    if not seconds:
        return {}
    work = sum(len(took) * sizes[name].total_macs for name, took in seconds.items())
    pace = sum(map(sum, seconds.values())) / work
    return {
        name: float(np.mean(seconds[name])) if name in seconds else pace * size.total_macs
        for name, size in sizes.items()
    }


TIMING_STEPS = 20  # steps


def time_steps(row: SweepRow, share: child.DeviceSlot) -> tuple[float, float]:
    """(seconds of an image in training, seconds of everything else), by a run of a few steps."""
    config = ConfigDict(row.config.to_dict())
    config.schedule.update(dict(name="constant", warmup="0 steps"))
    config.train.update(
        dict(duration=f"{TIMING_STEPS} steps", eval_every="0 steps", early_stopping=0)
    )
    config.checkpoint.every = "0 steps"
    named, config.train.callbacks = own_parts.find_names(config), ()  # which may write files
    own_parts.remove_fields(config, named - own_parts.find_names(config))
    config = configs.reset_inert_fields(config)
    with tempfile.TemporaryDirectory() as folder:
        workdir, log = pathlib.Path(folder) / "run", pathlib.Path(folder) / "log.txt"
        began = time.perf_counter()
        with child.lock_log(log) as out:
            process = child.start(config, workdir, out, share)
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C does not reach its session
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - began
        if code:
            raise UserError(f"row {row.name}: {child.read_outcome(code, log).error}")
        image = 1 / workdirs.read_json(workdir / "summary.json")["images_per_second"]
    return image, max(0.0, seconds - TIMING_STEPS * config.data.batch_size * image)


def forecast_seconds(
    cells: Sequence[SweepCell], sizes: Mapping[str, RowCost], share: child.DeviceSlot
) -> tuple[dict[str, float], str]:
    """(seconds of a cell of each row, what that was told from). Where no cell is complete a few
    steps of the first row are timed."""
    if seconds := estimate_seconds(sizes, cells):
        return seconds, "from complete cells; for a row that has none by MACs and images"
    row = cells[0].row
    image, rest = time_steps(row, share)
    pace = image / max(sizes[row.name].macs, 1)
    seconds = {name: rest + pace * size.total_macs for name, size in sizes.items()}
    return (
        seconds,
        f"from {TIMING_STEPS} steps of {row.name}, by MACs and images; validations left out",
    )


def make_plan_table(
    cells: Sequence[SweepCell], sizes: Mapping[str, RowCost], seconds: Mapping[str, float]
) -> Table:
    """Rows with what they cost and how many of their cells are complete."""
    table = Table()
    for column in ("row", "parameters", "MACs", "images seen", "complete", "a cell", "left"):
        table.add_column(column, justify="left" if column == "row" else "right")
    done = count_cells(cells)
    for name, size in sizes.items():
        left = (done[name, None] - done[name, "complete"]) * seconds[name]
        counts = (f"{size.params:,}", f"{size.macs / 1e6:.2f} M", f"{size.images_seen:,}")
        complete = f"{done[name, 'complete']}/{done[name, None]}"
        table.add_row(
            name, *counts, complete, format_duration(seconds[name]), format_duration(left)
        )
    return table


def compute_makespan(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until all are done, each begun in turn where one of so many is free."""
    ends = [0.0] * jobs
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def count_cells(cells: Iterable[SweepCell]) -> collections.Counter:
    """Of each row its cells, (name, None), and those of each status, (name, status)."""
    keys = [
        (cell.row.name, status) for cell in cells for status in (None, cell.read_status()["status"])
    ]
    return collections.Counter(keys)
