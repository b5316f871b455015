"""Ablations: rows, each a change to one config, trained with several seeds and compared.

A row is a name and overrides, `("mixup", {"mix.mixup": 0.2})`; the first is the baseline. A cell is
a row with a seed: a run (`flax_cnns.run`) in a directory and a process of its own. Seed s adds s to
`config.seed` in every row, so that rows are paired: the same first values where shapes agree, the
same order of the images, the same augmentation, the same split.

ablation.json     the config, the baseline's name, the number of seeds, rows with their overrides
ROW/seedS/        the run
ROW/seedS.json    {"status": complete, failed, diverged or interrupted, "attempts", "error" (one
                  line), "seconds" (of the attempts whose end was seen)}; a cell that runs is
                  interrupted till it ends
ROW/seedS.txt     what it printed

Started again, what is complete is skipped, what was cut goes on, and what failed is tried again.
What diverged would diverge again, to the bit: it stays as it is until its directory is removed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from ml_collections import ConfigDict
from rich.console import Console

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError
from flax_cnns.names import make_console
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runtime import launch, output
from flax_cnns.studies.ablation import forecast, plan
from flax_cnns.studies.ablation.board import ProgressBoard, RunningCell
from flax_cnns.studies.ablation.forecast import RowCost
from flax_cnns.studies.ablation.plan import SweepCell
from flax_cnns.train.progress import format_duration

# ---------------------------------------------------------------------------- the work


def run_cells(
    cells: Sequence[SweepCell],
    shares: Sequence[child.DeviceSlot],
    sizes: Mapping[str, RowCost],
    *,
    accept_changed_data: bool = False,
    metric: str = "accuracy",
    console: Console | None = None,
) -> dict[str, int]:
    """Runs the cells that are not done, one on each share of the machine, and returns how many of
    all have which status. A cell that fails is tried twice. A cell that began with other data is
    renamed and runs again; with `accept_changed_data` it is kept. `metric`: the one of its test
    that a cell says when it ends.

    A cell that another process runs (another start of the same ablation, or what a killed one left
    behind and still saves) is waited for.

    SIGTERM, SIGINT and SIGUSR1 are passed on: cells save and leave, and no other is begun. At the
    second signal they are killed. After SIGINT (Ctrl-C) this function ends with KeyboardInterrupt.
    """
    for cell in cells:  # complete, but nobody was there to write it
        if (known := cell.read_status())["status"] == "complete":
            cell.write_status(known)
    console = console or make_console()
    _set_aside_changed_data(cells, sizes, accept_changed_data, console)
    with _Signals() as signals, ProgressBoard(cells, sizes, len(shares), console, metric) as board:
        try:
            _Scheduler(cells, shares, signals, board, accept_changed_data).run()
        finally:
            board.update()
    if signals.interrupted:
        raise KeyboardInterrupt("interrupted; the same command goes on")
    return dict(collections.Counter(cell.read_status()["status"] for cell in cells))


def _set_aside_changed_data(
    cells: Sequence[SweepCell], sizes: Mapping[str, RowCost], accept: bool, console: Console
) -> None:
    """Renames the cells that began with other data, so that they run again. With `accept` they
    stay, and the change is recorded. Prints a line for each."""
    for cell in cells:
        data = sizes[cell.row.name].data if cell.row.name in sizes else None
        if data is None or not workdirs.has_begun(cell.workdir):
            continue
        # None: another start of this ablation runs the cell, and has compared its data.
        if (out := child.lock_log(cell.log)) is None:
            continue
        with out:
            if not (differs := workdirs.find_data_differences(cell.workdir, data)):
                if facts := workdirs.read_dataset_facts(cell.workdir):
                    workdirs.add_fingerprint(cell.workdir, {"fingerprint": data.fingerprint})
                if "fingerprint" in facts:
                    workdirs.record_moved_data(cell.workdir, cell.config.data.dir)
                continue
            said = f"{cell.name}: its data changed: {fingerprints.join_first(differs)}; "
            if not accept:
                said += f"it is renamed to {workdirs.set_aside(cell.workdir)} and runs again"
                cell.delete_status()
            else:
                said += "it is kept, as --accept-changed-data asks"
                if cell.read_status()["status"] == "complete":  # no child process will record it
                    change = workdirs.check_data(cell.workdir, data, accept=True, quiet=True)
                    workdirs.record_accepted_change(cell.workdir, change)
            console.print(said, markup=False, highlight=False, soft_wrap=True)


class _Signals:
    """Counts those that ask to leave."""

    def __init__(self) -> None:
        self.asked, self.interrupted, self._old = 0, False, {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGUSR1]
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background
                numbers.append(signal.SIGINT)
            self._old = {number: signal.signal(number, self._count) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _count(self, number: int, _: Any) -> None:
        self.asked += 1
        self.interrupted |= number == signal.SIGINT


class _Scheduler:
    def __init__(
        self,
        cells: Sequence[SweepCell],
        shares: Sequence[child.DeviceSlot],
        signals: _Signals,
        board: ProgressBoard,
        accept: bool,
    ):
        self.waiting = collections.deque(
            c for c in cells if not plan.is_final(c.read_status()["status"])
        )
        self.free, self.signals, self.board = list(shares), signals, board
        self.accept = accept
        self.running: list[RunningCell] = []
        self.elsewhere: set[str] = set()  # names of cells that another process runs
        self.look = 0.0  # when to look for more to start, and to show the time that is left
        self.tries: collections.Counter = collections.Counter()
        self.told = 0  # of the signals, so many

    def run(self) -> None:
        try:
            while self.running or (self.waiting and not self.signals.asked):
                if time.monotonic() > self.look:
                    self._begin()
                    self.board.update(self.running, self.waiting)
                    self.look = time.monotonic() + 1
                time.sleep(0.05)
                self._pass_on()
                for one in list(self.running):
                    if one.process.poll() is not None:
                        self._end(one)
        finally:
            for one in self.running:  # only after a fault of ours
                one.process.terminate()

    def _begin(self) -> None:
        """Starts as many cells as there is room for; those that another start of this ablation
        runs, or the last one's children that still save, are left for later."""
        for cell in list(self.waiting):
            if not self.free or self.signals.asked:
                return
            cell.folder.mkdir(parents=True, exist_ok=True)
            if (out := child.lock_log(cell.log)) is None:
                if cell.name not in self.elsewhere:
                    self.board.print(f"{cell.name}: another process runs it")
                self.elsewhere.add(cell.name)
                continue
            with out:
                self.waiting.remove(cell)
                if not plan.is_final(cell.read_status()["status"]):
                    self._start(cell, self.free.pop(0), out)

    def _start(self, cell: SweepCell, share: child.DeviceSlot, out: IO[bytes]) -> None:
        known = cell.read_status()
        self.tries[cell.name] += 1
        known |= {"status": "interrupted", "attempts": known["attempts"] + 1, "error": ""}
        cell.write_status(known)  # so it is, should nobody be there to write how it ended
        said = out.tell()
        accept = dict(accept_changed_data=self.accept)
        process = child.start(cell.config, cell.workdir, out, share, **accept)
        self.running.append(RunningCell(cell, share, process, said, time.monotonic(), known))

    def _pass_on(self) -> None:
        if self.told == self.signals.asked:
            return
        if not self.told:
            self.board.print("asked to stop: what runs saves and leaves; asked again, it is killed")
        for one in self.running:
            one.process.send_signal(signal.SIGKILL if self.told else signal.SIGTERM)
        self.told = self.signals.asked

    def _end(self, one: RunningCell) -> None:
        self.running.remove(one)
        self.free.append(one.slot)
        self.look = 0.0
        with contextlib.suppress(BrokenPipeError):  # it ended before it had read its job
            one.process.stdin.close()
        code, cell = one.process.returncode, one.cell
        found = child.read_outcome(code, cell.log, one.log_start)
        if self.told and code == -signal.SIGKILL:  # we did
            found = child.ChildOutcome("interrupted")
        seconds = one.previous["seconds"] + time.monotonic() - one.start_time
        ended = {"status": found.status, "error": found.error, "seconds": round(seconds, 3)}
        cell.write_status(one.previous | ended)
        again = found.should_retry and self.tries[cell.name] == 1
        if again:
            self.waiting.appendleft(cell)
        eta = self.board.update(self.running, self.waiting)
        self.board.report_end(cell, found, time.monotonic() - one.start_time, again, eta)


