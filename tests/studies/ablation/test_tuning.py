"""Rows that are tuned: spaces, equal budgets, what the cells get, and the report.

The search and the ablation are real; only the runs are made up, by a formula of their config.
"""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys

import pytest

from configs.ablations import regularizers_tuned
from configs.common import get_config
from flax_cnns import config as configs
from flax_cnns.config.spaces import choice, integer, log_uniform, uniform
from flax_cnns.errors import UserError
from flax_cnns.runs import child
from flax_cnns.studies.ablation import ablate, forecast, plan, tuning, tuning_report, untuned
from flax_cnns.studies.ablation.tuned_rows import TunedRow, TunedTrial, read_tuned_row
from flax_cnns.studies.search import tuning as searches
from tests.sweeps import write_json

RATE, MIXUP = "schedule.learning_rate", "mix.mixup"
SPACE = {RATE: log_uniform(0.01, 1.0)}
SWEEP = [("none", {}), ("mixup", {MIXUP: 0.2}, {MIXUP: log_uniform(0.02, 2.0)})]


@pytest.fixture
def config():
    """LeNet-5 on noise, with a validation split."""
    config = get_config()
    config.data.update(dict(mock=64, validation=16, batch_size=16, eval_batch_size=64))
    config.train.update(dict(duration="4 steps", eval_every="0 steps"))
    config.schedule.update(dict(name="constant", learning_rate=0.1))
    config.checkpoint.every = "0 steps"
    config.log.tensorboard = False
    return config


def score(config):
    """The best rate is 0.3, the best mixup 1.0; a rate above 0.9 diverges."""
    rate, mixup = config.schedule.learning_rate, config.mix.mixup
    gain = 0.05 - 0.05 * math.log10(mixup) ** 2 if mixup else 0.0
    return 0.8 - 0.1 * math.log10(rate / 0.3) ** 2 + gain


@pytest.fixture
def runs(monkeypatch):
    """Makes up all runs. Returns the list of (config, workdir) that were started."""
    started = []

    def start(config, workdir, out, slot, *, accept_changed_data=False):
        started.append((config, workdir))
        value = score(config) + 1e-3 * (config.seed % 7)
        is_tested = config.train.test_on != "never"
        line = {"step": 4, "time": 5.0, "validation/accuracy": value}
        line |= {"test/accuracy": value - 0.01} if is_tested else {}
        write_json(workdir / "config.json", configs.to_plain(config))
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        code = 3 if config.schedule.learning_rate > 0.9 else 0
        if not code:
            summary = {"step": 4, "validation/best_accuracy": value}
            write_json(workdir / "summary.json", summary)
        return subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"], stdin=-1)

    monkeypatch.setattr(child, "start", start)
    return started


