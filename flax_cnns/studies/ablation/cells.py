"""Runs the cells of an ablation in child processes, one on each device slot."""

from __future__ import annotations

import collections
import contextlib
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.console import Console

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.names import make_console
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.studies.ablation import plan
from flax_cnns.studies.ablation.board import ProgressBoard, RunningCell
from flax_cnns.studies.ablation.forecast import RowCost
from flax_cnns.studies.ablation.plan import SweepCell


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
    with _Signals() as signals, ProgressBoard(cells, costs, len(slots), console, metric) as board:
        try:
            _Scheduler(cells, slots, signals, board, accept_changed_data).run()
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


class _Signals:
    """Counts the signals that ask to stop."""

    def __init__(self) -> None:
        self.count, self.interrupted = 0, False
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGUSR1]
            # A shell makes its background processes ignore SIGINT; respect this.
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                numbers.append(signal.SIGINT)
            self._old_handlers = {number: signal.signal(number, self._count) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _count(self, number: int, _: Any) -> None:
        self.count += 1
        self.interrupted |= number == signal.SIGINT


class _Scheduler:
    """Keeps the device slots busy with cells until all cells are final or a signal comes."""

    def __init__(
        self,
        cells: Sequence[SweepCell],
        slots: Sequence[child.DeviceSlot],
        signals: _Signals,
        board: ProgressBoard,
        accept: bool,
    ):
        self.waiting = collections.deque(
            cell for cell in cells if not plan.is_final(cell.read_status()["status"])
        )
        self.free_slots, self.signals, self.board = list(slots), signals, board
        self.accept = accept
        self.running: list[RunningCell] = []
        self.elsewhere: set[str] = set()  # names of cells that another process runs
        self.next_poll = 0.0  # when to try to start cells and to update the board
        self.tries: collections.Counter = collections.Counter()
        self.signals_handled = 0

    def run(self) -> None:
        try:
            while self.running or (self.waiting and not self.signals.count):
                if time.monotonic() > self.next_poll:
                    self._start_cells()
                    self.board.update(self.running, self.waiting)
                    self.next_poll = time.monotonic() + 1
                time.sleep(0.05)
                self._forward_signals()
                for running in list(self.running):
                    if running.process.poll() is not None:
                        self._end(running)
        finally:
            for running in self.running:  # nonempty only after a bug in this process
                running.process.terminate()

    def _start_cells(self) -> None:
        """Starts cells on all free slots.

        Skips for now the cells that another start of this ablation runs, and those that a child of
        a killed start is still saving.
        """
        for cell in list(self.waiting):
            if not self.free_slots or self.signals.count:
                return
            cell.folder.mkdir(parents=True, exist_ok=True)
            if (out := child.lock_log(cell.log)) is None:
                if cell.name not in self.elsewhere:
                    self.board.print(f"{cell.name}: another process is running it")
                self.elsewhere.add(cell.name)
                continue
            with out:
                self.waiting.remove(cell)
                if not plan.is_final(cell.read_status()["status"]):
                    self._start(cell, self.free_slots.pop(0), out)

    def _start(self, cell: SweepCell, slot: child.DeviceSlot, out: IO[bytes]) -> None:
        known = cell.read_status()
        self.tries[cell.name] += 1
        known |= {"status": "interrupted", "attempts": known["attempts"] + 1, "error": ""}
        cell.write_status(known)  # stays "interrupted" if we are killed before the cell ends
        log_start = out.tell()
        process = child.start(cell.config, cell.workdir, out, slot, accept_changed_data=self.accept)
        self.running.append(RunningCell(cell, slot, process, log_start, time.monotonic(), known))

    def _forward_signals(self) -> None:
        if self.signals_handled == self.signals.count:
            return
        if not self.signals_handled:
            self.board.print("stopping: running cells save and exit; a second signal kills them")
        for running in self.running:
            running.process.send_signal(signal.SIGKILL if self.signals_handled else signal.SIGTERM)
        self.signals_handled = self.signals.count

    def _end(self, running: RunningCell) -> None:
        """Records how a cell ended, and queues it again if another attempt may succeed."""
        self.running.remove(running)
        self.free_slots.append(running.slot)
        self.next_poll = 0.0
        with contextlib.suppress(BrokenPipeError):  # the child ended before it read its job
            running.process.stdin.close()
        code, cell = running.process.returncode, running.cell
        outcome = child.read_outcome(code, cell.log, running.log_start)
        if self.signals_handled and code == -signal.SIGKILL:  # our own signal
            outcome = child.ChildOutcome("interrupted")
        took = time.monotonic() - running.start_time
        seconds = round(running.previous["seconds"] + took, 3)
        ended = {"status": outcome.status, "error": outcome.error, "seconds": seconds}
        cell.write_status(running.previous | ended)
        is_retried = outcome.should_retry and self.tries[cell.name] == 1
        if is_retried:
            self.waiting.appendleft(cell)
        eta = self.board.update(self.running, self.waiting)
        self.board.report_end(cell, outcome, took, is_retried, eta)
