"""Trains the networks that a search proposes, each as a run in its own directory.

With one device slot, the runs train one after the other in this process, which saves starting
Python and JAX for each. With more slots they are child processes. The number of slots changes no
number, since a child's run depends on its config alone.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns.errors import EXIT_PREEMPTED, Diverged, UserError
from flax_cnns.names import open_log
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.record import read_record
from flax_cnns.runs.train import run
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies.scheduler import RunningJob, Scheduler, StopSignals

LAST = 5  # validations; the best of them counts (section 4.1)
CLEAR_EVERY = 16  # children whose compiled programs are kept in memory


class ChildNetwork(NamedTuple):
    """A network to train: a job of the scheduler."""

    name: str
    folder: pathlib.Path
    config: ConfigDict

    @property
    def workdir(self) -> pathlib.Path:
        return self.folder / self.name

    @property
    def log(self) -> pathlib.Path:
        return self.folder / f"{self.name}.txt"


class ChildScore(NamedTuple):
    """What training a network gave."""

    accuracies: list[float]  # of the last validations, at most `LAST`
    params: int
    seconds: float  # of training and compiling; 0 if unknown
    error: str = ""  # why training diverged

    @property
    def reward(self) -> float:
        """The cube of the best accuracy; 0 if training diverged."""
        return max(self.accuracies, default=0.0) ** 3


def make_child_config(config: ConfigDict, duration: str, model: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a child: shorter, validated every epoch, and never tested.

    `model`: fields of the network, with its name. `duration`: "" keeps the config's.
    """
    config = ConfigDict(config.to_dict())
    with config.unlocked():
        for field, value in configs.to_plain(dict(model)).items():
            config.model[field] = value
    config.train.test_on = "never"
    config.train.eval_every = "1 epochs"
    config.train.duration = duration or config.train.duration
    config.train.evaluate_train = False
    return configs.reset_inert_fields(config)


def read_score(job: ChildNetwork) -> ChildScore | None:
    """Reads the score of a complete child; None if it is not complete.

    The accuracy of multilabel data is the share of images with all labels right.
    """
    if not (job.workdir / "summary.json").is_file():
        return None
    summary, record = workdirs.read_json(job.workdir / "summary.json"), read_record(job.workdir)
    name = "subset_accuracy" if record.series("validation/subset_accuracy")[1].size else "accuracy"
    values = record.series(f"validation/{name}")[1][-LAST:]
    accuracies = values[np.isfinite(values)].tolist()
    return ChildScore(accuracies, summary["params"], round(record.seconds or 0.0, 3))


def _read_seconds(job: ChildNetwork) -> float:
    """Returns how long a child that diverged took up to its last log line; 0 without one."""
    with contextlib.suppress(UserError):
        return round(read_record(job.workdir).seconds or 0.0, 3)
    return 0.0


class ChildTrainer:
    """Trains batches of networks and keeps what is known about each."""

    def __init__(
        self,
        slots: Sequence[child.DeviceSlot],
        say: Callable[[str], None],
        report: Callable[[ChildNetwork, ChildScore], None],
        *,
        accept_changed_data: bool = False,
    ):
        self.slots, self.say, self.report = slots, say, report
        self.accept_changed_data = accept_changed_data
        self.scores: dict[str, ChildScore] = {}
        self.trained = 0  # in this process, since it started

    def train(self, jobs: Sequence[ChildNetwork]) -> list[ChildScore]:
        """Trains the jobs that are not complete. Returns the score of each.

        Calls `report` for each that was trained now. Raises `Preempted` or KeyboardInterrupt after
        a signal, and UserError if a child failed twice.
        """
        for job in jobs:
            if job.name not in self.scores and (score := read_score(job)):
                self._keep(job, score)
        unique = {job.name: job for job in jobs if job.name not in self.scores}
        if len(self.slots) > 1:
            self._train_in_children(list(unique.values()))
        else:
            for job in unique.values():
                self._train_here(job)
        return [self.scores[job.name] for job in jobs]

    def _keep(self, job: ChildNetwork, score: ChildScore) -> None:
        self.scores[job.name] = score
        # No one resumes a complete child, and checkpoints are most of its size.
        shutil.rmtree(job.workdir / "checkpoints", ignore_errors=True)

    def _finish(self, job: ChildNetwork, error: str = "") -> None:
        score = ChildScore([], 0, _read_seconds(job), error) if error else read_score(job)
        assert score is not None  # the run has just ended
        self._keep(job, score)
        self.trained += 1
        self.report(job, score)

    def _train_here(self, job: ChildNetwork) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        error = ""
        try:
            with (
                _count_stops() as stops,
                open_log(job.log) as log,
                contextlib.redirect_stdout(log),
            ):
                run(job.config, job.workdir, accept_changed_data=self.accept_changed_data)
        except Diverged as diverged:
            error = str(diverged)
        except Preempted as stopped:
            self.say(f"{job.name}: saved at step {stopped.step}; run the same command to resume")
            raise
        self._finish(job, error)
        if stops:
            self.say("stopped after this network; run the same command to resume")
            raise Preempted(0, EXIT_PREEMPTED)
        if self.trained % CLEAR_EVERY == 0:
            jax.clear_caches()

    def _train_in_children(self, jobs: Sequence[ChildNetwork]) -> None:
        with StopSignals() as signals:
            scheduler = _ChildScheduler(self, jobs, self.slots, signals)
            scheduler.run()
        if signals.interrupted:
            raise KeyboardInterrupt("interrupted; run the same command again to resume")
        if signals.count:
            raise Preempted(0, EXIT_PREEMPTED)
        if scheduler.failures:
            raise UserError(" | ".join(scheduler.failures))


@contextlib.contextmanager
def _count_stops() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGUSR1 that came too late for a run to stop, or before it began."""
    stops: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda signum, _: stops.append(signum))
    try:
        yield stops
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _ChildScheduler(Scheduler[ChildNetwork]):
    jobs_are = "networks"

    def __init__(
        self,
        trainer: ChildTrainer,
        jobs: Sequence[ChildNetwork],
        slots: Sequence[child.DeviceSlot],
        signals: StopSignals,
    ):
        accept = trainer.accept_changed_data
        super().__init__(jobs, slots, signals, accept_changed_data=accept)
        self.trainer, self.failures = trainer, list[str]()

    def say(self, text: str) -> None:
        self.trainer.say(text)

    def settle(self, job: ChildNetwork) -> bool:
        """Whether another process has completed the job."""
        if (score := read_score(job)) is not None:
            self.trainer._keep(job, score)
        return score is not None

    def begin(self, job: ChildNetwork) -> dict[str, Any]:
        return {}

    def end(
        self, running: RunningJob, outcome: child.ChildOutcome, seconds: float, is_retried: bool
    ) -> None:
        job = running.job
        if outcome.status in ("complete", "diverged"):
            self.trainer._finish(job, outcome.error)
        elif outcome.status == "failed" and not is_retried:
            self.failures.append(f"{job.name}: {outcome.error} (see {job.log})")
