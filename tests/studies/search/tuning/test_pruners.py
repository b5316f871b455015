"""The pruners against Optuna's, trial by trial, and that decisions depend on the log alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import optuna
import pytest

from flax_cnns.errors import UserError
from flax_cnns.studies.search.tuning.pruners import REDUCTION, STARTUP_TRIALS, WARMUP, Pruner
from flax_cnns.studies.search.tuning.records import TrialRecord
from flax_cnns.studies.search.tuning.storage import STUDY_NAME

STEPS, EVERY = 90, 3


def make_curves(number, seed=0):
    """Learning curves with a level, a speed, noise, and here and there a NaN."""
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(number):
        level, speed = rng.uniform(0.3, 1.0), rng.uniform(5, 60)
        steps = range(EVERY, STEPS + 1, EVERY)
        values = [level * (1 - math.exp(-s / speed)) + rng.normal(0, 0.03) for s in steps]
        if rng.random() < 0.1:
            values[int(rng.integers(len(values)))] = math.nan
        curves.append(list(zip(steps, values)))
    return curves


def simulate(pruner, curves):
    """Runs our pruner over trials one after the other. Returns the records."""
    records = []
    for number, curve in enumerate(curves):
        decision = pruner.decide(number, curve, records, STEPS)
        at = decision.prune_at
        seen = tuple(point for point in curve if at is None or point[0] <= at)
        state = "complete" if at is None else "pruned"
        record = TrialRecord(number, {}, state, seen[-1][1], seen[-1][0], Path())
        records.append(record._replace(curve=seen, rungs=decision.rungs))
    return records


def simulate_optuna(pruner, curves, direction):
    """Returns where Optuna's pruner stops each trial; None if it does not."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name=STUDY_NAME, pruner=pruner, direction=direction)
    stops = []
    for curve in curves:
        trial, stop = study.ask(), None
        for step, value in curve:
            trial.report(value, step)
            if step < STEPS and trial.should_prune():
                stop = step
                break
        state = optuna.trial.TrialState.COMPLETE if stop is None else optuna.trial.TrialState.PRUNED
        final = curve[-1][1] if stop is None else None
        study.tell(trial, 0.0 if final is not None and math.isnan(final) else final, state=state)
        stops.append(stop)
    return stops


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("name", ["median", "halving", "hyperband"])
def test_trials_are_pruned_where_optuna_prunes_them(name, mode):
    curves = make_curves(60)
    if mode == "min":
        curves = [[(step, -value) for step, value in curve] for curve in curves]
    ours = Pruner(name, mode, STEPS, EVERY)
    assert ours.first_rung == 3
    theirs = {
        "median": lambda: optuna.pruners.MedianPruner(
            n_startup_trials=STARTUP_TRIALS, n_warmup_steps=math.ceil(WARMUP * STEPS)
        ),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=3, reduction_factor=REDUCTION
        ),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(
            min_resource=3, max_resource=STEPS, reduction_factor=REDUCTION
        ),
    }[name]()
    expected = simulate_optuna(theirs, curves, "maximize" if mode == "max" else "minimize")
    records = simulate(ours, curves)
    got = [record.steps if record.state == "pruned" else None for record in records]
    assert got == expected
    assert sum(stop is not None for stop in got) > 10
    assert got.count(None) > 1


@pytest.mark.parametrize("name", ["median", "halving", "hyperband"])
def test_what_a_run_logged_after_the_decision_changes_nothing(name):
    curves = make_curves(30, seed=1)
    pruner = Pruner(name, "max", STEPS, EVERY)
    records = simulate(pruner, curves)
    for record, curve in zip(records, curves):
        others = records[: record.number]
        for length in range(1, len(curve) + 1):
            decision = pruner.decide(record.number, curve[:length], others, STEPS)
            reached = curve[length - 1][0]
            if record.state == "pruned" and reached >= record.steps:
                assert decision == (record.steps, record.rungs)
            else:
                assert decision.prune_at is None


def test_the_rungs_of_halving_by_hand():
    """First rung 10 of 270 steps, a third goes on: of 3 values the best, of 6 the best two."""
    pruner = Pruner("halving", "max", 270, 10)

    def record(number, *values, state="running", rungs=0):
        curve = tuple((10 * 3**i, value) for i, value in enumerate(values))
        return TrialRecord(number, {}, state, None, 0, Path(), curve=curve, rungs=rungs)

    others = [record(0, 0.5), record(1, 0.7, state="pruned", rungs=1)]
    assert pruner.decide(2, [(10, 0.69)], others, 270) == (10, 1)
    assert pruner.decide(2, [(10, 0.7)], others, 270) == (None, 1)
    more = [*others, record(3, 0.9), record(4, 0.1), record(5, 0.2)]
    assert pruner.decide(2, [(10, 0.7)], more, 270) == (None, 1)
    assert pruner.decide(2, [(10, 0.6)], more, 270) == (10, 1)
    # one validation may reach two rungs, and the next trial counts in both
    assert pruner.decide(6, [(35, 0.95)], more, 270) == (None, 2)
    assert pruner.decide(6, [(35, math.nan)], more, 270) == (35, 0)
    # a trial that was pruned at its first rung is no rival at the second
    pruned = record(7, 0.99, 0.99, state="pruned", rungs=1)
    assert pruner.decide(6, [(10, 1.0), (30, 0.3)], [pruned], 270) == (None, 2)
    # the last step never prunes
    assert pruner.decide(2, [(270, 0.0)], more, 270).prune_at is None


def test_the_brackets_of_hyperband():
    """R/r = 27: brackets 0 to 3, whose shares are ceil(4 * 3^s / (s + 1)) for s = 3, 2, 1, 0."""
    pruner = Pruner("hyperband", "max", 270, 10)
    assert pruner.brackets == 4
    brackets = [pruner.get_bracket(number) for number in range(4000)]
    shares = np.array([27, 12, 6, 4]) / 49
    np.testing.assert_allclose(np.bincount(brackets) / 4000, shares, atol=0.03)


def test_trials_with_other_steps_are_compared_at_their_newest_validation():
    pruner = Pruner("median", "max", 100, 10)
    others = [
        TrialRecord(n, {}, "complete", 0.9, 100, Path(), curve=((12, 0.5), (24, 0.8)))
        for n in range(5)
    ]
    assert pruner.decide(9, [(20, 0.45)], others, 100).prune_at == 20
    assert pruner.decide(9, [(20, 0.55)], others, 100).prune_at is None
    assert pruner.decide(9, [(25, 0.55)], others, 100).prune_at == 25
    assert pruner.decide(9, [(20, 0.45)], others[:4], 100).prune_at is None


def test_an_unknown_pruner_is_refused():
    with pytest.raises(UserError, match=r"unknown 'hyperbandd'; did you mean 'hyperband'"):
        Pruner("hyperbandd", "max", 10, 1)
