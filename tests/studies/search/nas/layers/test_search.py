"""The search of layers, with a function in place of training: resumption, rewards, errors, report.

One search in the slow tier trains.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal

import numpy as np
import pytest
from scipy import stats

from configs import digits_nas
from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.errors import Diverged, UserError
from flax_cnns.models.nas import FIGURE_7
from flax_cnns.runtime import preemption
from flax_cnns.studies.search.nas.controller import Controller
from flax_cnns.studies.search.nas.layers import children, pictures, report
from flax_cnns.studies.search.nas.layers import search as search_module
from flax_cnns.studies.search.nas.layers.search import ControllerSettings, search_layers
from flax_cnns.studies.search.nas.layers.space import LayersSpace
from flax_cnns.studies.search.nas.layers.trials import (
    LayersTrial,
    find_best,
    read_trials,
    write_trials,
)

SPACE = LayersSpace(2)
MADE: dict = {}  # controllers; tracing one takes a second, and they have no state
SETTINGS = ControllerSettings(learning_rate=0.02, batch_size=2)


class Stopped(BaseException):
    """Nothing in the package catches it, so nothing is written after it."""


class FakeRuns:
    """Replaces `run`. A network's accuracy is a function of its table."""

    def __init__(self):
        self.seen, self.stop_after = [], 10**9
        self.diverged = ()

    def __call__(self, config, workdir, **_):
        assert config.train.test_on == "never"
        name = pathlib.Path(workdir).name
        if name in self.diverged:
            raise Diverged("too many steps that are not finite")
        self.seen.append(name)
        if len(self.seen) > self.stop_after:
            raise Stopped
        areas = [kernel[0] * kernel[1] for kernel, _, _ in config.model.table]
        accuracies = [0.99, 0.1, 0.2, 0.5 + sum(areas) / 250, 0.3, 0.2, 0.1]  # the first is too old
        workdir = pathlib.Path(workdir)
        (workdir / "checkpoints").mkdir(parents=True)
        files.write_json(workdir / "config.json", configs.to_plain(config))
        lines = [
            json.dumps({"step": i + 1, "validation/accuracy": accuracy, "time": float(i)})
            for i, accuracy in enumerate(accuracies)
        ]
        lines.insert(0, json.dumps({"step": 0, "time/first_step": 2.0, "time": 2.0}))
        (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        files.write_json(workdir / "summary.json", {"params": sum(areas)})


@pytest.fixture
def runs(monkeypatch):
    fake = FakeRuns()
    monkeypatch.setattr(children, "run", fake)

    def make(decisions, **fields):
        key = (decisions, *fields.items())
        return MADE.get(key) or MADE.setdefault(key, Controller(decisions, **fields))

    monkeypatch.setattr("flax_cnns.studies.search.nas.layers.search.Controller", make)
    return fake


def search(folder, trials=6, **options):
    options = dict(space=SPACE, settings=SETTINGS, seeds=0, say=lambda _: None) | options
    return search_layers(digits_nas.get_config(), folder, trials=trials, **options)


def test_a_search_that_stops_while_a_network_trains_goes_on_as_if_it_had_not(runs, tmp_path):
    whole = search(tmp_path / "whole")
    expected = (tmp_path / "whole/controller/trials.jsonl").read_bytes()
    trained = len(set(runs.seen))
    assert len(whole) == 6
    runs.seen.clear()
    for stop_after in (1, 1, 0, 3):  # in the first batch, at its end, before and within the next
        runs.stop_after = len(runs.seen) + stop_after
        with pytest.raises(Stopped):
            search(tmp_path / "stopped", trials=6)
    runs.stop_after = 10**9
    search(tmp_path / "stopped", trials=5)  # first fewer than asked for later
    search(tmp_path / "stopped", trials=6)
    assert (tmp_path / "stopped/controller/trials.jsonl").read_bytes() == expected
    assert len(set(runs.seen)) == trained
    assert len(runs.seen) <= trained + 4  # only those that were being trained are trained again
    assert not list(tmp_path.glob("*/children/*/checkpoints"))

    # The controller's proposals are those of the state that the log gives.
    (controller,) = MADE.values()
    batches = [
        ([t.decisions for t in whole[i : i + 2]], [t.reward for t in whole[i : i + 2]])
        for i in (0, 2)
    ]
    state = controller.replay(0, batches)
    assert controller.sample_trials(state, 0, [4, 5]) == [t.decisions for t in whole[4:]]


def test_rewards_and_the_best(runs, tmp_path):
    said: list[str] = []
    runs.diverged = (SPACE.name(SPACE.draw_uniformly(0, 1)),)
    trials = search(tmp_path, method="random", trials=8, say=said.append)
    for trial in trials:
        table = SPACE.make_fields(trial.decisions)["table"]
        area = sum(height * width for (height, width), _, _ in table)
        expected = 0.0 if trial.number == 1 else (0.5 + area / 250) ** 3
        assert trial.reward == pytest.approx(expected)
        assert len(trial.accuracies) == (0 if trial.number == 1 else 5)
    assert trials[1].error == "too many steps that are not finite"
    assert find_best(trials).reward == max(trial.reward for trial in trials)
    assert [trial.decisions for trial in trials] == [SPACE.draw_uniformly(0, i) for i in range(8)]
    assert read_trials(tmp_path, "random") == trials
    assert said[0].startswith("random: 0 of 8 networks are known; the first one tells")
    bests = np.maximum.accumulate([trial.reward for trial in trials])
    for line, best in zip(said[1:9], bests):
        assert f"(best {best:.4f})" in line
    assert said[1].startswith(f"1/8 {trials[0].name}: ")
    assert said[8].endswith(" 6 s, about 0:00:00 left")

    seen = len(runs.seen)
    search(tmp_path, method="random", trials=8)
    assert len(runs.seen) == seen
    names = ["report.md", "trials.csv", "rewards.png", "network-random.png"]
    assert report.write(tmp_path) == names
    text = (tmp_path / "report.md").read_text()
    assert "run the same command with --method=controller" in text
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 9
    assert all((tmp_path / name).is_file() for name in names)


def test_a_signal_at_the_end_of_a_run_stops_the_search(runs, tmp_path):
    """The run is complete, so it does not raise `Preempted` itself."""

    def run(config, workdir, **_):
        with preemption.Signals():
            runs(config, workdir)
            if len(runs.seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    children.run = run
    with pytest.raises(preemption.Preempted):
        search(tmp_path, method="random", say=said.append)
    assert said[-1] == "stopped after this network; run the same command to resume"
    assert len(runs.seen) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(search(tmp_path, method="random")) == 6
    assert len(runs.seen) == 6


def test_multilabel_networks_are_scored_by_images_with_all_labels_right(runs, tmp_path):
    (trial,) = search(tmp_path, method="random", trials=1)
    job = children.ChildNetwork(trial.name, tmp_path / "children", None)
    log = job.workdir / "metrics.jsonl"
    log.write_text(log.read_text().replace("validation/accuracy", "validation/subset_accuracy"))
    assert children.read_score(job).accuracies == trial.accuracies


def test_equal_rewards_go_to_the_smaller_network():
    trials = [
        LayersTrial(i, (), str(i), [], reward, params, 1.0)
        for i, (reward, params) in enumerate([(0.5, 10), (0.9, 30), (0.9, 20), (0.9, 20)])
    ]
    assert find_best(trials).number == 2


def test_errors(runs, tmp_path):
    with pytest.raises(UserError, match="unknown method 'randon'; did you mean 'random'"):
        search(tmp_path, method="randon")
    search(tmp_path, method="random", trials=1)
    with pytest.raises(UserError, match=r"another search \(space.layers: 2 there, 3 here\)"):
        search(tmp_path, method="random", space=LayersSpace(3))
    with pytest.raises(UserError, match="child_duration: '8 epochs' there, '1 epochs' here"):
        search(tmp_path, method="random", child_duration="1 epochs")
    (tmp_path / "controller").mkdir()
    files.write_json(tmp_path / "controller/settings.json", {**SETTINGS._asdict(), "entropy": 1.0})
    with pytest.raises(UserError, match=r"entropy: 1.0 there, 0.0 here"):
        search(tmp_path)
    log = tmp_path / "random/trials.jsonl"
    log.write_text(log.read_text() * 2)
    with pytest.raises(UserError, match="expected the trials 0 to 1 in order"):
        search(tmp_path, method="random")
    log.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        search(tmp_path, method="random")
    with pytest.raises(UserError, match="no search of layers here"):
        report.write(tmp_path / "children")


@pytest.mark.parametrize("knows", ["the environment", "JAX"])
def test_one_of_several_processes_is_refused(runs, tmp_path, monkeypatch, knows):
    """The environment of a TPU pod's host need not name the others."""
    if knows == "JAX":
        monkeypatch.setattr(search_module.jax, "process_count", lambda: 2)
    else:
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host1,host2")
    monkeypatch.setattr(search_module, "initialize_jax", lambda config: None)
    with pytest.raises(UserError, match="a search of networks is one process"):
        search(tmp_path)
    assert runs.seen == []


def test_the_time_left_counts_networks_of_known_time(tmp_path):
    known = [
        LayersTrial(i, (0,), str(i), [], 0.1, 1, seconds)
        for i, seconds in enumerate([10.0, 0.0, 20.0])  # one diverged before its first log line
    ]
    said: list[str] = []
    write_trials(tmp_path, "random", known)
    board = search_module._Board(tmp_path, "random", 7, 2, said.append)
    job = children.ChildNetwork("net", tmp_path, None)
    board.report(job, children.ChildScore([0.5], 1, 30.0))
    board.report(job, children.ChildScore([], 0, 0.0, "diverged"))
    assert said[0] == "random: 3 of 7 networks are known, about 0:00:30 left"
    assert said[1].endswith("30 s, about 0:00:30 left")  # three more, two at once, 20 s each
    assert "diverged, reward 0.0000" in said[2]
    assert said[2].endswith("0 s, about 0:00:20 left")
    empty = search_module._Board(tmp_path / "new", "random", 2, 1, said.append)
    empty.report(job, children.ChildScore([], 0, 0.0, "diverged"))
    assert said[-1].endswith(" 0 parameters, 0 s")


def test_the_report_says_who_is_not_shown_to_be_better(tmp_path):
    """With SciPy's statistics of rewards that are written by hand."""
    rng = np.random.default_rng(0)
    theirs = rng.uniform(0.8, 0.9, 20)
    for shift, words in (
        (0.0, "does not show that the controller proposes better"),
        (0.1, "the controller proposed better networks than random"),
        (-0.1, "the controller proposed worse networks than random"),
    ):
        ours = rng.uniform(0.8, 0.9, 20) + shift
        found = {
            method: [
                LayersTrial(i, (0,) * 7, "000-0000", [r ** (1 / 3)], float(r), 1, 1.0)
                for i, r in enumerate(rewards)
            ]
            for method, rewards in (("controller", ours), ("random", theirs))
        }
        (text,) = report._describe_comparison(found)
        assert words in text
        compared = report.compare_rewards(ours[10:], theirs[10:])
        welch = stats.ttest_ind(ours[10:], theirs[10:], equal_var=False)
        assert compared.low < ours[10:].mean() - theirs[10:].mean() < compared.high
        assert (compared.low > 0 or compared.high < 0) == (welch.pvalue < 0.05)
    assert report.compare_rewards([0.5], [0.5, 0.6]) is None
    assert report.compare_rewards([0.5, 0.5], [0.5, 0.5])[:4] == (0.0, 0.0, 0.0, 1.0)


def test_pictures(tmp_path):
    pictures.draw_network(FIGURE_7, tmp_path / "v1.png", title="v1")
    assert (tmp_path / "v1.png").stat().st_size > 50_000
    window = pictures.average_over_window([1.0, 2.0, 3.0, 5.0], 2)
    np.testing.assert_allclose(window, [1, 1.5, 2.5, 4])


@pytest.mark.slow
def test_a_real_search_never_reads_the_test_split(tmp_path):
    config = digits_nas.get_config("smoke")
    options = dict(space=LayersSpace(1), method="random", trials=1, seeds=0, say=lambda _: None)
    trials = search_layers(config, tmp_path, child_duration="2 epochs", **options)
    workdir = tmp_path / "children" / trials[0].name
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["validation/accuracy"] for line in lines if "validation/accuracy" in line]
    assert len(accuracies) == 2
    assert trials[0].reward == max(accuracies) ** 3
    assert trials[0].accuracies == accuracies
    for path in workdir.rglob("*.json*"):
        assert '"test/' not in path.read_text(), path
    assert not (workdir / "checkpoints").exists()
    assert search_layers(config, tmp_path, child_duration="2 epochs", **options) == trials
