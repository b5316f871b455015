"""What is shown while the cells of an ablation run: a bar, a line for each that ends, the ETA."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import progress as bars
from rich.console import Console

from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.metric import describe_test_value
from flax_cnns.studies.ablation import forecast, plan
from flax_cnns.studies.ablation.forecast import RowCost
from flax_cnns.studies.ablation.plan import SweepCell
from flax_cnns.train.progress import format_duration


class RunningCell(NamedTuple):
    cell: SweepCell
    slot: child.DeviceSlot
    process: Any
    log_start: int  # bytes of the log before
    start_time: float
    previous: dict[str, Any]  # of the cell before


class ProgressBoard:
    """Shows how far all cells are: a bar on a terminal, and a line for each that ends."""

    def __init__(
        self,
        cells: Sequence[SweepCell],
        sizes: Mapping[str, RowCost],
        jobs: int,
        console: Console,
        metric: str,
    ):
        self.cells, self.sizes, self.jobs, self.console = cells, sizes, jobs, console
        self.metric = metric
        self.bar = bars.Progress(
            bars.TextColumn("{task.completed:.0f}/{task.total:.0f} cells"),
            bars.BarColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[eta]}  {task.fields[running]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressBoard:
        self.bar.start()
        self.task = self.bar.add_task("", total=len(self.cells), eta="", running="")
        self.update()
        if skipped := self._done():
            self.print(f"{skipped} of {len(self.cells)} cells are done already")
        for cell in self.cells:
            if cell.read_status()["status"] == "diverged":
                self.print(f"{cell.name} diverged before; remove {cell.workdir} to try it again")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def _done(self) -> int:
        return sum(plan.is_final(cell.read_status()["status"]) for cell in self.cells)

    def _eta(self, running: Iterable[RunningCell], waiting: Iterable[SweepCell]) -> str:
        if not (seconds := forecast.estimate_seconds(self.sizes, self.cells)):
            return ""
        now = time.monotonic()
        each = [max(0.0, seconds[one.cell.row.name] - (now - one.start_time)) for one in running]
        waiting = [cell for cell in waiting if not plan.is_final(cell.read_status()["status"])]
        remaining = forecast.compute_makespan(
            each + [seconds[cell.row.name] for cell in waiting], self.jobs
        )
        return f"ETA {format_duration(remaining)}" if remaining else ""

    def print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, running: Sequence[RunningCell] = (), waiting: Iterable[SweepCell] = ()) -> str:
        """Returns the ETA."""
        names, eta = "; ".join(one.cell.name for one in running), self._eta(running, waiting)
        self.bar.update(self.task, completed=self._done(), eta=eta, running=names)
        return eta

    def report_end(
        self, cell: SweepCell, found: child.ChildOutcome, seconds: float, again: bool, eta: str
    ) -> None:
        said = f"{self._done()}/{len(self.cells)}  {cell.name}: {found.status}"
        if found.status == "complete":
            value = workdirs.read_json(cell.workdir / "summary.json").get(f"test/{self.metric}")
            said += f", {describe_test_value(self.metric, value)}" if value is not None else ""
        said += f", {format_duration(seconds)}"
        said += f", {found.error}" if found.error else ""
        said += "; once more" if again else ""
        said += f" (see {cell.log})" if found.status in ("failed", "diverged") else ""
        self.print(f"{said}  {eta}" if eta else said)
