"""How important each field was to reach the best trials: Optuna's PED-ANOVA.

Watanabe et al. 2023 (https://arxiv.org/abs/2304.10255), as in `optuna.importance`: the Pearson
divergence between a field's values in the best trials and in all complete trials, each as a Parzen
estimate. Optuna's version for conditional fields weights it by how often the field was drawn.

A few dozen trials make large importances by chance. Therefore the values of the trials are shuffled
`SHUFFLES` times and the importance is computed for each: a field without an effect stays below the
95 % quantile of these in 95 % of all searches.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_cnns.studies.search.tuning.narrowing import ScoredTrial
from flax_cnns.studies.search.tuning.storage import import_optuna

MIN_TRIALS = 10  # complete ones; fewer say nothing
MIN_TARGETS = 5  # trials among the best, as Optuna recommends
TARGET_QUANTILE = 0.1  # Optuna's default, if it has that many trials
SHUFFLES = 100
CHANCE_LEVEL = 0.95


class Importance(NamedTuple):
    """The importance of a field."""

    path: str
    share: float  # of the sum over all fields
    chance: float  # the 95 % quantile under shuffled values, as a share of the same sum

    @property
    def is_above_chance(self) -> bool:
        return self.share > self.chance


class ImportanceTable(NamedTuple):
    """The importance of all fields, most important first."""

    rows: tuple[Importance, ...]
    targets: int  # best trials
    trials: int  # complete trials


def compute_importance(
    space: Mapping[str, Mapping[str, Any]],
    trials: Sequence[ScoredTrial],
    *,
    maximize: bool = True,
    shuffles: int = SHUFFLES,
) -> ImportanceTable | None:
    """Computes the importance of the fields of a space, as `config.spaces.describe_space` gives it.

    Returns None if fewer than `MIN_TRIALS` trials are complete, or if all have the same value.
    """
    complete = [t for t in trials if t.state == "complete" and math.isfinite(t.value)]
    values = np.array([trial.value for trial in complete], float)
    if len(complete) < MIN_TRIALS or not np.ptp(values):
        return None
    quantile = max(TARGET_QUANTILE, min(0.5, MIN_TARGETS / len(complete)))
    study = _make_study(space, complete, maximize)
    raw = _evaluate(study, space, quantile)
    total = sum(raw.values())
    if not total:
        return None
    generator = np.random.default_rng(0)
    losses = -values if maximize else values
    shuffled = [
        _evaluate(study, space, quantile, generator.permutation(losses)) for _ in range(shuffles)
    ]
    chance = {
        path: float(np.quantile([each[path] for each in shuffled], CHANCE_LEVEL)) if shuffled else 0
        for path in raw
    }
    rows = [Importance(path, raw[path] / total, chance[path] / total) for path in raw]
    targets = math.ceil(quantile * len(complete))
    return ImportanceTable(
        tuple(sorted(rows, key=lambda row: (-row.share, row.path))), targets, len(complete)
    )


def _make_study(
    space: Mapping[str, Mapping[str, Any]], trials: Sequence[ScoredTrial], maximize: bool
) -> Any:
    """Returns an optuna.Study in memory with these trials, numbered from 0."""
    optuna = import_optuna()
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    distributions = {path: _make_distribution(each) for path, each in space.items()}
    for trial in trials:
        params = {
            path: _make_parameter(space[path], drawn)
            for path, drawn in trial.drawn.items()
            if path in space
        }
        known = {path: distributions[path] for path in params}
        study.add_trial(
            optuna.create_trial(params=params, distributions=known, value=float(trial.value))
        )
    return study


def _evaluate(
    study: Any,
    space: Mapping[str, Any],
    quantile: float,
    losses: np.ndarray | None = None,
) -> dict[str, float]:
    """Returns {path: Optuna's importance, not normalized}.

    With `losses` [trials], these take the place of the trials' values; less is better.
    """
    optuna = import_optuna()
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    target = None if losses is None else lambda trial: float(losses[trial.number])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the target, which is a loss as it must be
        known = optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=target, normalize=False
        )
    return {path: float(known.get(path, 0.0)) for path in space}


def _make_distribution(each: Mapping[str, Any]) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if each["kind"] == "choice":
        return CategoricalDistribution(tuple(map(json.dumps, each["values"])))
    if each["kind"] == "integer":
        return IntDistribution(int(each["low"]), int(each["high"]), log=each["log"])
    return FloatDistribution(each["low"], each["high"], log=each["log"])


def _make_parameter(each: Mapping[str, Any], drawn: Any) -> Any:
    return json.dumps(drawn) if each["kind"] == "choice" else drawn
