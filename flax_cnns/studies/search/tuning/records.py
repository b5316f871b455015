"""What a study and its trials are, read from the study's folder without training anything."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs

STATES = ("complete", "pruned", "failed", "running")


class TrialRecord(NamedTuple):
    """One trial: a run with values drawn from the space."""

    number: int  # from 0
    values: dict[str, Any]  # {path: drawn value}, as in JSON; without fields that were not drawn
    state: str  # complete, pruned, failed, running
    value: float | None  # the best validation of a complete trial, the last one of a pruned trial
    steps: int  # training steps that count; 0 while the trial runs
    workdir: pathlib.Path  # the run
    error: str = ""  # one line: why the trial failed
    fields: dict[str, Any] = {}  # noqa: RUF012 (never changed) {path: the field's value}
    curve: tuple[tuple[int, float], ...] = ()  # (step, validation), by step; a value may be NaN
    rungs: int = 0  # rungs that a trial of a halving pruner reached
    seconds: float | None = None  # from the start to the end of the trial


class TuningResult(NamedTuple):
    """The result of `tune`."""

    trials: list[TrialRecord]  # by number
    best: TrialRecord  # the best complete trial; of equal ones the first


class StudyRecord(NamedTuple):
    """A study as its folder describes it."""

    folder: pathlib.Path
    given: ConfigDict  # what the search was given; the winner is tested as it says
    config: ConfigDict  # of all trials, before their values are set
    space: dict[str, dict[str, Any]]  # as `config.spaces.describe_space` describes it
    sampler: str
    pruner: str
    metric: str  # such as validation/accuracy
    mode: str  # which value is the best: max or min
    seed: int
    trials: list[TrialRecord]

    @property
    def best(self) -> TrialRecord | None:
        """The best complete trial; None if no trial is complete."""
        return find_best(self.trials, self.mode)


def find_best(trials: Sequence[TrialRecord], mode: str) -> TrialRecord | None:
    """Returns the complete trial with the highest value, or with the lowest if `mode` is "min".

    Of equal values the first wins. Returns None if no trial is complete.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    sign = -1.0 if mode == "max" else 1.0
    return min(complete, key=lambda t: (sign * (t.value or 0.0), t.number), default=None)


FACTS = ("config", "space", "sampler", "pruner", "metric", "mode", "seed", "steps", "data")


def read_facts(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads study.json; None if it is missing. Raises UserError if it is damaged."""
    path = folder / "study.json"
    if not path.is_file():
        return None
    facts = workdirs.read_json(path)
    if missing := [name for name in FACTS if name not in facts]:
        raise UserError(f"{path} is damaged ({', '.join(missing)} missing)")
    return facts


def make_trial_record(folder: pathlib.Path, trial: Any) -> TrialRecord:
    """Makes a record of a trial of Optuna's."""
    known: Mapping[str, Any] = trial.user_attrs
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    curve = tuple(sorted((step, float(v)) for step, v in trial.intermediate_values.items()))
    value = trial.values[0] if trial.values else None
    seconds = None
    if trial.datetime_start and trial.datetime_complete:
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()
    name = state.get(trial.state.name, "running")
    if name == "pruned" and value is None and curve and math.isfinite(curve[-1][1]):
        value = curve[-1][1]
    return TrialRecord(
        number=trial.number,
        values=dict(known["values"]),
        state=name,
        value=value,
        steps=known.get("steps", 0),
        workdir=folder / "trials" / str(trial.number),
        error=known.get("error", ""),
        fields=dict(known["fields"]),
        curve=curve,
        rungs=known.get("rungs", 0),
        seconds=seconds,
    )
