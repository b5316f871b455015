"""Runs the cells of an ablation in child processes, one on each device slot."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.names import make_console
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.studies.ablation import plan
from flax_cnns.studies.ablation.board import ProgressBoard
from flax_cnns.studies.ablation.forecast import RowCost
from flax_cnns.studies.ablation.plan import SweepCell
from flax_cnns.studies.scheduler import RunningJob, Scheduler, StopSignals


def run_cells(
    cells: Sequence[SweepCell],
    slots: Sequence[child.DeviceSlot],
    costs: Mapping[str, RowCost],
    *,
    accept_changed_data: bool = False,
    metric: str = "accuracy",
    console: Console | None = None,
) -> dict[str, int]:
    """Runs the cells that are not final, one on each slot. Returns {status: number of cells}.

    A cell that fails is tried twice. A cell that began with other data is renamed and runs again;
    with `accept_changed_data` it is kept. `metric`: the test metric to print when a cell ends.

    Waits for a cell that another process is running: another start of the same ablation, or a child
    of a killed start that is still saving.

    SIGTERM, SIGINT and SIGUSR1 make the running cells save and exit, and no new cell starts. A
    second signal kills them. After SIGINT (Ctrl-C) this function raises KeyboardInterrupt.
    """
    for cell in cells:  # a cell may have completed after its parent was killed
        if (known := cell.read_status())["status"] == "complete":
            cell.write_status(known)
    console = console or make_console()
    _set_aside_changed_data(cells, costs, accept_changed_data, console)
    with (
        StopSignals() as signals,
        ProgressBoard(cells, costs, len(slots), console, metric) as board,
    ):
        try:
            _CellScheduler(cells, slots, signals, board, accept_changed_data).run()
        finally:
            board.update()
    if signals.interrupted:
        raise KeyboardInterrupt("interrupted; run the same command again to resume")
    return dict(collections.Counter(cell.read_status()["status"] for cell in cells))


def _set_aside_changed_data(
    cells: Sequence[SweepCell], costs: Mapping[str, RowCost], accept: bool, console: Console
) -> None:
    """Renames the cells that began with other data, so that they run again.

    With `accept`, keeps them and records the change. Prints a line for each.
    """
    for cell in cells:
        data = costs[cell.row.name].data if cell.row.name in costs else None
        if data is None or not workdirs.has_begun(cell.workdir):
            continue
        # If the log is locked, another start of this ablation runs the cell and has compared its
        # data.
        if (out := child.lock_log(cell.log)) is None:
            continue
        with out:
            if not (differs := workdirs.find_data_differences(cell.workdir, data)):
                if facts := workdirs.read_dataset_facts(cell.workdir):
                    workdirs.add_fingerprint(cell.workdir, {"fingerprint": data.fingerprint})
                if "fingerprint" in facts:
                    workdirs.record_moved_data(cell.workdir, cell.config.data.dir)
                continue
            line = f"{cell.name}: its data changed: {fingerprints.join_first(differs)}; "
            if not accept:
                line += f"it is renamed to {workdirs.set_aside(cell.workdir)} and runs again"
                cell.delete_status()
            else:
                line += "it is kept because of --accept-changed-data"
                if cell.read_status()["status"] == "complete":  # no child process will record it
                    change = workdirs.check_data(cell.workdir, data, accept=True, quiet=True)
                    assert change is not None  # the data differ
                    workdirs.record_accepted_change(cell.workdir, change)
            console.print(line, markup=False, highlight=False, soft_wrap=True)


class _CellScheduler(Scheduler[SweepCell]):
    """Keeps the device slots busy with cells until all cells are final or a signal comes."""

    jobs_are = "cells"

    def __init__(
        self,
        cells: Sequence[SweepCell],
        slots: Sequence[child.DeviceSlot],
        signals: StopSignals,
        board: ProgressBoard,
        accept: bool,
    ):
        waiting = [cell for cell in cells if not self.settle(cell)]
        super().__init__(waiting, slots, signals, accept_changed_data=accept)
        self.board = board

    def say(self, text: str) -> None:
        self.board.print(text)

    def settle(self, job: SweepCell) -> bool:
        return plan.is_final(job.read_status()["status"])

    def begin(self, job: SweepCell) -> dict[str, Any]:
        known = job.read_status()
        known |= {"status": "interrupted", "attempts": known["attempts"] + 1, "error": ""}
        job.write_status(known)  # stays "interrupted" if we are killed before the cell ends
        return known

    def update(self) -> None:
        self.board.update(self.running, self.waiting)

    def end(
        self, running: RunningJob, outcome: child.ChildOutcome, seconds: float, is_retried: bool
    ) -> None:
        total = round(running.previous["seconds"] + seconds, 3)
        ended = {"status": outcome.status, "error": outcome.error, "seconds": total}
        running.job.write_status(running.previous | ended)
        eta = self.board.update(self.running, self.waiting)
        self.board.report_end(running.job, outcome, seconds, is_retried, eta)
