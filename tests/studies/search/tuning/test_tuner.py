"""Searches with fake runs: kills, jobs, budgets, failures, and folders of other studies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time

import optuna
import pytest
from rich.console import Console

from flax_cnns.errors import UserError
from flax_cnns.runs import child
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies.search.tuning import read_study, tuner
from flax_cnns.studies.search.tuning.pruners import Decision, Pruner
from flax_cnns.studies.search.tuning.results import make_result
from flax_cnns.studies.search.tuning.storage import Journal
from tests.studies.search.tuning import fake_runs
from tests.studies.search.tuning.fake_runs import SPACE, STEPS, make_study


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Returns a function that runs `tune` with fake runs in a folder of the test."""
    monkeypatch.setattr(child, "_devices", lambda: ("cpu", 1))

    def search(
        name="study",
        *,
        trials=8,
        jobs=1,
        sleep=0.0005,
        diverges=1e9,
        budget=None,
        on_start=None,
        **made,
    ):
        folder = tmp_path / name

        def start(config, workdir, *arguments, **options):
            options |= dict(sleep=sleep, diverges=diverges)
            process = fake_runs.start(config, workdir, *arguments, **options)
            if on_start is not None:
                on_start(workdir)
            return process

        monkeypatch.setattr(child, "start", start)
        monkeypatch.setattr(tuner, "make_study", lambda *_, **__: make_study(folder, **made))
        return tuner.tune(
            None,
            made.get("space") or SPACE,
            folder,
            trials=trials,
            jobs=jobs,
            budget_steps=budget,
            console=Console(file=sys.stdout, width=200),
        )

    return search


def compare(record):
    """Returns what must be equal to the bit in two searches."""
    return record._replace(workdir=None, seconds=None)


def kill_at_random(search, name, rng, kills, **options):
    """Starts the search in a forked process and kills it, `kills` times."""
    for _ in range(kills):
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException), open(os.devnull, "w") as out:
                sys.stdout = out
                search(name, **options)
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.parametrize(
    ("sampler", "pruner", "trials", "kills"),
    [("tpe", "hyperband", 13, 5), ("qmc", "median", 9, 5)],
)
def test_a_search_that_is_killed_has_the_same_trials(search, sampler, pruner, trials, kills):
    """TPE draws by the trials before from the eleventh on, the median prunes from the sixth on."""
    options = dict(sampler=sampler, pruner=pruner, trials=trials, diverges=0.1)
    whole = search("whole", **options)
    kill_at_random(search, "cut", random.Random(sampler), kills, **options)
    cut = search("cut", **options)
    assert list(map(compare, cut.trials)) == list(map(compare, whole.trials))
    states = {record.state for record in whole.trials}
    assert states >= {"complete", "pruned", *(["failed"] if pruner == "median" else [])}
    assert len({json.dumps(record.values) for record in whole.trials}) == trials
    assert search("cut", **options).trials == cut.trials  # nothing is left to do


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_with_three_jobs_no_trial_is_lost_or_repeated(search):
    options = dict(trials=15, jobs=3, sleep=0.001)
    kill_at_random(search, "study", random.Random(1), 4, **options)
    result = search(**options)
    assert [record.number for record in result.trials] == list(range(15))
    assert all(record.state == "complete" for record in result.trials)
    assert len({json.dumps(record.values) for record in result.trials}) == 15
    folder = result.best.workdir.parent
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(map(str, range(15)))
    for record in result.trials:
        assert [step for step, _ in record.curve] == list(range(2, STEPS + 1, 2))
        assert record.value == max(value for _, value in record.curve)


def test_a_pruned_run_is_told_to_stop_and_its_later_validations_do_not_count(search, capsys):
    result = search(trials=9, sampler="random", pruner="halving", sleep=0.01)
    pruned = [record for record in result.trials if record.state == "pruned"]
    assert pruned
    saved = []
    for record in pruned:
        assert record.steps < STEPS
        assert record.curve[-1] == (record.steps, record.value)
        assert not (record.workdir / "summary.json").exists()
        saved.append(int((record.workdir / "saved").read_text()))
        assert saved[-1] >= record.steps
    assert min(saved) < STEPS
    assert f"trial {pruned[0].number}: pruned at step {pruned[0].steps}" in capsys.readouterr().out
    # Pruned trials count in Optuna's storage as such, with the value of their last step.
    study = load_study(result)
    assert study.trials[pruned[0].number].state == optuna.trial.TrialState.PRUNED
    assert study.best_trial.number == result.best.number


def test_a_decision_to_prune_is_kept_while_the_run_stops(search, monkeypatch):
    """With several jobs, a trial that ends meanwhile can change what the rule would decide."""
    decided = []

    def decide(self, number, curve, others, last_step):
        if number != 1 or not curve or decided:
            return Decision(None)
        decided.append(number)
        return Decision(curve[0][0])

    monkeypatch.setattr(Pruner, "decide", decide)
    result = search(trials=3, sampler="random", sleep=0.01)
    assert [record.state for record in result.trials] == ["complete", "pruned", "complete"]
    assert result.trials[1].steps == 2
    assert result.trials[1].curve == ((2, result.trials[1].value),)


def load_study(result):
    path = str(result.best.workdir.parents[1] / "journal.log")
    backend = optuna.storages.journal.JournalFileBackend(path)
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=None, storage=storage)


