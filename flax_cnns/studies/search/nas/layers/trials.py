"""The trials of a search of layers: the lines of METHOD/trials.jsonl."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from flax_cnns import files
from flax_cnns.errors import UserError

METHODS = ("controller", "random")


class LayersTrial(NamedTuple):
    """A line of trials.jsonl: a proposed network and its reward."""

    number: int  # from 0
    decisions: tuple[int, ...]
    name: str  # of its run
    accuracies: list[float]  # of the last validations
    reward: float
    params: int
    seconds: float  # of training; 0 if unknown
    error: str = ""


def read_trials(folder: str | os.PathLike, method: str) -> list[LayersTrial]:
    """Reads the trials of a method, in order; [] if it has none. Raises UserError if damaged."""
    path = pathlib.Path(folder, method, "trials.jsonl")
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        trials = [LayersTrial(**row | {"decisions": tuple(row["decisions"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it: no network trains again"
        ) from None
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise UserError(f"{path} is damaged: expected the trials 0 to {len(trials) - 1} in order")
    return trials


def find_best(trials: Sequence[LayersTrial]) -> LayersTrial:
    """Returns the trial with the highest reward; of equal ones the smallest, then the first."""
    return max(trials, key=lambda trial: (trial.reward, -trial.params, -trial.number))


def write_trials(folder: str | os.PathLike, method: str, trials: Sequence[LayersTrial]) -> None:
    """Writes the trials of a method atomically."""
    path = pathlib.Path(folder, method, "trials.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(trial._asdict(), allow_nan=False) for trial in trials]
    files.write_text(path, "\n".join(lines) + "\n")
