"""The importance of fields, against Optuna's own function on a study that Optuna made."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flax_cnns.config.spaces import choice, describe_space, integer, log_uniform, uniform
from flax_cnns.studies.search.tuning.importance import compute_importance
from flax_cnns.studies.search.tuning.narrowing import ScoredTrial

optuna = pytest.importorskip("optuna")

SPACE = {
    "schedule.learning_rate": log_uniform(1e-4, 1.0),
    "optimizer.name": choice("sgd", "adam"),
    "optimizer.momentum": uniform(0.5, 0.99, when={"optimizer.name": "sgd"}),
    "model.width": integer(4, 64, log=True),
    "train.dropout": choice((), (0.1,)),
}


def suggest(trial):
    """Optuna's own draw from the space; returns (drawn values, objective)."""
    rate = trial.suggest_float("schedule.learning_rate", 1e-4, 1.0, log=True)
    drawn = {"schedule.learning_rate": rate}
    drawn["optimizer.name"] = trial.suggest_categorical("optimizer.name", ["sgd", "adam"])
    if drawn["optimizer.name"] == "sgd":
        drawn["optimizer.momentum"] = trial.suggest_float("optimizer.momentum", 0.5, 0.99)
    drawn["model.width"] = trial.suggest_int("model.width", 4, 64, log=True)
    drawn["train.dropout"] = trial.suggest_categorical("train.dropout", ["()", "(0.1,)"])
    return drawn, -((math.log10(rate) + 2) ** 2)


@pytest.mark.parametrize("maximize", [True, False])
def test_the_shares_are_those_of_optuna(maximize):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize" if maximize else "minimize",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    sign, trials = 1 if maximize else -1, []

    def objective(trial):
        drawn, value = suggest(trial)
        drawn["train.dropout"] = [] if drawn["train.dropout"] == "()" else [0.1]
        trials.append(ScoredTrial(trial.number, drawn, "complete", sign * value))
        return sign * value

    study.optimize(objective, n_trials=25)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=5 / 25)
    expected = optuna.importance.get_param_importances(study, evaluator=evaluator)
    table = compute_importance(describe_space(SPACE), trials, maximize=maximize, shuffles=20)
    assert {row.path: row.share for row in table.rows} == pytest.approx(expected)
    assert (table.targets, table.trials) == (5, 25)
    first, *others = table.rows
    assert first.path == "schedule.learning_rate"  # the objective depends on it alone
    assert first.is_above_chance
    assert sum(row.share for row in others) < 0.3


def test_without_an_effect_a_share_is_above_chance_once_in_twenty():
    """The definition of the mark: 95 % of shuffled searches stay below."""
    random = np.random.default_rng(1)
    space = {f"own.x.f{i}": uniform(0.0, 1.0) for i in range(2)}
    above = []
    for _ in range(10):
        trials = [
            ScoredTrial(i, {path: random.uniform() for path in space}, "complete", random.uniform())
            for i in range(15)
        ]
        table = compute_importance(describe_space(space), trials, shuffles=20)
        above += [row.is_above_chance for row in table.rows]
    assert sum(above) <= 5  # binomial(20, 0.05): more than 5 once in 3,000


def test_few_trials_and_equal_values_give_no_importance():
    drawn = {"own.x.f": 0.5}
    space = describe_space({"own.x.f": uniform(0.0, 1.0)})
    nine = [ScoredTrial(i, drawn, "complete", float(i)) for i in range(9)]
    assert compute_importance(space, nine) is None
    pruned = [ScoredTrial(9 + i, drawn, "pruned", float(i)) for i in range(9)]
    assert compute_importance(space, [*nine, *pruned]) is None
    equal = [ScoredTrial(i, drawn, "complete", 1.0) for i in range(20)]
    assert compute_importance(space, equal) is None
