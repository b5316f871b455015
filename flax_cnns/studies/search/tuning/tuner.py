"""Runs a study's trials: each is a run in a child process on a device slot.

When a study is started again, trials that ended are kept, trials that were running go on from their
newest checkpoint, and further trials are drawn. With one job the trials are the same to the bit as
those of a search that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from flax_cnns import recipes
from flax_cnns.checkpoint.lock import DirectoryLock
from flax_cnns.config.spaces import Distribution, format_values
from flax_cnns.errors import EXIT_PREEMPTED, UserError
from flax_cnns.names import make_console
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runtime import cluster, output
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies.ablation import forecast
from flax_cnns.studies.ablation.plan import SweepRow
from flax_cnns.studies.scheduler import RunningJob, Scheduler, StopSignals
from flax_cnns.studies.search.tuning import samplers, storage
from flax_cnns.studies.search.tuning.board import TuningBoard
from flax_cnns.studies.search.tuning.records import TrialRecord, TuningResult
from flax_cnns.studies.search.tuning.results import make_result
from flax_cnns.studies.search.tuning.storage import Journal
from flax_cnns.studies.search.tuning.study import Study, make_study, record_study
from flax_cnns.studies.search.tuning.trials import (
    Allotment,
    TrialRun,
    draw_trial,
    list_others,
    make_run,
)
from flax_cnns.train.progress import format_duration


@output.safe()
def tune(
    config: ConfigDict,
    space: Mapping[str, Distribution],
    folder: str | os.PathLike,
    *,
    trials: int | None,
    sampler: str = "tpe",
    pruner: str = "none",
    metric: str = "auto",
    budget_steps: int | None = None,
    jobs: int | None = None,
    seed: int | None = None,
    first: Sequence[Mapping[str, Any]] = (),
    accept_changed_data: bool = False,
    console: Console | None = None,
) -> TuningResult:
    """Searches the values of `space`, {path of a field: distribution}, for runs of `config`.

    A trial's value is the best validation of its run: of the accuracy, or of what `train.best_by`
    or `metric` names. Trials are never tested.

    trials: how many, with those that are there already; None: as many as the budget allows.
    sampler: tpe, random, qmc, grid (`samplers`).
    pruner: none, median, halving, hyperband (`pruners`).
    budget_steps: no trial begins once the trials have taken so many training steps.
    jobs: how many trials run at once, see `child.make_device_slots`.
    seed: of the draws; None takes the config's. All runs have the config's seed.
    first: {path: drawn value} of the first trials, which are not drawn.

    If this process is one of several, all of them call `tune` and each runs the trials in process.

    Raises UserError for what is wrong with the space, for another study in the folder, for changed
    data (without `accept_changed_data`), if Optuna is missing, and if no trial is complete at the
    end. Raises `Preempted` after SIGTERM and KeyboardInterrupt after Ctrl-C, when the running
    trials have saved.
    """
    storage.import_optuna()
    samplers.check_sampler(sampler)
    workdirs.check_location(folder)
    options = dict(sampler=sampler, pruner=pruner, metric=metric, seed=seed, first=first)
    folder = pathlib.Path(folder)
    if cluster.is_one_of_several(os.environ):
        from flax_cnns.studies.search.tuning import together

        return together.tune_together(
            config,
            lambda: make_study(config, space, folder, **options),  # type: ignore[arg-type]
            trials=trials,
            budget_steps=budget_steps,
            accept_changed_data=accept_changed_data,
        )
    study = make_study(config, space, folder, **options)  # type: ignore[arg-type]
    allotment = Allotment(study, trials, budget_steps)
    slots = child.make_device_slots(jobs)
    with DirectoryLock(folder):
        record_study(study, accept_changed_data=accept_changed_data)
        journal = Journal(folder, study.mode, space)
        board = TuningBoard(study, allotment, len(slots), console or make_console())
        with StopSignals() as signals, board:
            board.print_plan(journal.read())
            runs = TrialScheduler(
                study, journal, allotment, slots, signals, board, accept_changed_data
            )
            runs.run()
        records = journal.read()
    if signals.interrupted:
        raise KeyboardInterrupt("interrupted; run the same command again to resume")
    if signals.count or runs.is_stopped:
        board.print("interrupted; run the same command again to resume")
        raise Preempted(0, EXIT_PREEMPTED)
    return make_result(study, records)


def is_writer() -> bool:
    """Whether this process writes the files of a search: alone, or as process 0 of several.

    If it is one of several, `tune` or `launch.initialize` must have connected them.
    """
    if not cluster.is_one_of_several(os.environ):
        return True
    import jax  # late: to ask it opens the devices

    return jax.process_index() == 0


def load_space(file: str | os.PathLike) -> dict[str, Distribution]:
    """Returns what `space()` in a config file gives. Raises UserError if the file has none."""
    space = getattr(recipes.load(file), "space", None)
    if not callable(space):
        raise UserError(
            f"{file} has no space() that gives the fields to search; see configs/digits_lenet5.py"
        )
    return space()


def show_plan(
    config: ConfigDict,
    space: Mapping[str, Distribution],
    folder: str | os.PathLike,
    *,
    trials: int | None,
    sampler: str,
    pruner: str,
    metric: str,
    budget_steps: int | None,
    jobs: int | None,
    seed: int | None,
) -> None:
    """Prints what `tune` would run and how long that would take at most. Writes nothing.

    Raises UserError as `tune` does.
    """
    storage.import_optuna()
    workdirs.check_location(folder)
    study = make_study(
        config,
        space,
        pathlib.Path(folder),
        sampler=sampler,
        pruner=pruner,
        metric=metric,
        seed=seed,
    )
    allotment = Allotment(study, trials, budget_steps)
    slots = child.make_device_slots(jobs)
    ended = storage.read_trials(pathlib.Path(folder))
    board = TuningBoard(study, allotment, len(slots), make_console())
    board.print_plan(ended)
    first = study.sampler.draw(0).fields if sampler != "tpe" else {}
    row = SweepRow("trial 0", first, study.make_trial_config(first))
    per_image, rest = forecast.time_steps(row, slots[0])
    per_step = per_image * study.config.data.batch_size
    steps = study.facts["steps"]
    left = math.inf if allotment.trials is None else max(allotment.trials - len(ended), 0)
    if budget_steps is not None:
        spent = sum(trial.steps for trial in ended)
        left = min(left, math.ceil(max(budget_steps - spent, 0) / steps))
    seconds = left * (rest + steps * per_step) / len(slots)
    board.print(
        f"a trial: {format_duration(rest + steps * per_step)} (estimated from"
        f" {forecast.TIMING_STEPS} steps, without validations); all: at most"
        f" {format_duration(seconds)}"
    )


def print_result(result: TuningResult) -> None:
    """Prints the best trial."""
    best = result.best
    print(f"best: trial {best.number}, {best.value:.6g}: {format_values(best.values)}")


class TrialScheduler(Scheduler[TrialRun]):
    """Keeps the device slots busy with trials until there are enough or a signal comes."""

    jobs_are = "trials"

    def __init__(
        self,
        study: Study,
        journal: Journal,
        allotment: Allotment,
        slots: Sequence[child.DeviceSlot],
        signals: StopSignals,
        board: TuningBoard,
        accept: bool,
    ):
        self.study, self.journal, self.allotment, self.board = study, journal, allotment, board
        self.is_stopped = False  # something else than us has stopped a trial
        self.pruned: dict[int, TrialRecord] = {}  # {number: end} of trials that were told to stop
        begun = [record for record in journal.read() if record.state == "running"]
        runs = [make_run(study, record) for record in begun]
        super().__init__(runs, slots, signals, accept_changed_data=accept)

    def say(self, text: str) -> None:
        self.board.print(text)

    def add_jobs(self) -> None:
        while not self.is_stopped and len(self.waiting) < len(self.free_slots):
            records = self.journal.read()
            unfinished = [*self.waiting, *(running.job for running in self.running)]
            if not self.allotment.allows(records, sum(run.last_step for run in unfinished)):
                return
            record = draw_trial(self.study, self.journal, len(records))
            self.waiting.append(make_run(self.study, record))

    def settle(self, job: TrialRun) -> bool:
        records = self.journal.read()
        if records[job.record.number].state != "running":
            return True
        ended = job.find_end(list_others(records, job.record.number))
        if ended is not None:
            self._finish(ended, 0.0)
        return ended is not None

    def begin(self, job: TrialRun) -> dict:
        return {}

    def update(self) -> None:
        self.board.update(self.journal.read(), self.running)

    def watch(self) -> None:
        for running in self.running:
            job: TrialRun = running.job
            if job.record.number in self.pruned or not job.has_news():
                continue
            others = list_others(self.journal.read(), job.record.number)
            with contextlib.suppress(UserError):  # the log is being replaced
                decision, curve = job.decide(others)
                self.journal.report(job.record.number, curve)
                if decision.prune_at is None:
                    continue
                # Kept: trials that end before this process does might change the decision.
                self.pruned[job.record.number] = job.prune(decision, curve)
                running.process.terminate()

    def end(
        self, running: RunningJob, outcome: child.ChildOutcome, seconds: float, is_retried: bool
    ) -> None:
        job: TrialRun = running.job
        others = list_others(self.journal.read(), job.record.number)
        ended = self.pruned.get(job.record.number) or job.find_end(others)
        if ended is None and outcome.status == "interrupted":
            self.is_stopped = True
            return
        if ended is None and is_retried:
            self.say(f"{job.name}: {outcome.error}; trying again (see {job.log})")
            return
        if ended is None:
            error = outcome.error or "the run ended without a summary"
            error = f"diverged: {error}" if outcome.status == "diverged" else error
            ended = job.fail(error, others)
        self._finish(ended, seconds)

    def _finish(self, ended: TrialRecord, seconds: float) -> None:
        self.journal.finish(ended)
        records = self.journal.read()
        eta = self.board.update(records, self.running)
        self.board.report_end(records[ended.number], seconds, records, eta)
