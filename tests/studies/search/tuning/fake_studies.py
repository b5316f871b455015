"""Writes the folder of a search without training: Optuna's journal, and the runs' small files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.config.flat import set_field
from flax_cnns.config.spaces import describe_space
from flax_cnns.studies.ablation.plan import apply_overrides
from flax_cnns.studies.search.tuning.samplers import Sampler
from flax_cnns.studies.search.tuning.storage import Journal

STEPS = 40  # of a complete trial


def score(values: Mapping[str, Any]) -> float:
    """A validation accuracy that depends on the learning rate alone: 0.9 at 0.01."""
    return 0.9 - 0.05 * (math.log10(values["schedule.learning_rate"]) + 2) ** 2


@mock.patch("os.fsync", mock.Mock())
def write_study(
    folder,
    config,
    space,
    *,
    trials: int,
    mode: str = "max",
    metric: str = "validation/accuracy",
    seed: int = 0,
    sampler: str = "random",
    pruner: str = "none",
    get_score: Callable[[Mapping[str, Any]], float] = score,
    states: Mapping[int, str] | None = None,
) -> list[Any]:
    """Writes a study or adds trials to it, up to `trials`. Returns their records.

    `states`: {number: state} of the trials that are not complete.
    """
    tested = config
    config = apply_overrides(config, {"train.test_on": "never"})
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = dict(
        config=configs.to_plain(config), space=describe_space(space), metric=metric
    )
    facts |= dict(sampler=sampler, pruner=pruner, mode=mode, seed=seed, steps=STEPS, data={})
    files.write_json(folder / "study.json", facts | {"given": configs.to_plain(tested)})
    journal = Journal(folder, mode, space)
    for number in range(len(journal.read()), trials):
        drawing = Sampler("random", config, space, seed).draw(number)
        record = journal.create(drawing.params, drawing.values, drawing.fields)
        value, state = get_score(drawing.values), (states or {}).get(number, "complete")
        if state == "running":
            continue
        ended = record._replace(state=state, value=value, steps=STEPS, curve=((STEPS, value),))
        if state == "pruned":
            ended = ended._replace(steps=STEPS // 4, curve=((STEPS // 4, value),))
        if state == "failed":
            ended = ended._replace(value=None, steps=3, curve=(), error="diverged: step 3 is bad")
        journal.finish(ended)
        with contextlib.suppress(FileExistsError):
            record.workdir.mkdir(parents=True)
        plain = configs.to_plain(config)
        for path, field in drawing.fields.items():
            set_field(plain, path, field)
        files.write_json(record.workdir / "config.json", plain)
        files.write_json(record.workdir / "summary.json", {"images": {"validation": 360}})
    return journal.read()