# ---------------------------------------------------------------------------- from plan to report


@output.safe()
def ablate(
    config: ConfigDict,
    sweep: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | os.PathLike,
    *,
    seeds: int = 3,
    jobs: int | None = None,
    index: int | None = None,
    rows: Sequence[str] = (),
    interval: str = "t",
    metric: str = "accuracy",
    accept_changed_data: bool = False,
) -> dict[str, int]:
    """Runs all cells of a sweep that are not done, or those of some `rows`, or the one of number
    `index`; then writes the report. Returns how many cells have which status.

    `jobs`: so many at once; see `runs.child.shares`. `interval`, `metric`: see `report.write`.
    `accept_changed_data`: see `work`. Raises `UserError` before anything runs for what a run would
    refuse before its first step, and KeyboardInterrupt after Ctrl-C, once the cells that ran have
    saved.
    """
    _check_alone()
    workdirs.check_location(folder)
    made = plan.make_rows(config, sweep, folder)
    cells = plan.select_cells(plan.make_cells(made, folder, seeds), rows=rows, index=index)
    sizes = forecast.measure_rows(cells)
    metric = forecast.check_metric(metric, sizes)
    shares = child.make_device_slots(jobs)
    plan.write_plan(folder, config, made, seeds, rows)
    interrupt = None
    try:
        given = dict(accept_changed_data=accept_changed_data, metric=metric)
        found = run_cells(cells, shares, sizes, **given)
    except KeyboardInterrupt as error:
        interrupt = error
    # Of an array's tasks the last one writes it.
    states = {cell.read_status()["status"] for cell in plan.make_cells(made, folder, seeds)}
    if "complete" in states and (index is None or not states & {"missing", "interrupted"}):
        write_report(folder, interval=interval, metric=metric)
    if interrupt is not None:
        raise interrupt
    return found


