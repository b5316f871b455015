"""Real trials: their folders, what is checked before they begin, and several processes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from configs.common import get_config
from flax_cnns import config as configs
from flax_cnns.config.spaces import choice, integer, log_uniform, uniform
from flax_cnns.errors import UserError
from flax_cnns.runs.train import run
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies.search.tuning import read_study, together, tune, tuner
from flax_cnns.studies.search.tuning.study import make_study, record_study
from tests.tiny_runs import ROOT, arrays, records

RATE = {"schedule.learning_rate": log_uniform(1e-3, 1e-1)}


@pytest.fixture
def config():
    """A few steps of LeNet-5 on noise, with a test split."""
    config = get_config()
    config.data.update(dict(mock=64, batch_size=16, eval_batch_size=64))
    config.train.update(dict(duration="6 steps", eval_every="2 steps", max_bad_steps=2))
    config.schedule.name = "constant"
    config.checkpoint.every = "0 steps"
    config.log.tensorboard = False
    return config


def find_test_numbers(folder):
    """Returns the text files with "test/" in a study's folder."""
    files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file()]
    return [path for path in files if b"test/" in path.read_bytes()]


def check(config, space, folder, **options):
    made = dict(sampler="tpe", pruner="none", metric="auto", seed=None) | options
    return make_study(config, space, folder, **made)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"schedule.learning_rat": uniform(0, 1)}, "unknown field 'schedule.learning_rat'; did"),
        ({"schedule.learning_rate": uniform(1.0, 0.1)}, "expected low < high, got low=1.0"),
        ({"seed": integer(0, 9)}, "seed cannot be searched"),
        (
            {"train.best_by": choice("validation/loss", "validation/accuracy")},
            "train.best_by cannot be searched",
        ),
        ({"data.validation": uniform(0.1, 0.2)}, "compared on different validation images"),
        ({"model.widht": integer(1, 9)}, "lenet5 has no field 'widht'"),
        (
            {"optimizer.name": choice("adam", "sgd"), "optimizer.momentum": uniform(0.5, 0.9)},
            "optimizer.momentum=0.5171 would be refused: config.optimizer.momentum=0.",
        ),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_anything_runs(
    config, space, message, tmp_path
):
    with pytest.raises(UserError) as error:
        check(config, space, tmp_path)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_a_search_needs_of_its_config(config, tmp_path):
    config.data.validation = 0
    with pytest.raises(UserError, match="no validation split, which a search compares"):
        check(config, RATE, tmp_path)
    config.data.validation = 0.25
    config.train.eval_every = "0 steps"
    with pytest.raises(UserError, match="--pruner: it needs validations during the run"):
        check(config, RATE, tmp_path, pruner="median")
    config.train.eval_every = "2 steps"
    # The drawn values are not to blame, so the message does not name them.
    with pytest.raises(UserError, match="accurcy") as error:
        check(config, RATE, tmp_path, metric="accurcy")
    assert "would be refused" not in str(error.value)
    config.optimizer.update(dict(name="adam", nesterov=True))
    with pytest.raises(UserError, match=r"^config\.optimizer\.nesterov=True: only sgd"):
        check(config, RATE, tmp_path)
    config.optimizer.update(dict(name="sgd", nesterov=False))
    study = check(config, RATE, tmp_path, metric="loss")
    assert (study.metric, study.mode) == ("loss", "min")
    assert study.count_steps(study.config) == 6
    batches = study.make_trial_config({"data.batch_size": 8, "train.duration": "3 epochs"})
    assert study.count_steps(batches) == 3 * 64 / 8


def test_changed_data_are_refused(config, tmp_path, capsys):
    study = check(config, RATE, tmp_path)
    record_study(
        study._replace(facts=study.facts | {"data": {"reader": "npz", "classes": [], "splits": {}}})
    )
    study = study._replace(
        facts=study.facts | {"data": {"reader": "folder", "classes": [], "splits": {}}}
    )
    with pytest.raises(UserError, match=r"the data of .* changed since its study began"):
        record_study(study)
    record_study(study, accept_changed_data=True)
    assert "accepted: the data of" in capsys.readouterr().out
    record_study(study)


def test_stop_when_stops_a_run_that_resumes_to_the_bit(config, tmp_path, no_pictures):
    asked = []

    def is_enough(step, metrics):
        asked.append((step, metrics["validation/accuracy"]))
        return step == 2

    with pytest.raises(Preempted) as stopped:
        run(config, tmp_path / "cut", stop_when=is_enough)
    assert (stopped.value.step, stopped.value.by_signal) == (3, False)
    assert [step for step, _ in asked] == [2]
    run(config, tmp_path / "cut")
    run(config, tmp_path / "whole")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    ours, theirs = arrays(tmp_path / "cut"), arrays(tmp_path / "whole")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.slow
