"""A trial as a run: its config, what its files say about its end, and the rule when to begin."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.studies.search.tuning.pruners import Decision
from flax_cnns.studies.search.tuning.records import TrialRecord
from flax_cnns.studies.search.tuning.storage import Journal
from flax_cnns.studies.search.tuning.study import Study
from flax_cnns.train.writer import read_jsonl


@dataclasses.dataclass
class TrialRun:
    """The run of a trial that has not ended: a job of the scheduler."""

    study: Study
    record: TrialRecord
    config: ConfigDict
    last_step: int
    size: int = -1  # of metrics.jsonl, in bytes, when it was last read

    @property
    def name(self) -> str:
        return f"trial {self.record.number}"

    @property
    def workdir(self) -> pathlib.Path:
        return self.record.workdir

    @property
    def log(self) -> pathlib.Path:
        return self.workdir.with_name(f"{self.record.number}.txt")

    def has_news(self) -> bool:
        """Whether the run has logged something since the last call."""
        try:
            size = (self.workdir / "metrics.jsonl").stat().st_size
        except OSError:
            size = -1
        size, self.size = self.size, size
        return size != self.size

    def read_lines(self) -> list[dict[str, float]]:
        """Returns the lines of the run's log, oldest first."""
        log = self.workdir / "metrics.jsonl"
        return read_jsonl(log) if log.is_file() else []

    def read_curve(self) -> tuple[tuple[int, float], ...]:
        """Returns the run's validations (step, value), by step."""
        name = f"validation/{self.study.metric}"
        points = {
            int(line["step"]): float(line[name]) for line in self.read_lines() if name in line
        }
        return tuple(sorted(points.items()))

    def read_step(self) -> int:
        """Returns the newest logged step; 0 if nothing was logged."""
        return max((int(line["step"]) for line in self.read_lines()), default=0)

    def decide(self, others: Sequence[TrialRecord]) -> tuple[Decision, tuple]:
        """Returns (the pruner's decision, the validations that count)."""
        curve = self.read_curve()
        decision = self.study.pruner.decide(self.record.number, curve, others, self.last_step)
        if decision.prune_at is not None:
            curve = tuple(point for point in curve if point[0] <= decision.prune_at)
        return decision, curve

    def find_end(self, others: Sequence[TrialRecord]) -> TrialRecord | None:
        """Returns the record of a trial whose files say that it has ended; None if it goes on."""
        decision, curve = self.decide(others)
        ended = self.record._replace(curve=curve, rungs=decision.rungs)
        if decision.prune_at is not None:
            return self.prune(decision, curve)
        if not (self.workdir / "summary.json").is_file():
            return None
        summary = workdirs.read_json(self.workdir / "summary.json")
        value = summary.get(f"validation/best_{self.study.metric}")
        if value is None:
            error = f"no validation/{self.study.metric} was finite"
            return ended._replace(state="failed", steps=summary["step"], error=error)
        return ended._replace(state="complete", value=value, steps=summary["step"])

    def prune(self, decision: Decision, curve: tuple[tuple[int, float], ...]) -> TrialRecord:
        """Returns the record of a trial that is pruned; both arguments are those of `decide`."""
        assert decision.prune_at is not None
        return self.record._replace(
            curve=curve,
            rungs=decision.rungs,
            state="pruned",
            value=curve[-1][1] if math.isfinite(curve[-1][1]) else None,
            steps=decision.prune_at,
        )

    def fail(self, error: str, others: Sequence[TrialRecord]) -> TrialRecord:
        """Returns the record of a trial whose run ended with an error."""
        decision, curve = self.decide(others)
        return self.record._replace(
            curve=curve,
            rungs=decision.rungs,
            state="failed",
            steps=self.read_step(),
            error=error,
        )


def make_run(study: Study, record: TrialRecord) -> TrialRun:
    """Makes the run of a trial. Raises UserError if its values do not fit the config."""
    config = study.make_trial_config(record.fields)
    config = workdirs.reset_inert_if_new(config, record.workdir)
    return TrialRun(study, record, config, study.count_steps(config))


def list_others(records: Sequence[TrialRecord], number: int) -> list[TrialRecord]:
    """Returns the trials other than this one."""
    return [record for record in records if record.number != number]


class Allotment:
    """How many trials a study may have: `trials`, `budget_steps` or both; None is no limit.

    A trial begins if fewer than `budget_steps` training steps were taken or are being taken. So the
    last trials may exceed the budget by a part of their length.
    """

    def __init__(self, study: Study, trials: int | None, budget_steps: int | None):
        if trials is None and budget_steps is None:
            raise UserError("--trials: expected a number of trials, or --budget")
        for name, number in (("--trials", trials), ("--budget", budget_steps)):
            if number is not None and number < 1:
                raise UserError(f"{name}: expected one or more, got {number}")
        points = study.sampler.count_points()
        limits = [limit for limit in (trials, points) if limit is not None]
        self.trials = min(limits) if limits else None
        self.budget_steps = budget_steps

    def allows(self, records: Sequence[TrialRecord], planned_steps: int) -> bool:
        """Whether another trial may begin. `planned_steps`: those of trials that have not ended."""
        if self.trials is not None and len(records) >= self.trials:
            return False
        taken = sum(record.steps for record in records) + planned_steps
        return self.budget_steps is None or taken < self.budget_steps


def draw_trial(study: Study, journal: Journal, number: int) -> TrialRecord:
    """Draws and creates the next trial of a study, whose number is `number`."""
    drawing = study.sampler.draw(number, journal)
    record = journal.create(drawing.params, drawing.values, drawing.fields)
    assert record.number == number, (record.number, number)
    return record