def test_an_ablation_with_tuned_rows(config, runs, tmp_path, capsys, monkeypatch):
    # Only tune at first: no cell runs, and the report has the trials alone.
    options = dict(tune=4, space=SPACE)
    assert ablate.ablate(config, SWEEP, tmp_path, seeds=0, **options) == {}
    printed = capsys.readouterr().out
    assert "equal budgets: 4 trials for each of 2 rows, 8 trials" in printed
    assert re.search(r"row none: trial \d is the best: \S+=0\.\d{1,5}\n", printed)
    assert len(runs) == 8
    assert {run.seed for run, _ in runs} == {tuning.SEED_OFFSET}
    assert {run.train.test_on for run, _ in runs} == {"never"}
    assert (tmp_path / "report.md").read_text().startswith(f"# Ablation: {tmp_path.name}\n\n## Tun")
    with (tmp_path / "tuning.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["trial"]) for line in lines[3:5]] == [("none", "3"), ("mixup", "0")]

    # Trial 0 is the row as it is, and the best trial of each row is chosen.
    chosen = {}
    for name, path in (("none", RATE), ("mixup", MIXUP)):
        mine = [line for line in lines if line["row"] == name]
        assert json.loads(mine[0]["values"])[path] == {"none": 0.1, "mixup": 0.2}[name]
        assert [line["untuned"] for line in mine] == ["1", "0", "0", "0"]
        best = max(mine, key=lambda line: float(line["value"]))
        assert [line for line in mine if line["chosen"] == "1"] == [best]
        chosen[name] = json.loads(best["values"])
    assert chosen["none"][RATE] != 0.1  # 0.3 is the best rate, and a trial is nearer

    # Rows are tuned in pieces: a command for one row leaves the others in the plan.
    rows = plan.make_rows(config, SWEEP, tmp_path)
    described = tuning.describe_plan(tuning.plan_tuning(rows, SPACE), 4)
    plan.write_plan(tmp_path, config, rows, 0, ["none"], tuning=described)
    recorded = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["name"] for row in recorded["rows"]] == ["none", "mixup"]

    # The cells have the chosen values, other seeds, and the row's own settings.
    runs.clear()
    counts = ablate.ablate(config, SWEEP, tmp_path, seeds=2, **options)
    assert counts == {"complete": 4}
    assert [run.seed for run, _ in runs] == [0, 0, 1, 1]
    for run, workdir in runs:
        values = chosen[workdir.parent.name]
        assert run.schedule.learning_rate == values[RATE]
        assert run.mix.mixup == values.get(MIXUP, 0.0)
        assert run.train.test_on == config.train.test_on
        assert workdir.parts[-1].startswith("seed")
    report = (tmp_path / "report.md").read_text()
    assert "2 rows × 2 seeds; the baseline is `none`. Every row is tuned." in report
    assert "| mixup | 4 of 4 | `schedule.learning_rate=" in report

    # Nothing is left to tune, and Optuna is not needed to say so.
    runs.clear()
    monkeypatch.setitem(sys.modules, "optuna", None)
    rows = plan.make_rows(config, SWEEP, tmp_path)
    tunings = tuning.plan_tuning(rows, SPACE)
    tuned, _ = tuning.tune_rows(tunings, tmp_path, 4)
    assert runs == []
    cells = plan.make_cells(list(tuned.values()), tmp_path, 2)
    tuning.check_cells(cells)

    # Cells that began are not mixed with others.
    def refuse(message, described):
        with pytest.raises(UserError, match=message):
            plan.write_plan(tmp_path, config, rows, 2, tuning=described)

    refuse("--tune: 4 trials there, 8 here", tuning.describe_plan(tunings, 8))
    refuse("--tune: tuned there, not tuned here", None)
    wider = tuning.plan_tuning(rows, {RATE: log_uniform(0.01, 2.0)})
    refuse("the space of row none differs", tuning.describe_plan(wider, 4))
    untuned = plan.make_cells(rows, tmp_path, 2)
    with pytest.raises(UserError, match="began with other values than the row's tuning chooses"):
        tuning.check_cells(untuned)


def test_a_row_of_diverging_trials_is_left_out(config, runs, tmp_path, capsys):
    hot = {RATE: choice(0.95, 0.99)}
    config.schedule.learning_rate = 0.95
    counts = ablate.ablate(config, SWEEP[:1], tmp_path, seeds=1, tune=2, space=hot)
    assert counts == {"failed": 1}
    assert len(runs) == 2
    assert "row none: none of its 2 trials is complete: diverged" in capsys.readouterr().out
    assert (
        "Not all 2 trials of a row are complete: none (0)" in (tmp_path / "report.md").read_text()
    )


def test_a_killed_tuning_goes_on(config, runs, tmp_path, monkeypatch):
    rows = plan.make_rows(config, SWEEP[:1])
    (row,) = tuning.plan_tuning(rows, SPACE)
    start = child.start

    def stop_before_the_third(*arguments, **options):
        if len(runs) == 2:
            raise RuntimeError("killed")
        return start(*arguments, **options)

    monkeypatch.setattr(child, "start", stop_before_the_third)
    with pytest.raises(RuntimeError, match="killed"):
        tuning.tune_rows([row], tmp_path, 4)
    assert read_tuned_row(tmp_path, "none") is None
    assert tuning.count_done(tmp_path, "none") == 2
    monkeypatch.setattr(child, "start", start)
    tuned, failed = tuning.tune_rows([row], tmp_path, 4)
    assert len(runs) == 4
    assert failed == {}
    assert tuned["none"].config.schedule.learning_rate != 0.1
    # Equal to a tuning that was not killed.
    tuning.tune_rows([row], tmp_path / "whole", 4)
    first, second = (read_tuned_row(f, "none") for f in (tmp_path, tmp_path / "whole"))
    assert first == second