def show_plan(
    config: ConfigDict,
    sweep: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | os.PathLike,
    *,
    seeds: int = 3,
    jobs: int | None = None,
    index: int | None = None,
    rows: Sequence[str] = (),
    metric: str = "accuracy",
) -> None:
    """Prints what `ablate` would do, and what it will take; writes nothing. Raises `UserError`."""
    workdirs.check_location(folder)
    made = plan.make_rows(config, sweep, folder)
    cells = plan.select_cells(plan.make_cells(made, folder, seeds), rows=rows, index=index)
    sizes = forecast.measure_rows(cells)
    forecast.check_metric(metric, sizes)
    shares = child.make_device_slots(jobs)
    seconds, source = forecast.forecast_seconds(cells, sizes, shares[0])
    console = make_console(width=max(100, make_console().width))
    console.print(forecast.make_plan_table(cells, sizes, seconds))
    waiting = [seconds[c.row.name] for c in cells if not plan.is_final(c.read_status()["status"])]
    for cell in cells:
        if differs := workdirs.find_data_differences(cell.workdir, sizes[cell.row.name].data):
            differs = fingerprints.join_first(differs)
            print(f"{cell.name}: its data changed: {differs}; it will run again")
    print(
        f"{len(cells)} cells, {len(cells) - len(waiting)} done; {len(shares)} at once, about "
        f"{format_duration(forecast.compute_makespan(waiting, len(shares)))} left: told {source}"
    )


def write_report(
    folder: str | os.PathLike, *, interval: str = "t", metric: str = "accuracy"
) -> None:
    """Writes the report of what is complete, and says where it is. Raises `UserError`."""
    folder = pathlib.Path(folder)
    if not (folder / "ablation.json").is_file():
        raise UserError(f"{folder}: no ablation here (ablation.json is missing)")
    # Late: SciPy and matplotlib, which training does not need.
    from flax_cnns.studies.ablation import report as ablation_report

    with plan.lock_folder(folder):
        paths = ablation_report.write(folder, interval=interval, metric=metric)
    print(f"written to {folder}: {', '.join(pathlib.Path(path).name for path in paths)}")


def _check_alone() -> None:
    several = launch.find_cluster(os.environ) in ("SLURM", "Open MPI", "Kubernetes")
    if several or os.environ.get(launch.COORDINATOR):
        raise UserError(
            "an ablation is one process that starts others; start one alone, as by"
            " srun --ntasks=1, or an array of them with --index"
        )
