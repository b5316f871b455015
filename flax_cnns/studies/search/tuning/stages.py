"""Coarse to fine: a search in stages, each a study of its own, with a narrower space each time.

Stage 1 is the study in WORKDIR. Stage 2 is in WORKDIR/stage2; WORKDIR/stage2.json says which trials
of stage 1 its space is made of (`narrowing`), and which fields it no longer searches. Trials and
training steps are divided equally between the stages. When a stage has begun, the coarser one gets
no more trials; a later command with more trials gives them to the last stage.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from flax_cnns.config.spaces import Distribution, find_never_drawn
from flax_cnns.errors import UserError
from flax_cnns.files import write_json
from flax_cnns.studies.ablation import plan
from flax_cnns.studies.search.tuning.narrowing import (
    NarrowedSpace,
    ScoredTrial,
    narrow_space,
    select_best,
)
from flax_cnns.studies.search.tuning.reading import read_study
from flax_cnns.studies.search.tuning.search_record import (
    get_narrowing_path,
    get_stage_folder,
    has_stage,
    read_narrowing,
)
from flax_cnns.studies.search.tuning.tuner import is_writer, tune

MIN_STAGE_TRIALS = 5  # fewer trials in a stage are a mistake


def tune_in_stages(
    config: ConfigDict,
    space: Mapping[str, Distribution],
    folder: str | os.PathLike,
    *,
    stages: int,
    trials: int | None,
    budget_steps: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> None:
    """Runs the stages of a search. `trials` and `budget_steps` are of all stages together; None is
    no limit.

    The draws of stage 1 have the seed `seed` (None: the config's), those of stage 2 `seed + 1`, and
    so on: with one seed for all, each stage would draw the same places of its ranges. `options` are
    those of `tune`. Raises UserError for fewer than 5 trials a stage, and if the folder has more
    stages than `stages`.
    """
    folder = pathlib.Path(folder)
    seed = config.seed if seed is None else seed
    check_stages(stages, trials)
    if has_stage(folder, stages + 1):
        raise UserError(
            f"{folder} has more stages than {stages}; give --stages={_count_stages(folder)}"
        )
    for number in range(1, stages + 1):
        place = get_stage_folder(folder, number)
        if number > 1:
            config, space = _make_finer(config, space, folder, number)
        left = stages - number + 1
        if number == stages or not has_stage(folder, number + 1):
            share = budget_steps if budget_steps is None else max(budget_steps // left, 1)
            options |= dict(
                trials=trials if trials is None else max(trials // left, 1), budget_steps=share
            )
            tune(config, space, place, **options, seed=seed + number - 1)
        study = read_study(place)
        if trials is not None:
            trials -= len(study.trials)
        if budget_steps is not None:
            budget_steps -= sum(trial.steps for trial in study.trials)


def check_stages(stages: int, trials: int | None) -> None:
    """Raises UserError for fewer than 5 trials a stage."""
    if trials is not None and trials < MIN_STAGE_TRIALS * stages:
        raise UserError(
            f"--stages={stages}: expected at least {MIN_STAGE_TRIALS} trials a stage, so"
            f" --trials={MIN_STAGE_TRIALS * stages} or more, got {trials}"
        )


def _count_stages(folder: pathlib.Path) -> int:
    number = 1
    while has_stage(folder, number + 1):
        number += 1
    return number


def _make_finer(
    config: ConfigDict, space: Mapping[str, Distribution], folder: pathlib.Path, number: int
) -> tuple[ConfigDict, dict[str, Distribution]]:
    """Returns the config and the space of stage `number`, and records how they were made.

    A stage that has begun keeps the trials that it was made of.
    """
    coarse = read_study(get_stage_folder(folder, number - 1))
    scored = [
        ScoredTrial(t.number, t.values, t.state, math.nan if t.value is None else t.value)
        for t in coarse.trials
    ]
    if has_stage(folder, number):
        basis = read_narrowing(folder, number)["basis"]
        narrowed = narrow_space(
            space, [trial for n in basis for trial in scored if trial.number == n]
        )
    else:
        narrowed = narrow_space(space, select_best(scored, maximize=coarse.mode == "max"))
        if is_writer():
            made = {"basis": narrowed.basis, "fixed": narrowed.fixed}
            write_json(get_narrowing_path(folder, number), made)
    config = set_fixed_fields(config, space, narrowed)
    idle = find_never_drawn(config, narrowed.space)
    return config, {path: each for path, each in narrowed.space.items() if path not in idle}


def set_fixed_fields(
    config: ConfigDict, space: Mapping[str, Distribution], narrowed: NarrowedSpace
) -> ConfigDict:
    """Returns the config with the fields that have one value left. Fields that lose their effect
    get their defaults."""
    values = {path: space[path].make_value(drawn) for path, drawn in narrowed.fixed.items()}
    return plan.apply_overrides(config, values) if values else config