def test_a_row_that_was_tuned_on_other_data_is_not_taken(config, runs, tmp_path, capsys):
    (row,) = tuning.plan_tuning(plan.make_rows(config, SWEEP[:1]), SPACE)
    tuning.tune_rows([row], tmp_path, 2)
    path = tmp_path / "none/tuned.json"
    known = json.loads(path.read_text())
    assert known["data"] == {}  # noise has no fingerprint
    now = {"reader": "arrays", "classes": ["a"], "splits": {"train": {"images": 9}}}
    write_json(path, known | {"data": now | {"splits": {"train": {"images": 8}}}})
    tuning.check_data([row], tmp_path, 2, {"none": {}}, accept=False)  # nothing to compare with
    message = "row none was tuned on other data: train had 8 images, has 9"
    with pytest.raises(UserError, match=f"{message}; restore the data, remove .*none to tune"):
        tuning.check_data([row], tmp_path, 2, {"none": now}, accept=False)
    tuning.check_data([row], tmp_path, 2, {"none": now}, accept=True)
    assert f"accepted: {message}" in capsys.readouterr().out
    tuning.check_data([row], tmp_path, 3, {"none": now}, accept=False)  # to be tuned again
    del known["config"]
    write_json(path, known)
    with pytest.raises(UserError, match="damaged: it has no 'config'; remove it, and the same"):
        tuning.tune_rows([row], tmp_path, 2)


def test_a_start_compares_the_data_of_tuned_rows(config, runs, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(tuning, "check_data", lambda *args, **words: given.append((args, words)))
    monkeypatch.setattr(forecast, "time_steps", lambda *_: (0.01, 1.0))
    options = dict(tune=2, space=SPACE, dry_run=True, accept_changed_data=True)
    ablate.ablate(config, SWEEP, tmp_path / "a", rows=["mixup"], **options)
    (((rows, folder, trials, data), words),) = given
    assert ([row.row.name for row in rows], trials, data) == (["mixup"], 2, {"mixup": {}})
    assert (folder, words) == (tmp_path / "a", {"accept": True})


def test_a_dry_run_prints_equal_budgets_and_writes_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forecast, "time_steps", lambda *_: (0.01, 1.0))  # 64 images: 1.64 s
    folder = tmp_path / "study"
    given = dict(seeds=2, jobs=1, tune=3, space=SPACE, dry_run=True)
    assert ablate.ablate(config, SWEEP, folder, **given) == {}
    printed = capsys.readouterr().out
    assert "equal budgets: 3 trials for each of 2 rows, 6 trials without pruning" in printed
    assert "over spaces of 1 to 2 fields; scored on the validation split" in printed
    assert "schedule.learning_rate 0.01 to 1, log" in printed
    name = choice("sgd", "adam", when={"mix.mixup": 0.0})
    assert tuning.describe_range(name) == "sgd or adam, conditional"
    assert "6 trials left and 4 cells, 0 done; 1 at once, about 0:00:16 left" in printed
    assert not folder.exists()


def test_optuna_is_asked_for_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r'pip install "flax_cnns\[tune\]"'):
        ablate.ablate(config, SWEEP[:1], tmp_path / "study", tune=2, space=SPACE)
    assert not (tmp_path / "study").exists()


# ---- spaces of rows


def test_the_values_of_the_untuned_row_are_found(config):
    rows = plan.make_rows(regularizers_tuned.get_config("smoke"), regularizers_tuned.sweep())
    found = {t.row.name: t.untuned for t in tuning.plan_tuning(rows, regularizers_tuned.space())}
    assert len(found) == 19
    for name, path, value in (
        ("none", RATE, 0.025 * 4),
        ("weight_decay", "optimizer.weight_decay", 5e-4),  # inside of a rule
        ("randaugment", "data.augment.randaugment", 9),  # the second number of two
        ("augment", "data.augment.flip", True),
        ("ema", "train.ema", 0.99),
        ("together", MIXUP, 0.2),
    ):
        assert found[name][path] == pytest.approx(value)
    (plain,) = tuning.plan_tuning(rows[:1], {MIXUP: uniform(0.1, 1.0)})
    assert plain.untuned is None  # mixup is off in this row, and the range does not contain 0


def test_a_field_of_all_rows_is_left_out_where_its_condition_is_false(config):
    rows = plan.make_rows(config, SWEEP)
    common = SPACE | {"train.ema": uniform(0.5, 0.9, when={MIXUP: 0.2})}
    none, mixup = tuning.plan_tuning([row._replace(space={}) for row in rows], common)
    assert list(none.space) == [RATE]
    assert list(mixup.space) == [RATE, "train.ema"]
    with pytest.raises(UserError, match=r"no row ever draws train\.ema; in the last one, when"):
        tuning.plan_tuning(rows[:1], common)
    own = rows[0]._replace(space={"train.ema": common["train.ema"]})
    with pytest.raises(UserError, match=r"row none: space\(\): train\.ema is never drawn"):
        tuning.plan_tuning([own, rows[1]], common)