def test_the_storage_is_a_study_of_optuna_with_readable_names(search):
    result = search(trials=6, sampler="qmc")
    study = load_study(result)
    assert {path for trial in study.trials for path in trial.params} == set(SPACE)
    for trial, record in zip(study.trials, result.trials):
        assert trial.params == record.values
        assert ("optimizer.momentum" in trial.params) == (trial.params["optimizer.name"] == "sgd")
        assert trial.intermediate_values == dict(record.curve)
        assert trial.distributions["schedule.learning_rate"].log
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    ours = read_study(result.best.workdir.parents[1])
    assert ours.trials == result.trials
    assert ours.best == result.best
    assert (ours.metric, ours.mode, ours.sampler) == ("validation/accuracy", "max", "qmc")
    assert ours.config.train.test_on == "never"
    assert ours.space["schedule.learning_rate"]["high"] == 1.0


def test_diverged_trials_are_recorded_and_the_search_goes_on(search, tmp_path, capsys):
    result = search(trials=8, sampler="random", diverges=0.01)
    failed = [record for record in result.trials if record.state == "failed"]
    assert 0 < len(failed) < 8
    for record in failed:
        assert record.values["schedule.learning_rate"] > 0.01
        assert record.error == "diverged: step 9: not finite"
        assert record.value is None
        assert record.steps == 8
    printed = capsys.readouterr().out
    assert re.search(r"failed, [\d:]+; schedule.learning_rate=0\.\d+, ", printed)
    assert not re.search(r"\d{7}", printed)  # values have four digits
    with pytest.raises(UserError, match=r"no trial of 3 is complete: 3 failed, 3 of them diverged"):
        search("all", trials=3, diverges=0.0)
    with pytest.raises(UserError, match=r"the first, trial 0: diverged: step 9"):
        search("all", trials=3, diverges=0.0)
    pruned = [record._replace(state="pruned") for record in result.trials]
    with pytest.raises(UserError, match=r"no trial of 8 is complete: all were pruned"):
        make_result(make_study(tmp_path), pruned)


def test_a_budget_ends_the_search(search):
    result = search(trials=None, budget=100)
    assert len(result.trials) == 4  # 30, 60, 90: a fourth may begin; then 120
    more = search(trials=None, budget=121)
    assert more.trials[:4] == result.trials
    assert len(more.trials) == 5
    halving = search("halving", trials=None, budget=100, pruner="halving")
    assert len(halving.trials) > 4
    assert 100 <= sum(record.steps for record in halving.trials) < 130
    with pytest.raises(UserError, match="--trials: expected"):
        search("none", trials=None)


def test_a_grid_ends_with_its_points(search):
    space = {key: SPACE[key] for key in ("optimizer.name", "optimizer.momentum")}
    result = search(trials=50, sampler="grid", space=space)
    assert len(result.trials) == 6


def test_signals_save_what_runs_and_the_next_start_goes_on(search):
    stops = {1: signal.SIGTERM, 3: signal.SIGINT}  # when these trials start for the first time

    def stop(workdir):
        if number := stops.pop(int(workdir.name), None):
            os.kill(os.getpid(), number)

    for error in (Preempted, KeyboardInterrupt):
        with pytest.raises(error):
            search("cut", trials=5, on_start=stop)
    cut = search("cut", trials=5)
    assert not stops
    whole = search("whole", trials=5)
    assert list(map(compare, cut.trials)) == list(map(compare, whole.trials))


def test_another_study_in_the_folder_is_refused(search, tmp_path):
    search(trials=2)
    for options, difference in (
        (dict(sampler="random"), "sampler: 'tpe' there, 'random' here"),
        (dict(seed=5), "seed: 0 there, 5 here"),
        (dict(pruner="median"), "pruner: 'none' there, 'median' here"),
        (
            dict(space={"schedule.learning_rate": SPACE["schedule.learning_rate"]}),
            "space.optimizer.name: \"kind 'choice'",
        ),
    ):
        with pytest.raises(UserError, match="holds another study") as error:
            search(trials=2, **options)
        assert difference in str(error.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"is not empty and holds no study \(notes.txt\)"):
        search("full", trials=2)
    with pytest.raises(UserError, match="no study here"):
        read_study(tmp_path / "full")


def test_what_a_killed_writer_leaves_in_the_journal_is_repaired(search, tmp_path):
    first = search(trials=2)
    journal = tmp_path / "study" / "journal.log"
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","stu')
    os.symlink(journal, f"{journal}.lock")
    began = time.monotonic()
    assert search(trials=3).trials[:2] == first.trials
    assert time.monotonic() - began < 10  # Optuna waits 30 s for the lock
    assert journal.read_bytes().startswith(whole)
    # A journal that is removed is made again from the runs.
    journal.unlink()
    again = search(trials=3)
    assert list(map(compare, again.trials[:2])) == list(map(compare, first.trials))
    journal.write_text("not a journal\nnor this\n")
    with pytest.raises(UserError, match=r"journal\.log is damaged"):
        search(trials=3)
    with pytest.raises(UserError, match=r"journal\.log is damaged"):
        read_study(tmp_path / "study")


def test_two_searches_do_not_share_a_folder(search, tmp_path):
    from flax_cnns.checkpoint.lock import DirectoryLock

    with DirectoryLock(tmp_path / "study"), pytest.raises(UserError, match="is in use by pid"):
        search()


def test_optuna_is_needed_only_here(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r'pip install "flax_cnns\[tune\]"'):
        search()


def test_a_trial_is_created_with_its_values_in_one_line(tmp_path):
    """A kill between the two would leave a trial whose values nobody knows."""
    journal = Journal(tmp_path, "max", SPACE)
    drawing = make_study(tmp_path).sampler.draw(0)
    before = (tmp_path / "journal.log").read_bytes()
    journal.create(drawing.params, drawing.values, drawing.fields)
    added = (tmp_path / "journal.log").read_bytes().removeprefix(before)
    assert added.count(b"\n") == 1
    assert b"schedule.learning_rate" in added
