"""A whole search as its reports see it: its stages, all trials, and the winner's config."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.search.tuning.narrowing import ScoredTrial

NARROWING_FILE = "narrowing.json"  # in the folder of a finer stage


class RankedTrial(NamedTuple):
    """A trial of one of the stages."""

    stage: int  # from 1: coarse
    number: int  # within its stage, from 0
    drawn: Mapping[str, Any]  # {path: drawn value}, the fixed fields of a finer stage included
    state: str  # complete, pruned, failed, unfinished
    value: float | None  # of a pruned trial, its newest
    steps: int  # training steps
    seconds: float | None
    error: str
    workdir: pathlib.Path
    is_staged: bool = False  # whether the search has several stages

    @property
    def name(self) -> str:
        return f"stage {self.stage}, trial {self.number}" if self.is_staged else f"trial {self.number}"


class Stage(NamedTuple):
    """A stage of a search: a study of its own."""

    number: int  # from 1: coarse
    folder: pathlib.Path
    space: dict[str, dict[str, Any]]  # as `describe_space` gives it
    sampler: str
    pruner: str
    seed: int
    trials: tuple[RankedTrial, ...]
    fixed: dict[str, Any]  # {path: drawn value} of fields that are no longer searched
    basis: tuple[int, ...]  # numbers of the coarser stage's trials that made the space

    @property
    def scored(self) -> list[ScoredTrial]:
        return [ScoredTrial(t.number, t.drawn, t.state, t.value) for t in self.trials]


class SearchRecord(NamedTuple):
    """A search: its stages, coarse first."""

    folder: pathlib.Path
    given: ConfigDict  # the config that the search was given
    metric_name: str  # such as validation/best_accuracy
    maximize: bool
    stages: tuple[Stage, ...]

    @property
    def trials(self) -> list[RankedTrial]:
        """The trials of all stages."""
        return [trial for stage in self.stages for trial in stage.trials]

    @property
    def ranked(self) -> list[RankedTrial]:
        """The complete trials, best first. Of equal values, the earlier trial is better."""
        sign = -1 if self.maximize else 1
        complete = [
            trial
            for trial in self.trials
            if trial.state == "complete" and trial.value is not None and math.isfinite(trial.value)
        ]
        return sorted(complete, key=lambda t: (sign * (t.value or 0.0), t.stage, t.number))

    @property
    def best(self) -> RankedTrial | None:
        """The best complete trial; None if there is none."""
        return self.ranked[0] if self.ranked else None

    @property
    def metric(self) -> Metric:
        """The format of the values."""
        name = self.metric_name.rpartition("/")[2].removeprefix("best_")
        return make_metric(name, [t.value for t in self.trials if t.value is not None])

    @property
    def metric_label(self) -> str:
        """The value in words, such as "best validation accuracy"."""
        return f"best validation {self.metric.name}"

    @property
    def winner(self) -> ConfigDict:
        """The best trial's config, tested as the given config is. Raises UserError."""
        best = self.best
        if best is None:
            raise UserError(f"{self.folder}: no trial is complete, so there is no winner")
        config = workdirs.read_config(best.workdir)
        config.train.test_on = self.given.train.test_on
        return config

    @property
    def given_values(self) -> dict[str, Any]:
        """{path: value of the given config} of the searched fields; as drawn, where a choice's
        values are made from what is drawn."""
        flat = configs.flatten(configs.to_plain(self.given))
        values = {}
        for path, each in self.stages[0].space.items():
            if path not in flat:
                continue
            values[path] = flat[path]
            if each["kind"] == "choice" and flat[path] in each.get("to_value", ()):
                values[path] = each["values"][each["to_value"].index(flat[path])]
        return values

    def count_validation_images(self) -> int | None:
        """Returns the number of validation images that the best trial saw; None if unknown."""
        with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
            summary = workdirs.read_json(self.best.workdir / "summary.json")
            return summary["images"]["validation"]
        return None
