"""Draws against Optuna's and SciPy's own, and what a draw depends on."""

from __future__ import annotations

import warnings

import numpy as np
import optuna
import pytest
from scipy.stats import kstest, qmc

from configs.common import get_config
from flax_cnns.config.spaces import choice, integer, log_uniform, uniform
from flax_cnns.errors import UserError
from flax_cnns.studies.search.tuning.samplers import (
    Sampler,
    list_grid_values,
    make_seed,
    place,
)
from flax_cnns.studies.search.tuning.storage import Journal, make_optuna_distribution

SPACE = {
    "schedule.learning_rate": log_uniform(1e-4, 1.0),
    "optimizer.name": choice("adam", "sgd"),
    "optimizer.momentum": uniform(0.5, 0.99, when={"optimizer.name": "sgd"}),
    "data.batch_size": integer(8, 64, log=True),
}


def draw_all(name, numbers, space=SPACE, seed=0, journal=None):
    sampler = Sampler(name, get_config(), space, seed)
    return [sampler.draw(number, journal).values for number in numbers]


@pytest.mark.parametrize("name", ["random", "qmc", "grid"])
def test_a_draw_depends_on_the_seed_and_the_trial_and_not_on_earlier_draws(name):
    values = draw_all(name, range(8))
    assert draw_all(name, [7, 3, 3]) == [values[7], values[3], values[3]]
    assert draw_all(name, range(8), seed=1) != values
    for drawn in values:
        assert ("optimizer.momentum" in drawn) == (drawn["optimizer.name"] == "sgd")


def test_draws_of_one_trial_are_independent_and_have_the_distribution():
    """Kolmogorov-Smirnov against the closed form, and correlation between two fields."""
    seeds = {make_seed(0, n, path) for n in range(300) for path in ("a", "b")}
    assert len(seeds) == 600
    space = {"schedule.learning_rate": log_uniform(1e-4, 1.0), "mix.mixup": uniform(0.0, 2.0)}
    values = draw_all("random", range(300), space)
    rates = np.log10([v["schedule.learning_rate"] for v in values]) / 4 + 1
    mixups = np.array([v["mix.mixup"] for v in values]) / 2
    assert kstest(rates, "uniform").pvalue > 0.01
    assert kstest(mixups, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(rates, mixups)[0, 1]) < 0.15


def test_qmc_points_are_those_of_optuna_and_scipy(monkeypatch):
    """Optuna draws its first trial at random and keeps a counter in the study; from then on its
    points are ours. It passes its seed to SciPy's older argument, which seeds another generator."""
    space = {k: v for k, v in SPACE.items() if k != "optimizer.momentum"}
    space["mix.mixup"] = uniform(0.0, 2.0)
    sobol = qmc.Sobol
    monkeypatch.setattr(
        qmc, "Sobol", lambda d, scramble, seed=None, rng=None: sobol(d, rng=rng or seed)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.QMCSampler(seed=3, scramble=True)
    study = optuna.create_study(sampler=sampler)
    distributions = {path: make_optuna_distribution(each) for path, each in space.items()}
    theirs = []
    for _ in range(9):
        trial = study.ask(distributions)
        theirs.append(trial.params)
        study.tell(trial, 0.0)
    ours = draw_all("qmc", range(8), space, seed=3)
    for a, b in zip(ours, theirs[1:]):
        assert (a["data.batch_size"], a["optimizer.name"]) == (
            b["data.batch_size"],
            b["optimizer.name"],
        )
        for path in ("schedule.learning_rate", "mix.mixup"):
            assert a[path] == pytest.approx(b[path], rel=1e-12)
    # The first 8 points of a Sobol sequence have one in each eighth of each axis.
    cells = np.log10([a["schedule.learning_rate"] for a in ours]) / 4 + 1
    assert sorted(np.floor(8 * cells)) == list(range(8))


def test_integers_and_choices_are_equally_likely():
    at = (np.arange(1200) + 0.5) / 1200
    for each, values in ((integer(3, 6), [3, 4, 5, 6]), (choice("a", 2, None), ["a", "2", "null"])):
        drawn = [place(each, a) for a in at]
        assert [drawn.count(value) for value in values] == [1200 // len(values)] * len(values)
    assert place(log_uniform(1e-4, 1.0), 1.0) == 1.0
    assert place(log_uniform(1e-4, 1.0), 0.5) == pytest.approx(1e-2)


def test_the_grid_has_every_combination_once():
    space = {
        "optimizer.name": choice("adam", "sgd"),
        "optimizer.momentum": uniform(0.5, 0.9, when={"optimizer.name": "sgd"}),
        "data.batch_size": integer(8, 10),
    }
    sampler = Sampler("grid", get_config(), space, 0)
    count = sampler.count_points()
    assert count == (1 + 5) * 3
    points = [tuple(sampler.draw(n).values.items()) for n in range(count)]
    assert len(set(points)) == count
    momenta = {dict(p).get("optimizer.momentum") for p in points}
    assert momenta == {None, 0.5, 0.6, 0.7, 0.8, 0.9}
    assert list_grid_values(log_uniform(1e-4, 1.0)) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])
    wide = {f"own.a.field{i}": uniform(0, 1) for i in range(6)}
    with pytest.raises(UserError, match="more than 10,000 points"):
        Sampler("grid", get_config(), wide, 0).count_points()


