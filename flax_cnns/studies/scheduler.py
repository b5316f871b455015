"""Keeps this machine's device slots busy with runs in child processes.

A job is a run with a name, a config, a directory and a log. `Scheduler` starts jobs on free slots,
waits for jobs whose log another process has locked, tries a failed job twice, and passes signals
on. A subclass says where jobs come from and what is recorded when they begin and end.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from typing import IO, Any, Generic, NamedTuple, Protocol, TypeVar

from ml_collections import ConfigDict

from flax_cnns.runs import child


class Job(Protocol):
    """A run that a scheduler may start."""

    @property
    def name(self) -> str:
        """Names the job in messages."""

    @property
    def workdir(self) -> pathlib.Path:
        """The run's directory."""

    @property
    def log(self) -> pathlib.Path:
        """The file for the run's output. Who holds its lock has the job."""

    @property
    def config(self) -> ConfigDict:
        """The run's config."""


AnyJob = TypeVar("AnyJob", bound=Job)


class RunningJob(NamedTuple):
    """A job whose process runs."""

    job: Any
    slot: child.DeviceSlot
    process: Any  # a subprocess.Popen
    log_start: int  # where this attempt's output begins in the log, in bytes
    start_time: float
    previous: dict[str, Any]  # what `Scheduler.begin` returned


class StopSignals:
    """A context that counts SIGTERM, SIGUSR1 and SIGINT, the signals that ask to stop."""

    def __init__(self) -> None:
        self.count, self.interrupted = 0, False
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
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


class Scheduler(abc.ABC, Generic[AnyJob]):
    """Runs jobs on device slots until none is left or a signal comes.

    A subclass must define `say`, `settle`, `begin` and `end`, and may define `add_jobs`, `update`
    and `watch`.
    """

    def __init__(
        self,
        jobs: Iterable[AnyJob],
        slots: Sequence[child.DeviceSlot],
        signals: StopSignals,
        *,
        accept_changed_data: bool = False,
    ):
        self.waiting = collections.deque(jobs)
        self.free_slots, self.signals = list(slots), signals
        self.accept_changed_data = accept_changed_data
        self.running: list[RunningJob] = []
        self.elsewhere: set[str] = set()  # names of jobs that another process runs
        self.next_poll = 0.0  # when to try to start jobs and to update the display
        self.tries: collections.Counter = collections.Counter()
        self.signals_handled = 0

    # ---- what a subclass defines

    jobs_are = "jobs"  # in messages

    @abc.abstractmethod
    def say(self, text: str) -> None:
        """Prints a line."""

    @abc.abstractmethod
    def settle(self, job: AnyJob) -> bool:
        """Whether the job needs no process. Called with the job's log locked."""

    @abc.abstractmethod
    def begin(self, job: AnyJob) -> dict[str, Any]:
        """Records that an attempt begins. Returns what `end` finds as `running.previous`."""

    @abc.abstractmethod
    def end(
        self, running: RunningJob, outcome: child.ChildOutcome, seconds: float, is_retried: bool
    ) -> None:
        """Records how an attempt ended. Called with the job's slot free, and the job queued again
        if `is_retried`."""

    def add_jobs(self) -> None:
        """Adds jobs to `waiting` if slots are free. Called before jobs are started."""

    def update(self) -> None:
        """Updates the display. Called about once a second."""

    def watch(self) -> None:
        """Looks at the running jobs. Called about 20 times a second."""

    # ---- the loop

    def run(self) -> None:
        """Runs the jobs. Returns when no job is left, or after a signal when all have ended."""
        try:
            while True:
                if time.monotonic() > self.next_poll:
                    self.next_poll = time.monotonic() + 1
                    if not self.signals.count:
                        self.add_jobs()
                    self._start_jobs()
                    self.update()
                is_settled = not self.next_poll  # a job ended without a process: look for others
                if not (self.running or is_settled or (self.waiting and not self.signals.count)):
                    return
                time.sleep(0.05)
                self._forward_signals()
                self.watch()
                for running in list(self.running):
                    if running.process.poll() is not None:
                        self._end(running)
        finally:
            for running in self.running:  # nonempty only after a bug in this process
                running.process.terminate()

    def _start_jobs(self) -> None:
        """Starts jobs on all free slots.

        Skips for now the jobs that another scheduler runs, and those that a child of a killed
        scheduler is still saving.
        """
        for job in list(self.waiting):
            if not self.free_slots or self.signals.count:
                return
            job.log.parent.mkdir(parents=True, exist_ok=True)
            if (out := child.lock_log(job.log)) is None:
                if job.name not in self.elsewhere:
                    self.say(f"{job.name}: another process is running it")
                self.elsewhere.add(job.name)
                continue
            with out:
                self.waiting.remove(job)
                if self.settle(job):
                    self.next_poll = 0.0
                else:
                    self._start(job, self.free_slots.pop(0), out)

    def _start(self, job: AnyJob, slot: child.DeviceSlot, out: IO[bytes]) -> None:
        self.tries[job.name] += 1
        previous, log_start = self.begin(job), out.tell()
        accept = self.accept_changed_data
        process = child.start(job.config, job.workdir, out, slot, accept_changed_data=accept)
        self.running.append(RunningJob(job, slot, process, log_start, time.monotonic(), previous))

    def _forward_signals(self) -> None:
        if self.signals_handled == self.signals.count:
            return
        if not self.signals_handled:
            self.say(f"stopping: running {self.jobs_are} save and exit; a second signal kills them")
        for running in self.running:
            running.process.send_signal(signal.SIGKILL if self.signals_handled else signal.SIGTERM)
        self.signals_handled = self.signals.count

    def _end(self, running: RunningJob) -> None:
        """Frees the slot of a job that ended. Queues the job again if another attempt may
        succeed."""
        self.running.remove(running)
        self.free_slots.append(running.slot)
        self.next_poll = 0.0
        with contextlib.suppress(BrokenPipeError):  # the child ended before it read its job
            running.process.stdin.close()
        code, job = running.process.returncode, running.job
        outcome = child.read_outcome(code, job.log, running.log_start)
        if self.signals_handled and code == -signal.SIGKILL:  # our own signal
            outcome = child.ChildOutcome("interrupted")
        is_retried = outcome.should_retry and self.tries[job.name] == 1
        if is_retried:
            self.waiting.appendleft(job)
        self.end(running, outcome, time.monotonic() - running.start_time, is_retried)