def test_trials_in_this_process_end_and_are_pruned_like_those_of_child_processes(
    config, tmp_path, no_pictures
):
    """The way of several processes, with one. Of two trials of halving, the worse one stops."""
    config.model.name = "tests.runs.own_parts:Bare"
    folder = tmp_path / "together"
    space = {"schedule.learning_rate": log_uniform(1e-3, 100.0)}
    first = [{"schedule.learning_rate": rate} for rate in (1e-2, 100.0)]
    options = dict(sampler="random", pruner="halving", metric="loss", first=first)

    def tune_here():
        return together.tune_together(
            config,
            lambda: check(config, space, folder, **options),
            trials=2,
            budget_steps=None,
            accept_changed_data=False,
        )

    result = tune_here()
    assert [record.state for record in result.trials] == ["complete", "pruned"]
    for record in result.trials:
        steps = json.loads((record.workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert steps == record.steps == (6 if record.state == "complete" else record.curve[-1][0])
    assert find_test_numbers(folder) == []
    assert tune_here().trials == result.trials


@pytest.mark.slow
def test_a_real_trial_has_no_test_number(config, tmp_path):
    """In a child process. Several of them at once: test_tuner.py."""
    config.model.name = "tests.runs.own_parts:Bare"
    options = dict(trials=1, jobs=1, sampler="qmc", console=Console(width=200))
    result = tune(config, RATE, tmp_path / "study", **options)
    assert find_test_numbers(tmp_path / "study") == []
    study = read_study(tmp_path / "study")
    assert study.trials == result.trials
    (record,) = study.trials
    assert record.state == "complete"
    summary = json.loads((record.workdir / "summary.json").read_text())
    assert record.value == summary["validation/best_accuracy"]
    saved = json.loads((record.workdir / "config.json").read_text())
    assert saved["schedule"]["learning_rate"] == record.fields["schedule.learning_rate"]
    assert saved["train"]["test_on"] == "never"


# Trains the first trial. The others log a closed form, because each would compile for seconds.
SEVERAL = """
import json, sys, time
import jax
from flax_cnns import config as configs
from flax_cnns.config.spaces import log_uniform
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies.search.tuning import together, tune
train = together.run
def run(config, workdir, *, stop_when, **options):
    if workdir.name == "0":
        return train(config, workdir, stop_when=stop_when, **options)
    workdir.mkdir(parents=True, exist_ok=True)
    log = open(workdir / "metrics.jsonl", "a") if jax.process_index() == 0 else None
    for step in (2, 4, 6):
        metrics = {"validation/accuracy": 1.0 - config.schedule.learning_rate}
        if log is not None:
            line = {"step": step, "time": time.time(), **metrics}
            print(json.dumps(line), file=log, flush=True)
        if stop_when(step, metrics):
            raise Preempted(step, by_signal=False)
    if log is not None:
        best = {"step": 6, "validation/best_accuracy": metrics["validation/accuracy"]}
        (workdir / "summary.json").write_text(json.dumps(best))
together.run = run
config = configs.complete(json.loads(sys.argv[2]))
space = {"schedule.learning_rate": log_uniform(1e-3, 1e-1)}
result = tune(config, space, sys.argv[1], trials=6, sampler="random", pruner="halving")
print("trials", [(r.number, r.values, r.state, r.value, r.steps) for r in result.trials])
"""


@pytest.mark.slow
def test_several_processes_run_the_same_trials(config, tmp_path):
    """Process 0 draws; both see the same trials and stop the same ones."""
    config.data.update(dict(mock=32, batch_size=8))
    config.model.name = "tests.runs.own_parts:Bare"
    command = [sys.executable, "-m", "flax_cnns.launch", "--local=2", "--devices=1", "--"]
    command += [sys.executable, "-c", SEVERAL, str(tmp_path / "study")]
    command += [json.dumps(configs.to_plain(config))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if "trials [" in line]
    assert len(lines) == 2
    assert lines[0].partition("trials")[2] == lines[1].partition("trials")[2]
    trials = read_study(tmp_path / "study").trials
    assert len(trials) == 6
    assert {trial.state for trial in trials} == {"complete", "pruned"}
    assert [trial.steps for trial in trials] == [
        6 if trial.state == "complete" else 2 for trial in trials
    ]


def test_a_config_file_gives_the_space():
    space = tuner.load_space("configs/digits_lenet5.py")
    assert "schedule.learning_rate" in space
    with pytest.raises(UserError, match=r"has no space\(\)"):
        tuner.load_space("configs/common.py")