def test_tpe_draws_what_optuna_draws_from_the_same_trials(tmp_path):
    """An optuna.Study with a sampler of the same seed suggests the same values."""
    sampler = Sampler("tpe", get_config(), SPACE, 7)
    journal = Journal(tmp_path, "max", SPACE)
    rng = np.random.default_rng(0)
    for number in range(14):
        drawing = sampler.draw(number, journal)
        record = journal.create(drawing.params, drawing.values, drawing.fields)
        state = "pruned" if number % 5 == 4 else "complete"
        curve = ((5, float(rng.random())),)
        journal.finish(record._replace(state=state, value=float(rng.random()), curve=curve))
    drawing = sampler.draw(14, journal)

    study = optuna.create_study(direction="maximize")
    study.add_trials(journal.load_study().get_trials())
    trial = study.ask()
    assert trial.number == 14
    for path, value in drawing.params.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study.sampler = optuna.samplers.TPESampler(
                seed=make_seed(7, 14, path), multivariate=False, constant_liar=True
            )
        assert trial._suggest(path, journal.distributions[path]) == value
    # and other values without the history: TPE has begun to use it
    assert drawing.values != sampler.draw(14).values
    # A running trial at the same time is not tried again.
    journal.create(drawing.params, drawing.values, drawing.fields)
    assert sampler.draw(15, journal).values != drawing.values


def test_the_first_trials_may_be_given():
    first = [{"optimizer.name": "sgd", "optimizer.momentum": 0.9}]
    space = {k: SPACE[k] for k in ("optimizer.name", "optimizer.momentum")}
    sampler = Sampler("grid", get_config(), space, 0, first)
    assert sampler.draw(0).values == first[0]
    points = [sampler.draw(n).values for n in range(1, sampler.count_points())]
    assert len(points) == 6
    assert points == [Sampler("grid", get_config(), space, 0).draw(n).values for n in range(6)]
    part = Sampler("random", get_config(), SPACE, 0, [{"optimizer.name": "adam"}]).draw(0)
    assert set(part.values) == set(SPACE) - {"optimizer.momentum"}
    with pytest.raises(UserError, match=r"a first trial has optimizer\.momentum=2"):
        Sampler("tpe", get_config(), SPACE, 0, [{"optimizer.momentum": 2}])


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UserError, match=r"unknown 'tpee'; did you mean 'tpe'"):
        Sampler("tpee", get_config(), SPACE, 0)
