"""Reads the outcome of tuning a row of an ablation: ROW/tuned.json. Needs no Optuna."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs

_REPAIR = "remove it, and the same command makes it again from the row's trials"


class TunedTrial(NamedTuple):
    """One trial of a row."""

    number: int  # from 0
    values: dict[str, Any]  # {path: drawn value}
    fields: dict[str, Any]  # {path: the field's value}
    state: str  # complete, failed, pruned
    validation: float | None  # the score; None if the trial is not complete
    error: str = ""


class TunedRow(NamedTuple):
    """The outcome of a row's trials."""

    name: str
    space: dict[str, Any]  # as `describe_space` describes it
    metric: str  # of the validation split, such as validation/accuracy
    mode: str  # max or min
    trials: list[TunedTrial]
    best: int | None  # the number of the best trial; None if no trial is complete
    has_untuned: bool  # whether trial 0 is the row's own config
    config: Mapping[str, Any] = {}  # of the trials, as plain data
    data: Mapping[str, Any] = {}  # fingerprint of the data of the trials; {} if unknown

    @property
    def chosen(self) -> TunedTrial | None:
        """The best trial, whose values the row's cells have."""
        return next((trial for trial in self.trials if trial.number == self.best), None)


def read_tuned_row(folder: pathlib.Path, name: str) -> TunedRow | None:
    """Reads ROW/tuned.json; None if the row is not tuned. Raises UserError if it is damaged."""
    path = folder / name / "tuned.json"
    if not path.is_file():
        return None
    known = workdirs.read_json(path)
    try:
        trials = [TunedTrial(**trial) for trial in known["trials"]]
        names = ("space", "metric", "mode", "best", "has_untuned", "config")
        fields = {field: known[field] for field in names}
        return TunedRow(name=name, trials=trials, data=known.get("data", {}), **fields)
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error}; {_REPAIR}") from None
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}); {_REPAIR}") from None