@pytest.mark.parametrize(
    ("sweep", "space", "message"),
    [
        (SWEEP[:1], {}, "--tune: row none has no space: give it as the third part of the row"),
        (
            [("mixup", {MIXUP: 5.0}, SWEEP[1][2])],
            {},
            "row mixup: the space of mix.mixup does not contain the row's own value 5.0: widen it",
        ),
        (SWEEP[:1], {"mix.mixupp": uniform(0, 1)}, "row none: space(): unknown field 'mix.mixupp'"),
        (
            SWEEP[:1],
            {RATE: uniform(1, 0)},
            "row none: space(): schedule.learning_rate: ",
        ),
    ],
)
def test_mistakes_of_a_space(config, sweep, space, message):
    with pytest.raises(UserError) as error:
        tuning.plan_tuning(plan.make_rows(config, sweep), space)
    assert message in str(error.value)


def test_flags_that_do_not_go_together(config, tmp_path):
    def refuse(message, **options):
        with pytest.raises(UserError, match=message):
            ablate.ablate(config, SWEEP, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()

    refuse("with --tune, the baseline has trials of its own", tune=2, space=SPACE, baseline="b")
    refuse("--seeds: expected one or more, got 0", seeds=0)
    refuse("--index: row mixup is not tuned yet", tune=2, space=SPACE, seeds=1, index=1)
    refuse("--seeds: with --tune at most 10000", tune=2, space=SPACE, seeds=10_001)


def test_the_first_trial_must_be_in_the_space(config, tmp_path):
    with pytest.raises(UserError, match=r"a first trial has schedule\.learning_rate=7"):
        searches.tune(config, SPACE, tmp_path, trials=1, first=[{RATE: 7}])


# ---- the report


def make_row(*, best, mode="max", scores=(0.7, 0.9, 0.8, None), values=None):
    values = values or [{RATE: 0.1}, {RATE: 0.97}, {RATE: 0.3}, {RATE: 0.5}]
    space = {RATE: {"kind": "float", "low": 0.01, "high": 1.0, "log": True}}
    space["n"] = {"kind": "integer", "low": 1, "high": 9, "log": False}
    trials = [
        TunedTrial(i, v, v, "failed" if s is None else "complete", s)
        for i, (v, s) in enumerate(zip(values, scores))
    ]
    return TunedRow("row", space, "validation/accuracy", mode, trials, best, True)


def test_ranks_and_edges_by_hand():
    row = make_row(best=1)
    assert tuning_report.rank_untuned(row) == (3, 3)  # 0.7 is the lowest of three
    assert tuning_report.rank_untuned(row._replace(mode="min")) == (1, 3)
    assert tuning_report.rank_untuned(row._replace(has_untuned=False)) is None
    # log(0.97 / 0.01) / log(100) = 0.993.
    assert tuning_report.find_edges(row) == [f"high {RATE}"]
    assert tuning_report.find_edges(row._replace(best=2)) == []
    low = make_row(best=0, values=[{RATE: 0.012, "n": 9}], scores=(0.5,))
    assert tuning_report.find_edges(low) == [f"low {RATE}", "high n"]


def test_the_section_of_the_report():
    plan_of = {"tuning": {"trials": 4}, "rows": [{"name": "row"}, {"name": "later"}]}
    text = "\n".join(tuning_report.format_section([make_row(best=1)], plan_of))
    assert (
        "| row | 3 of 4 | `schedule.learning_rate=0.97` | high `schedule.learning_rate` | 70.00"
        " | 90.00 | +20.00 | 70.00, 80.00, 90.00 | 3 of 3 |"
    ) in text
    assert "Not all 4 trials of a row are complete: row (3)." in text
    # Less loss is a gain.
    loss = make_row(best=2, mode="min", scores=(0.9, 1.2, 0.7))._replace(metric="validation/loss")
    text = "\n".join(tuning_report.format_section([loss], plan_of))
    assert "| 0.9000 | 0.7000 | +0.2000 | 1.2000, 0.9000, 0.7000 | 2 of 3 |" in text
    assert "Not tuned yet: later." in text
    assert tuning_report.format_section([], {"rows": []}) == []


def test_integers_are_drawn_as_integers():
    drawn = untuned.find_untuned({"a": 7.0}, {"a": integer(1, 9)}, set())
    assert drawn == {"a": 7}
    assert isinstance(drawn["a"], int)
