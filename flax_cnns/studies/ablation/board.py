"""Shows the progress of an ablation: a bar, the ETA, and a line for each cell that ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import progress as bars
from rich.console import Console

from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.metric import describe_test_value
from flax_cnns.studies.ablation import forecast, plan
from flax_cnns.studies.ablation.forecast import RowCost
from flax_cnns.studies.ablation.plan import SweepCell
from flax_cnns.studies.scheduler import RunningJob
from flax_cnns.train.progress import format_duration


class ProgressBoard:
    """Shows the progress of all cells: a bar on a terminal, and a line for each cell that ends."""

    def __init__(
        self,
        cells: Sequence[SweepCell],
        costs: Mapping[str, RowCost],
        jobs: int,
        console: Console,
        metric: str,
    ):
        self.cells, self.costs, self.jobs, self.console = cells, costs, jobs, console
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
        if skipped := self._count_final():
            self.print(f"{skipped} of {len(self.cells)} cells are already done")
        for cell in self.cells:
            if cell.read_status()["status"] == "diverged":
                self.print(f"{cell.name} diverged before; remove {cell.workdir} to rerun it")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def _count_final(self) -> int:
        return sum(plan.is_final(cell.read_status()["status"]) for cell in self.cells)

    def _eta(self, running: Iterable[RunningJob], waiting: Iterable[SweepCell]) -> str:
        if not (seconds := forecast.estimate_seconds(self.costs, self.cells)):
            return ""
        now = time.monotonic()
        each = [max(0.0, seconds[r.job.row.name] - (now - r.start_time)) for r in running]
        waiting = [cell for cell in waiting if not plan.is_final(cell.read_status()["status"])]
        each += [seconds[cell.row.name] for cell in waiting]
        remaining = forecast.compute_makespan(each, self.jobs)
        return f"ETA {format_duration(remaining)}" if remaining else ""

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, running: Sequence[RunningJob] = (), waiting: Iterable[SweepCell] = ()) -> str:
        """Updates the bar. Returns the ETA."""
        names, eta = "; ".join(r.job.name for r in running), self._eta(running, waiting)
        self.bar.update(self.task, completed=self._count_final(), eta=eta, running=names)
        return eta

    def report_end(
        self,
        cell: SweepCell,
        outcome: child.ChildOutcome,
        seconds: float,
        is_retried: bool,
        eta: str,
    ) -> None:
        """Prints how a cell ended."""
        line = f"{self._count_final()}/{len(self.cells)}  {cell.name}: {outcome.status}"
        if outcome.status == "complete":
            value = workdirs.read_json(cell.workdir / "summary.json").get(f"test/{self.metric}")
            line += f", {describe_test_value(self.metric, value)}" if value is not None else ""
        line += f", {format_duration(seconds)}"
        line += f", {outcome.error}" if outcome.error else ""
        line += "; trying again" if is_retried else ""
        line += f" (see {cell.log})" if outcome.status in ("failed", "diverged") else ""
        self.print(f"{line}  {eta}" if eta else line)
