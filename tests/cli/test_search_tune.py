"""What `search tune` does by its flags, with searches that are not run."""

from __future__ import annotations

import types

import jax
import pytest

from configs import search_digits
from flax_cnns.cli import search_tune
from flax_cnns.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError
from flax_cnns.runtime import cluster, launch
from flax_cnns.studies.search.tuning import (
    comparison,
    report,
    search_record,
    stages,
    tuner,
    winner,
)

DEFAULTS = dict(workdir="runs/x", trials=None, budget=2.0, sampler="tpe", pruner="none", seeds=0)
DEFAULTS |= dict(metric="auto", jobs=None, seed=None, stages=1, report=False, compare=[])
DEFAULTS |= {"dry-run": False, "accept-changed-data": False}


class Flags:
    """Flags as absl holds them: FLAGS.name is a value, FLAGS["name"] a flag."""

    def __init__(self, **given):
        given = {name.replace("_", "-") if "dry" in name else name: v for name, v in given.items()}
        self.values = DEFAULTS | given
        self.given = set(given)

    def __getattr__(self, name):
        return self.values[name]

    def __getitem__(self, name):
        if name == "config":
            return types.SimpleNamespace(config_filename=search_digits.__file__)
        return types.SimpleNamespace(value=self.values[name], present=name in self.given)


@pytest.fixture
def run(monkeypatch):
    """Runs the command with flags. Returns (exit code, [(function, arguments)])."""
    calls, statuses = [], {"complete": 2}

    def record(name, result=None):
        def function(*_, **options):
            calls.append((name, options))
            return result

        return function

    metric = types.SimpleNamespace(name="accuracy")
    search = types.SimpleNamespace(given="given", winner="best", metric=metric)
    monkeypatch.setattr(tuner, "tune", record("tune"))
    monkeypatch.setattr(tuner, "print_result", lambda _: None)
    monkeypatch.setattr(stages, "tune_in_stages", record("stages"))
    monkeypatch.setattr(comparison, "compare_methods", record("compare"))
    monkeypatch.setattr(report, "write", record("report", []))
    monkeypatch.setattr(search_record, "read_search", lambda _: search)
    monkeypatch.setattr(winner, "retrain", record("retrain", statuses))
    monkeypatch.setattr(
        search_tune.config_flags, "get_config_filename", lambda flag: flag.config_filename
    )

    def run_with(config=search_digits.get_config(), cells=None, **given):  # noqa: B008 (not changed)
        calls.clear()
        statuses.clear()
        statuses.update(cells or {"complete": 2})
        monkeypatch.setattr(search_tune, "FLAGS", Flags(**given))
        return search_tune.search_tune(config), list(calls)

    return run_with


def names(calls):
    return [name for name, _ in calls]


def test_a_search_ends_with_its_report(run):
    code, calls = run()
    assert (code, names(calls)) == (0, ["tune", "report"])
    assert calls[0][1]["trials"] == 20
    assert calls[0][1]["budget_steps"] is None
    _, calls = run(budget=3000.0)
    assert (calls[0][1]["trials"], calls[0][1]["budget_steps"]) == (None, 3000)


def test_report_needs_neither_a_config_nor_a_search(run):
    assert run(config=None, report=True) == (0, [("report", {})])
    with pytest.raises(UserError, match="expected --config"):
        run(config=None)


@pytest.mark.parametrize("other", [{"compare": ["none"]}, {"dry_run": True}, {"seeds": 5}])
def test_report_does_nothing_else(run, other):
    (name,) = other
    with pytest.raises(UserError, match=f"--report only writes.* --{name.replace('_', '-')}$"):
        run(report=True, **other)


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_processes_the_first_one_writes(run, monkeypatch, index):
    monkeypatch.setattr(cluster, "is_one_of_several", lambda _: True)
    monkeypatch.setattr(launch, "initialize", lambda: None)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    reports = [] if index else ["report"]
    assert names(run()[1]) == ["tune", *reports]
    assert names(run(stages=2, trials=30)[1]) == ["stages", *reports]
    assert names(run(config=None, report=True)[1]) == reports
    with pytest.raises(UserError, match="several processes cannot train the winner again"):
        run(seeds=2)


def test_a_winner_that_is_never_tested_is_refused_before_the_search(run):
    config = search_digits.get_config()
    config.train.test_on = "never"
    with pytest.raises(UserError, match="--seeds trains the winner again and tests it"):
        run(config=config, seeds=2)


def test_stages_share_the_trials(run):
    _, calls = run(stages=2, trials=30)
    assert names(calls) == ["stages", "report"]
    assert (calls[0][1]["stages"], calls[0][1]["trials"]) == (2, 30)


def test_seeds_retrain_the_winner_and_report_again(run):
    code, calls = run(seeds=5)
    assert (code, names(calls)) == (0, ["tune", "report", "retrain", "report"])
    assert calls[2][1]["seeds"] == 5
    assert run(seeds=5, cells={"failed": 1, "complete": 1})[0] == EXIT_FAULT
    assert run(seeds=5, cells={"interrupted": 1})[0] == EXIT_PREEMPTED


def test_a_comparison_has_a_budget_and_takes_its_pruners_from_one_flag(run, monkeypatch):
    made = []
    monkeypatch.setattr(
        comparison, "compare_methods", lambda *args, **options: made.append((args, options))
    )
    run(compare=["none", "hyperband"], budget=3024.0, sampler="random")
    ((args, options),) = made
    assert [tuple(method) for method in args[3]] == [
        ("full", "random", "none"),
        ("hyperband", "random", "hyperband"),
    ]
    assert (options["budget_steps"], options["seeds"], options["trials"]) == (3024, 3, None)
    with pytest.raises(UserError, match="--compare: expected --budget"):
        run(compare=["none"])
    with pytest.raises(UserError, match="--compare takes no --pruner"):
        run(compare=["none"], budget=3024.0, pruner="median")
    with pytest.raises(UserError, match=r"a number of training steps, got 0\.5"):
        run(budget=0.5)
