"""A whole search as its reports see it: its stages, all trials, and the winner's config."""

from __future__ import annotations

import contextlib
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
from flax_cnns.studies.search.tuning.reading import read_study
from flax_cnns.studies.search.tuning.records import StudyRecord, TrialRecord
from flax_cnns.studies.search.tuning.winner import make_winner_config


class RankedTrial(NamedTuple):
    """A trial of one of the stages."""

    stage: int  # from 1: coarse
    number: int  # within its stage, from 0
    drawn: Mapping[str, Any]  # {path: drawn value}, the fixed fields of a finer stage included
    state: str  # complete, pruned, failed, running
    value: float  # of a pruned trial, its newest; NaN if there is none
    steps: int  # training steps
    seconds: float | None
    error: str
    workdir: pathlib.Path
    is_staged: bool = False  # whether the search has several stages

    @property
    def name(self) -> str:
        trial = f"trial {self.number}"
        return f"stage {self.stage}, {trial}" if self.is_staged else trial


class SearchStage(NamedTuple):
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
    metric_name: str  # such as validation/accuracy
    maximize: bool
    stages: tuple[SearchStage, ...]

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
            if trial.state == "complete" and math.isfinite(trial.value)
        ]
        return sorted(complete, key=lambda t: (sign * t.value, t.stage, t.number))

    @property
    def best(self) -> RankedTrial | None:
        """The best complete trial; None if there is none."""
        return self.ranked[0] if self.ranked else None

    @property
    def metric(self) -> Metric:
        """The format of the values."""
        name = self.metric_name.removeprefix("validation/")
        return make_metric(name, [trial.value for trial in self.trials])

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
        return make_winner_config(self.given, workdirs.read_config(best.workdir))

    @property
    def given_values(self) -> dict[str, Any]:
        """{path: value of the given config} of the searched fields whose condition it meets.

        If a choice's values are made of what is drawn, the drawn value.
        """
        flat = configs.flatten(configs.to_plain(self.given))
        values = {}
        for path, each in self.stages[0].space.items():
            conditions = each.get("when", {}).items()
            if path not in flat or any(flat.get(name) not in known for name, known in conditions):
                continue
            values[path] = flat[path]
            if each["kind"] == "choice" and flat[path] in each.get("to_value", ()):
                values[path] = each["values"][each["to_value"].index(flat[path])]
        return values

    def count_validation_images(self) -> int | None:
        """Returns the number of validation images that the best trial saw; None if unknown."""
        if self.best is None:
            return None
        with contextlib.suppress(UserError, KeyError, TypeError):
            return workdirs.read_json(self.best.workdir / "summary.json")["images"]["validation"]
        return None


def read_search(folder: str | os.PathLike) -> SearchRecord:
    """Reads a search and its finer stages, also while it runs.

    Raises UserError if there is no search, if its files are damaged, or if Optuna is missing.
    """
    folder = pathlib.Path(folder)
    studies = [read_study(folder)]
    narrowings: list[dict[str, Any]] = [{"fixed": {}, "basis": []}]
    while has_stage(folder, number := len(studies) + 1):
        finer = get_stage_folder(folder, number)
        if not (finer / "study.json").is_file():
            break  # it was stopped before its first trial
        narrowed = read_narrowing(folder, number)
        narrowings.append(narrowed | {"fixed": narrowings[-1]["fixed"] | narrowed["fixed"]})
        studies.append(read_study(finer))
    stages = [
        _make_stage(number, study, narrowed, len(studies) > 1)
        for number, (study, narrowed) in enumerate(zip(studies, narrowings), 1)
    ]
    first = studies[0]
    return SearchRecord(folder, first.given, first.metric, first.mode == "max", tuple(stages))


def get_stage_folder(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Returns the folder of a stage: the search's own for stage 1, WORKDIR/stage2 for stage 2."""
    return folder if number == 1 else folder / f"stage{number}"


def has_stage(folder: pathlib.Path, number: int) -> bool:
    """Whether a finer stage has begun: whether its space was made."""
    return get_narrowing_path(folder, number).is_file()


def get_narrowing_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Returns the file that says how the space of stage `number` was made."""
    return folder / f"stage{number}.json"


def read_narrowing(folder: pathlib.Path, number: int) -> dict[str, Any]:
    """Reads how the space of a finer stage was made. Raises UserError if the file is damaged."""
    path = get_narrowing_path(folder, number)
    narrowed = workdirs.read_json(path)
    if missing := {"fixed", "basis"} - set(narrowed):
        raise UserError(f"{path} is damaged ({', '.join(sorted(missing))} missing)")
    return narrowed


def _make_stage(
    number: int, study: StudyRecord, narrowed: Mapping[str, Any], is_staged: bool
) -> SearchStage:
    def make_trial(trial: TrialRecord) -> RankedTrial:
        return RankedTrial(
            stage=number,
            number=trial.number,
            drawn={**narrowed["fixed"], **trial.values},
            state=trial.state,
            value=math.nan if trial.value is None else trial.value,
            steps=trial.steps,
            seconds=trial.seconds,
            error=trial.error,
            workdir=trial.workdir,
            is_staged=is_staged,
        )

    return SearchStage(
        number=number,
        folder=study.folder,
        space=study.space,
        sampler=study.sampler,
        pruner=study.pruner,
        seed=study.seed,
        trials=tuple(map(make_trial, study.trials)),
        fixed=dict(narrowed["fixed"]),
        basis=tuple(narrowed["basis"]),
    )
