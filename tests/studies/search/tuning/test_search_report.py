"""The report of a search, from folders whose journal Optuna reads itself."""

from __future__ import annotations

import csv
import json
import runpy
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from flax_cnns import config as configs
from flax_cnns.config.spaces import choice, log_uniform, uniform
from flax_cnns.errors import UserError
from flax_cnns.recipes import common
from flax_cnns.studies.search.tuning import report
from flax_cnns.studies.search.tuning.search_record import read_search
from tests.studies.search.tuning.fake_studies import STEPS, score, write_study

optuna = pytest.importorskip("optuna")

SPACE = {
    "schedule.learning_rate": log_uniform(1e-4, 1.0),
    "optimizer.name": choice("adam", "sgd"),
    "optimizer.momentum": uniform(0.5, 0.99, when={"optimizer.name": "sgd"}),
    "train.dropout": uniform(0.0, 0.5, to_value=lambda rate: (rate,)),
}
STATES = {3: "pruned", 5: "failed", 13: "running"}


def given_config():
    config = common.get_config()
    config.optimizer.name = "adam"
    config.schedule.learning_rate = 0.002
    config.train.test_on = "best"
    return config


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """The folder of a search with 14 trials and its report."""
    folder = tmp_path_factory.mktemp("runs") / "search"
    trials = write_study(folder, given_config(), SPACE, trials=14, states=STATES)
    paths = report.write(folder)
    text = (folder / "report.md").read_text()
    return SimpleNamespace(folder=folder, trials=trials, paths=paths, text=text)


def load_optuna_study(folder):
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
    )
    return optuna.load_study(study_name=None, storage=storage)


def test_the_best_trials_are_those_of_optuna(search):
    study = load_optuna_study(search.folder)
    record = read_search(search.folder)
    assert record.best.number == study.best_trial.number
    assert record.best.value == study.best_value
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    expected = sorted(complete, key=lambda trial: -trial.value)
    assert [trial.number for trial in record.ranked] == [trial.number for trial in expected]
    rows = [line for line in search.text.splitlines() if line.startswith("| trial ")]
    numbers = [int(row.split("|")[1].removeprefix(" trial ")) for row in rows[1:]]
    assert numbers == [trial.number for trial in expected[: report.MAX_BEST]]


def test_the_importance_is_that_of_optuna(search):
    study = load_optuna_study(search.folder)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=5 / 11)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    for path, share in shares.items():
        lines = [line for line in search.text.splitlines() if line.startswith(f"| `{path}` |")]
        assert lines[0].split("|")[2].strip().strip("*") == f"{100 * share:.0f}"


def test_the_report_counts_trials_and_gives_reasons(search):
    assert "14 trials (11 complete, 1 pruned, 1 failed, 1 running)" in search.text
    steps = 11 * STEPS + STEPS // 4 + 3
    assert f"{steps:,} training steps" in search.text
    assert "- trial 5: diverged: step 3 is bad" in search.text
    assert "sampler random, pruner none, seed 0" in search.text
    assert "No trial is tested." in search.text
    assert "test/" not in search.text


def test_the_table_of_trials_has_a_line_for_each(search):
    with (search.folder / "trials.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["trial"]) for line in lines] == list(range(14))
    for line, trial in zip(lines, search.trials):
        assert line["state"] == trial.state
        drawn = {path: line[path] for path in SPACE if line[path]}
        assert drawn == {path: str(value) for path, value in trial.values.items()}
    assert float(lines[0]["value"]) == score(search.trials[0].values)
    assert lines[13]["value"] == lines[5]["value"] == ""


def test_the_winner_is_a_config_file_of_the_best_trial_that_is_tested(search):
    config = runpy.run_path(str(search.folder / "winner.py"))["get_config"]()
    best = read_search(search.folder).best
    expected = json.loads((best.workdir / "config.json").read_text())
    assert expected["train"]["test_on"] == "never"
    expected["train"]["test_on"] = "best"  # as in the given config
    assert configs.to_plain(config) == expected
    configs.validate(config)


def test_pictures_are_drawn_and_named_in_the_report(search):
    names = {path.name for path in search.paths}
    assert names >= {"history.png", "parallel.png", "slices.png", "importance.png"}
    for path in search.paths:
        if path.suffix == ".png":
            height, width, _ = plt.imread(path).shape
            assert width > height > 100
            assert f"]({path.name})" in search.text


def test_the_given_config_is_a_row_without_what_it_does_not_draw(search):
    row = next(line for line in search.text.splitlines() if line.startswith("| given config"))
    # adam: no momentum. The rules of dropout are not a drawn number.
    assert [cell.strip() for cell in row.split("|")[4:-1]] == ["0.002", "adam", "-", "[]"]


def test_the_images_of_validation_are_compared_with_a_wilson_interval(search):
    statsmodels = pytest.importorskip("statsmodels.stats.proportion")
    record = read_search(search.folder)
    count = record.best.value * 360
    low, high = statsmodels.proportion_confint(count, 360, method="wilson")
    near = sum(trial.value >= low for trial in record.ranked)
    assert f"{100 * low:.2f} to {100 * high:.2f} %. This interval contains {near} of" in search.text


def test_the_last_good_value_near_an_end_is_said(tmp_path):
    def rising(values):
        return values["own.x.strength"]

    space = {"own.x.strength": uniform(0.0, 1.0)}
    write_study(tmp_path, given_config(), space, trials=40, get_score=rising)
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "At the edge of its range: `own.x.strength` = 0.9" in text
    assert "the range ends at 1." in text


def test_a_best_trial_that_stands_alone_is_not_called_equal_to_others(search):
    record = read_search(search.folder)
    alone = record._replace(stages=(record.stages[0]._replace(trials=(record.best,)),))
    assert report._compare_with_noise(alone, record.best).endswith(
        "%. No other complete trial lies in it."
    )


def test_less_may_be_better(tmp_path):
    options = dict(mode="min", metric="validation/loss", get_score=lambda v: 2 - score(v))
    write_study(tmp_path, given_config(), SPACE, trials=4, **options)
    report.write(tmp_path)
    record, text = read_search(tmp_path), (tmp_path / "report.md").read_text()
    assert record.best.value == min(trial.value for trial in record.trials)
    assert "best validation loss (less is better)" in text
    assert "the lowest of many noisy ones" in text
    assert "Not computed (fewer than 10 complete trials" in text
    assert not (tmp_path / "importance.png").exists()


def test_a_search_without_a_complete_trial_has_a_report_of_its_failures(tmp_path):
    write_study(tmp_path, given_config(), SPACE, trials=2, states={0: "failed", 1: "failed"})
    paths = report.write(tmp_path)
    assert "winner.py" not in {path.name for path in paths}
    text = (tmp_path / "report.md").read_text()
    assert "No trial is complete." in text
    assert text.count("diverged: step 3 is bad") == 2


def test_a_folder_without_trials_is_refused(tmp_path):
    with pytest.raises(UserError, match="no study here"):
        report.write(tmp_path)
    write_study(tmp_path, given_config(), SPACE, trials=0)
    with pytest.raises(UserError, match="no trial has ended, so there is nothing to report"):
        report.write(tmp_path)
