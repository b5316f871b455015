"""Searches at equal budgets: their curves, on cases that are derived by hand."""

from __future__ import annotations

import csv
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from flax_cnns.config.spaces import log_uniform
from flax_cnns.errors import UserError
from flax_cnns.recipes import common
from flax_cnns.studies.search.tuning import comparison
from flax_cnns.studies.search.tuning.comparison import SearchMethod
from tests.studies.search.tuning.fake_studies import STEPS, score, write_study

METHODS = [SearchMethod("full", "random", "none"), SearchMethod("hyperband", "random", "hyperband")]
SPACE = {"schedule.learning_rate": log_uniform(1e-4, 1.0)}


def make_study(*trials, mode="max"):
    return SimpleNamespace(
        mode=mode,
        trials=[
            SimpleNamespace(steps=steps, state=state, value=value) for steps, state, value in trials
        ],
    )


def test_a_curve_counts_all_steps_and_complete_trials_alone():
    study = make_study(
        (10, "pruned", 0.99),
        (100, "complete", 0.5),
        (3, "failed", None),
        (100, "complete", 0.4),
        (0, "running", None),
        (100, "complete", 0.7),
    )
    spent, best = comparison.compute_curve(study)
    assert spent.tolist() == [10, 110, 113, 213, 313]
    assert math.isnan(best[0])
    assert best[1:].tolist() == [0.5, 0.5, 0.5, 0.7]
    sampled = comparison.sample_curve((spent, best), np.array([0, 109, 110, 312.9, 313, 999]))
    assert np.isnan(sampled[:2]).all()
    assert sampled[2:].tolist() == [0.5, 0.5, 0.7, 0.7]


def test_less_may_be_better():
    study = make_study((1, "complete", 0.5), (1, "complete", 0.7), (1, "complete", 0.1), mode="min")
    assert comparison.compute_curve(study)[1].tolist() == [0.5, 0.5, 0.1]


def test_the_mean_of_seeds_has_the_interval_of_scipy():
    studies = [
        make_study((50, "complete", a), (70, "complete", b)) for a, b in ((1, 2), (3, 5), (2, 3))
    ]
    curve = comparison.average_curves(studies, 100, 100.0)
    middle = np.searchsorted(curve.spent, 50)
    for point, values in ((middle, [100, 300, 200]), (-1, [200, 500, 300])):  # 120 steps in all
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert (curve.mean[point], curve.low[point], curve.high[point]) == pytest.approx(
            (np.mean(values), low, high)
        )
    assert math.isnan(curve.mean[middle - 1])


@pytest.fixture
def calls(monkeypatch):
    made = []

    def tune(config, space, folder, *, seed, sampler, pruner, budget_steps, **options):
        made.append((folder.parent.name, folder.name, config.seed, seed, pruner, budget_steps))
        states = {n: "pruned" for n in range(1, 12) if n % 3} if pruner != "none" else {}
        number = 8 if pruner != "none" else 4  # trials of 40 steps, or of 10 if they are pruned
        kwargs = dict(seed=seed, sampler=sampler, pruner=pruner, states=states, get_score=score)
        write_study(folder, config, space, trials=number, **kwargs)

    monkeypatch.setattr(comparison, "tune", tune)
    return made


def test_a_comparison_runs_each_method_with_each_seed_and_writes_its_curves(tmp_path, calls):
    config = common.get_config()
    config.seed = 7
    options = dict(budget_steps=4 * STEPS, seeds=3, trials=None)
    results = comparison.compare_methods(config, SPACE, tmp_path, METHODS, **options)
    assert [call[:4] for call in calls[:3]] == [
        ("full", "seed0", 7, 0),
        ("hyperband", "seed0", 7, 0),
        ("full", "seed1", 8, 1),
    ]
    assert {call[5] for call in calls} == {4 * STEPS}
    with (tmp_path / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["search"] for line in lines].count("full") == comparison.POINTS
    last = lines[comparison.POINTS - 1]
    for seed, study in enumerate(results[0].studies):
        best = max(trial.value for trial in study.trials)
        assert float(last[f"seed{seed}"]) == pytest.approx(100 * best, abs=1e-3)
    ours, theirs = (
        [max(t.value for t in s.trials if t.state == "complete") for s in r.studies]
        for r in results
    )
    text = (tmp_path / "comparison.md").read_text()
    p = stats.ttest_rel(theirs, ours).pvalue
    difference = 100 * (np.mean(theirs) - np.mean(ours))
    assert f"hyperband minus full, paired over 3 seeds: {difference:+.2f} [" in text
    assert f"p {p:.3f}." in text
    assert "| full | random | none | 3 | 4, 4, 4 | 4, 4, 4 |" in text
    assert (tmp_path / "comparison.png").stat().st_size < 200_000


def test_the_time_that_is_left_is_that_of_searches_that_ran(tmp_path, calls, monkeypatch, capsys):
    """Searches that an earlier command completed say no pace. Each search here takes 100 s."""
    monkeypatch.setattr(comparison, "time", SimpleNamespace(monotonic=lambda: 100.0 * len(calls)))
    monkeypatch.setattr(comparison, "draw_budget_curves", lambda *_, **__: None)
    options = dict(budget_steps=4 * STEPS, trials=None)
    compare = functools.partial(
        comparison.compare_methods, common.get_config(), SPACE, tmp_path, METHODS[:1], **options
    )
    compare(seeds=2)
    assert "1/2 full, seed 0: done; about 0:01:40 left\n2/2 full, seed 1: done\n" in (
        capsys.readouterr().out
    )
    compare(seeds=4)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1/4 full, seed 0: done",
        "2/4 full, seed 1: done",
        "3/4 full, seed 2: done; about 0:01:40 left",
        "4/4 full, seed 3: done",
    ]


def test_trials_of_an_earlier_and_larger_budget_do_not_count(tmp_path):
    write_study(tmp_path / "full" / "seed0", common.get_config(), SPACE, trials=5)
    for budget, trials in ((1, 1), (2 * STEPS, 2), (2 * STEPS + 1, 3), (99 * STEPS, 5)):
        (result,) = comparison.read_comparison(tmp_path, METHODS[:1], 1, budget)
        assert len(result.studies[0].trials) == trials


def test_only_process_0_of_several_prints_and_writes(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "is_writer", lambda: False)
    options = dict(budget_steps=4 * STEPS, seeds=1, trials=None)
    comparison.compare_methods(common.get_config(), SPACE, tmp_path, METHODS[:1], **options)
    assert len(calls) == 1
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_pruner_that_does_not_exist_is_refused_before_the_first_search(tmp_path, calls):
    methods = [METHODS[0], SearchMethod("halvin", "random", "halvin")]
    with pytest.raises(UserError, match="--pruner: unknown 'halvin'; did you mean 'halving'"):
        comparison.compare_methods(common.get_config(), SPACE, tmp_path, methods, budget_steps=1)
    assert calls == []


def test_two_searches_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="two searches have the same name"):
        comparison.compare_methods(
            common.get_config(), SPACE, tmp_path, [METHODS[0]] * 2, budget_steps=1, trials=None
        )
