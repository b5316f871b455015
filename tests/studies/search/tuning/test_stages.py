"""Coarse to fine: the stages of a search, with trials that are scored instead of trained."""

from __future__ import annotations

import json
import math

import pytest

from flax_cnns.config.spaces import choice, log_uniform, uniform
from flax_cnns.errors import UserError
from flax_cnns.recipes import common
from flax_cnns.studies.search.tuning import report, stages
from flax_cnns.studies.search.tuning.reading import read_study
from flax_cnns.studies.search.tuning.search_record import read_search
from tests.studies.search.tuning.fake_studies import STEPS, write_study

SPACE = {
    "schedule.learning_rate": log_uniform(1e-4, 1.0),
    "optimizer.name": choice("sgd", "adam"),
    "optimizer.nesterov": choice(False, True, when={"optimizer.name": "sgd"}),
    "mix.label_smoothing": uniform(0.0, 0.4),
}


def score(values):
    """Best at a learning rate of 0.01; adam is always better than sgd."""
    rate = math.log10(values["schedule.learning_rate"]) + 2
    return 0.9 - 0.02 * rate**2 - 0.2 * (values.get("optimizer.name", "adam") == "sgd")


@pytest.fixture
def calls(monkeypatch):
    """The calls of `tune`, which writes scored trials."""
    made = []

    def tune(config, space, folder, *, trials, budget_steps, seed, **options):
        made.append((folder.name, trials, budget_steps))
        config.lock()
        allowed = trials if budget_steps is None else budget_steps // STEPS
        allowed = allowed if trials is None else min(trials, allowed)
        write_study(folder, config, space, trials=allowed, get_score=score, seed=seed)

    monkeypatch.setattr(stages, "tune", tune)
    return made


def search(folder, **options):
    config = common.get_config()
    config.optimizer.nesterov = True
    stages.tune_in_stages(config, SPACE, folder, **options)


def test_the_second_stage_searches_around_the_best_of_the_first(tmp_path, calls):
    folder = tmp_path / "search"
    search(folder, stages=2, trials=41)
    assert calls == [("search", 20, None), ("stage2", 21, None)]
    first, second = read_study(folder), read_study(folder / "stage2")
    best = sorted(first.trials, key=lambda trial: -trial.value)[:3]
    rates = [trial.values["schedule.learning_rate"] for trial in best]
    range_ = second.space["schedule.learning_rate"]
    assert range_["low"] == pytest.approx(max(min(rates) / 10**0.4, 1e-4))
    assert range_["high"] == pytest.approx(min(max(rates) * 10**0.4, 1.0))
    # The best trials have adam, so the second stage's config has adam, without Nesterov momentum.
    assert second.config.optimizer.name == "adam"
    assert second.config.optimizer.nesterov is False
    assert list(second.space) == ["schedule.learning_rate", "mix.label_smoothing"]
    made = json.loads((folder / "stage2.json").read_text())
    assert made == {"basis": [trial.number for trial in best], "fixed": {"optimizer.name": "adam"}}


def test_stages_draw_different_places_of_their_ranges(tmp_path, calls):
    search(tmp_path, stages=2, trials=10)
    places = []
    for study in (read_study(tmp_path), read_study(tmp_path / "stage2")):
        low, high = (study.space["mix.label_smoothing"][end] for end in ("low", "high"))
        values = [trial.values["mix.label_smoothing"] for trial in study.trials]
        places.append([(value - low) / (high - low) for value in values])
    assert all(abs(a - b) > 1e-6 for a, b in zip(*places))
    assert [stage.seed for stage in read_search(tmp_path).stages] == [0, 1]


def test_a_stage_that_has_begun_keeps_its_space_and_gets_the_further_trials(tmp_path, calls):
    search(tmp_path, stages=2, trials=20)
    made = (tmp_path / "stage2.json").read_text()
    space = read_study(tmp_path / "stage2").space
    del calls[:]
    search(tmp_path, stages=2, trials=60)
    assert calls == [("stage2", 50, None)]
    assert (tmp_path / "stage2.json").read_text() == made
    assert read_study(tmp_path / "stage2").space == space
    assert len(read_study(tmp_path).trials) == 10


def test_a_search_that_is_stopped_between_its_stages_goes_on(tmp_path, calls, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stages, "set_fixed_fields", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            search(tmp_path, stages=2, trials=20)
    assert (tmp_path / "stage2.json").is_file()
    assert len(read_search(tmp_path).stages) == 1
    search(tmp_path, stages=2, trials=20)
    assert [name for name, *_ in calls] == [tmp_path.name, "stage2"]
    assert len(read_search(tmp_path).stages) == 2


def test_training_steps_are_divided_too(tmp_path, calls):
    search(tmp_path, stages=2, trials=100, budget_steps=20 * STEPS)
    assert calls == [(tmp_path.name, 50, 10 * STEPS), ("stage2", 90, 10 * STEPS)]
    calls.clear()
    search(tmp_path / "steps", stages=2, trials=None, budget_steps=20 * STEPS)
    assert calls == [("steps", None, 10 * STEPS), ("stage2", None, 10 * STEPS)]


def test_three_stages_narrow_three_times(tmp_path, calls):
    search(tmp_path, stages=3, trials=30)
    assert [trials for _, trials, _ in calls] == [10, 10, 10]
    record = read_search(tmp_path)
    widths = [
        math.log10(stage.space["schedule.learning_rate"]["high"])
        - math.log10(stage.space["schedule.learning_rate"]["low"])
        for stage in record.stages
    ]
    assert widths[0] >= widths[1] >= widths[2]
    # Fields that a coarser stage fixed are known in all finer ones.
    assert all(trial.drawn["optimizer.name"] == "adam" for trial in record.stages[2].trials)


def test_stages_are_reported_together(tmp_path, calls):
    search(tmp_path, stages=2, trials=24)
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    record = read_search(tmp_path)
    best = max(record.trials, key=lambda trial: trial.value)
    assert record.best == best
    assert f"| {best.name} | {100 * best.value:.2f} |" in text
    assert text.count("12 trials (12 complete)") == 2
    assert "Stage 2 is made of stage 1's best trials: " in text
    assert "| `optimizer.name` | sgd, adam | adam |" in text
    assert (tmp_path / "importance2.png").exists()
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["1"] * 12 + ["2"] * 12


def test_a_field_whose_condition_depends_on_a_field_that_is_left_out_is_left_out(tmp_path, calls):
    space = SPACE | {
        # sgd is never among the best, so Nesterov momentum and what depends on it are left out.
        "optimizer.momentum": uniform(0.5, 0.9, when={"optimizer.nesterov": True}),
        "train.ema": uniform(0.5, 0.9, when={"optimizer.nesterov": False}),
    }
    config = common.get_config()
    stages.tune_in_stages(config, space, tmp_path, stages=2, trials=20)
    finer = read_study(tmp_path / "stage2")
    assert "optimizer.momentum" not in finer.space
    assert "train.ema" in finer.space  # the config has no Nesterov momentum


def test_too_few_trials_and_too_few_stages_are_refused(tmp_path, calls):
    with pytest.raises(UserError, match=r"at least 5 trials a stage, so --trials=10 or more"):
        search(tmp_path, stages=2, trials=9)
    assert calls == []
    search(tmp_path, stages=2, trials=10)
    with pytest.raises(UserError, match="has more stages than 1; give --stages=2"):
        search(tmp_path, stages=1, trials=10)
