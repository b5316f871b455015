"""An ablation's report on a folder written by hand: numbers, broken cells, bold print."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest

from flax_cnns.analysis.plots import forest
from flax_cnns.analysis.statistics import Difference, Interval
from flax_cnns.errors import UserError
from flax_cnns.studies.ablation import pictures, summaries
from flax_cnns.studies.ablation import report as ablation_report
from flax_cnns.studies.ablation.summaries import RowSummary
from tests.sweeps import rename_accuracy, write_json, write_sweep

BASE = [(0.90, 0.99), (0.91, 0.98), (0.92, 0.97)]
ROWS = {
    "plain": ({}, BASE),
    # Differences 0.010, 0.012, 0.014: t = 0.012 / (0.002 / sqrt 3) = 10.39, p = 0.00913.
    "better": ({"mix.mixup": 0.2}, [(0.91, 0.95), (0.922, 0.95), (0.934, 0.95)]),
    # Differences 0.04, 0.00, -0.04.
    "unsure": ({"mix.label_smoothing": 0.1}, [(0.94, None), (0.91, None), (0.88, None)]),
    "broken": (
        {"schedule.learning_rate": 9.0, "data.batch_size": 32},
        [(0.93, 0.99), ("diverged", "step 7: not finite"), ("failed", "out of memory")],
    ),
    "unborn": ({"optimizer.name": "adam"}, [None, ("interrupted", ""), None]),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(folder, rows of the CSV by name, the Markdown)."""
    folder = write_sweep(tmp_path_factory.mktemp("ablation") / "sweep", ROWS)
    paths = ablation_report.write(folder)
    assert [path.name for path in paths] == ["report.md", "report.csv", "forest.png", "curves.png"]
    return folder, read(folder), (folder / "report.md").read_text()


def read(folder):
    with (folder / "report.csv").open() as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def line(markdown, name):
    row = next(text for text in markdown.splitlines() if text.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def numbers(row, *names):
    return [float(row[name]) for name in names]


def test_means_and_paired_differences_by_hand(report):
    _, rows, markdown = report
    # Standard deviation 0.01, t(0.975, 2) = 4.302653.
    half = 4.302653 * 0.01 / 3**0.5
    values = numbers(rows["plain"], "accuracy", "accuracy_low", "accuracy_high", "error_high")
    np.testing.assert_allclose(values, [0.91, 0.91 - half, 0.91 + half, 0.09 + half], atol=1e-7)
    half = 4.302653 * 0.002 / 3**0.5
    values = numbers(rows["better"], "difference", "difference_low", "difference_high", "p")
    np.testing.assert_allclose(values, [0.012, 0.012 - half, 0.012 + half, 0.009132], atol=1e-6)
    np.testing.assert_allclose(float(rows["better"]["p_holm"]), 2 * 0.009132, atol=1e-5)
    assert line(markdown, "plain")[2:5] == [
        "91.00 [88.52, 93.48]",
        "9.00 [6.52, 11.48]",
        "baseline",
    ]
    assert numbers(rows["plain"], "gap", "pairs") == pytest.approx([0.07, 0])
    assert numbers(rows["better"], "accuracy_seed0", "accuracy_seed2") == [0.91, 0.934]


def test_only_significant_differences_are_bold(report):
    _, _, markdown = report
    assert line(markdown, "better")[4] == "**+1.20 [+0.70, +1.70]**"
    assert line(markdown, "unsure")[4] == "+0.00 [-9.94, +9.94]"
    assert markdown.count("**") == 2


def test_an_interval_without_zero_is_not_bold_when_holm_says_no(tmp_path):
    """The p-value is 0.0091 alone, and 0.055 with five more rows."""
    rows = {"plain": ROWS["plain"], "better": ROWS["better"]}
    rows |= {f"other{i}": ROWS["unsure"] for i in range(5)}
    ablation_report.write(write_sweep(tmp_path, rows))
    assert line((tmp_path / "report.md").read_text(), "better")[4:7] == [
        "+1.20 [+0.70, +1.70]",
        "0.009",
        "0.055",
    ]


def test_an_interval_that_is_printed_with_a_zero_is_not_bold():
    summary = RowSummary(*[None] * 4, pairs=(), p_holm=0.01)
    for low, bold in ((0.0002, True), (0.00004, False), (-0.0002, False), (float("nan"), False)):
        interval = Interval(0.01, low, 0.02 if low == low else low, 5)
        difference = Difference(interval, 0.01)
        assert summary._replace(difference=difference).is_significant == bold
        assert not summary._replace(difference=difference, p_holm=0.06).is_significant


def test_what_a_row_costs(report):
    _, rows, markdown = report
    # 640 images a second in each window, batches of 64; 2 s to the first line, 13 s to the last.
    assert numbers(rows["plain"], "seconds_per_step", "seconds") == pytest.approx([0.1, 15.0])
    assert float(rows["broken"]["seconds_per_step"]) == pytest.approx(0.05)  # with batches of 32
    assert rows["plain"]["parameters"] == rows["better"]["parameters"]
    assert int(rows["plain"]["macs"]) > 0
    assert rows["unborn"]["parameters"] == ""
    assert line(markdown, "unborn")[7:] == ["-"] * 5


def test_broken_cells_are_listed_and_do_not_affect_the_others(report):
    _, rows, markdown = report
    assert line(markdown, "broken")[1] == "1 of 3 (1 diverged, 1 failed)"
    assert line(markdown, "broken")[4:7] == ["+3.00", "-", "-"]  # one pair: no interval
    assert line(markdown, "unborn")[1] == "0 of 3 (1 interrupted, 2 missing)"
    assert [rows["broken"][key] for key in ("complete", "failed", "diverged")] == ["1"] * 3
    assert "- broken, seed 1: diverged: step 7: not finite" in markdown
    assert "- broken, seed 2: failed: out of memory" in markdown
    assert "`mix.mixup=0.2`" in markdown
    assert rows["unsure"]["gap"] == ""  # the training examples were not evaluated


def test_the_same_report_from_the_logs_alone(report, tmp_path):
    folder, _, markdown = report
    copy = tmp_path / "sweep"
    shutil.copytree(folder, copy)
    for path in [*copy.glob("report.*"), *copy.glob("*/seed0/summary.json")]:
        path.unlink()
    ablation_report.write(copy)
    assert (copy / "report.md").read_text() == markdown
    assert (copy / "report.csv").read_text() == (folder / "report.csv").read_text()


def test_a_damaged_log_affects_only_its_cell_and_changed_data_are_reported(tmp_path):
    folder = write_sweep(tmp_path, {"plain": ROWS["plain"], "better": ROWS["better"]})
    log = folder / "plain/seed1/metrics.jsonl"
    log.write_text("what is this\n" + log.read_text())
    for path in folder.glob("*/seed*/dataset.json"):  # the data changed before the last seed
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(facts | {"fingerprint": {"last": "seed2" in str(path)}}))
    ablation_report.write(folder)
    markdown = (folder / "report.md").read_text()
    assert "**Not all cells saw the same data**" in markdown
    assert line(markdown, "plain")[1] == "2 of 3 (1 damaged)"
    assert line(markdown, "better")[4].endswith("(2 pairs)")
    assert "seed1/metrics.jsonl, line 1" in markdown


def test_without_a_baseline_there_are_no_differences(tmp_path):
    rows = {"plain": ({}, [None] * 3), "better": ROWS["better"]}
    ablation_report.write(write_sweep(tmp_path, rows), interval="bootstrap")
    markdown = (tmp_path / "report.md").read_text()
    assert line(markdown, "better")[4] == "- (0 pairs)"
    assert "No seed of the baseline is complete" in markdown
    assert "bootstrap" in markdown
    assert "the same data" not in markdown


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (None, "no ablation here"),
        ([None] * 3, r"no cell is complete \(3 missing\), so there is nothing to report"),
        ([None, ("failed", "x"), ("failed", "y")], r"\(2 failed, 1 missing\)"),
    ],
)
def test_a_report_without_results_is_a_one_line_error(tmp_path, cells, message):
    if cells:
        write_sweep(tmp_path, {"plain": ({}, cells)})
    with pytest.raises(UserError, match=message) as error:
        ablation_report.write(tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("report.*"))


def test_curves_use_the_split_that_was_logged_often_enough(tmp_path, monkeypatch):
    """Validation curves, or smoothed training curves if each run validated only once."""
    drawn = {}
    save = lambda rows, baseline, png, **words: drawn.update(rows=rows, **words)  # noqa: E731
    monkeypatch.setattr(forest, "draw_row_curves", save)
    folder = write_sweep(tmp_path, {"plain": ROWS["plain"], "better": ROWS["better"]})
    ablation_report.write(folder)
    assert drawn["y_label"] == "validation accuracy, %"
    assert len(drawn["rows"]["plain"][0][0]) == 12
    for log in folder.glob("*/*/metrics.jsonl"):
        lines = log.read_text().splitlines()
        train = '{"step": %d, "time": 200, "train/accuracy": %d}'
        kept = [line for line in lines if "validation" not in line or '"step": 120' in line]
        more = [train % (120 + step, step % 2) for step in range(1, 101)]
        log.write_text("\n".join([*kept, *more]) + "\n")
    ablation_report.write(folder)
    assert drawn["y_label"] == "training batches' accuracy, %"
    x, y = drawn["rows"]["plain"][0]
    assert len(x) == len(y) == 25
    np.testing.assert_allclose(y[-15:], 50, atol=11)  # each point averages four or five batches
    assert (np.diff(x) > 0).all()


# ---- other metrics


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory):
    """A folder whose report a test may write again."""
    rows = {name: ROWS[name] for name in ("plain", "better")}
    return write_sweep(tmp_path_factory.mktemp("metrics") / "sweep", rows)


def test_a_report_of_the_loss_has_plain_numbers_and_no_error(two_rows, monkeypatch):
    drawn = []
    keep = lambda effects, png, **words: drawn.append((effects, words))  # noqa: E731
    monkeypatch.setattr(forest, "draw_forest", keep)
    ablation_report.write(two_rows, metric="test/loss")  # the logged loss is 1 - accuracy
    markdown, rows = (two_rows / "report.md").read_text(), read(two_rows)
    assert line(markdown, "row")[2:7] == ["test loss", "difference", "p", "p Holm", "train − test"]
    assert line(markdown, "plain")[2:4] == ["0.09000 [0.06516, 0.11484]", "baseline"]
    assert line(markdown, "better")[3:6] == [
        "**-0.01200 [-0.01697, -0.00703]**",
        "0.009",
        "0.009",
    ]
    assert "train − test is the loss on" in markdown
    assert "A positive difference means more loss" in markdown
    assert numbers(rows["better"], "loss", "loss_seed2") == pytest.approx([0.078, 0.066])
    assert not {"accuracy", "error"} & set(rows["better"])
    (((effect,), words),) = drawn
    assert effect.interval.mean == pytest.approx(-0.012)
    assert words["title"] == "against plain: 0.09000, n=3"
    assert words["x_label"] == "difference of test loss"
    assert not words["more_is_better"]


def test_a_report_of_an_own_metric_and_a_cell_without_it(two_rows, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(two_rows, folder)
    rename_accuracy(folder, "gap")  # also the name of a column in every report
    log = folder / "better/seed1/metrics.jsonl"
    log.write_text(log.read_text().replace('/gap"', '/other"'))
    ablation_report.write(folder, metric="gap")
    markdown, rows = (folder / "report.md").read_text(), read(folder)
    assert line(markdown, "row")[2] == "test gap"
    assert line(markdown, "better")[1] == "2 of 3 (1 without gap)"
    assert line(markdown, "better")[3] == "+0.0120 [-0.0134, +0.0374]"
    assert "- better, seed 1: without gap: its run is complete, but has no finite" in markdown
    assert numbers(rows["plain"], "test_gap", "gap") == pytest.approx([0.91, 0.07])
    with pytest.raises(UserError, match=r"no complete cell of .* logged test/gpa; did you mean 'g"):
        ablation_report.write(folder, metric="gpa")
    with pytest.raises(UserError, match=r"--metric: .* test/accuracy; known: gap, loss, other$"):
        ablation_report.write(folder)


def test_fractions_are_percentages_with_their_error(two_rows, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(two_rows, folder)
    rename_accuracy(folder, "label_accuracy")
    ablation_report.write(folder, metric="label_accuracy")
    markdown, rows = (folder / "report.md").read_text(), read(folder)
    assert line(markdown, "row")[2:4] == ["test label_accuracy, %", "test error, %"]
    assert line(markdown, "plain")[2:4] == ["91.00 [88.52, 93.48]", "9.00 [6.52, 11.48]"]
    assert numbers(rows["plain"], "label_accuracy", "error") == pytest.approx([0.91, 0.09])


def test_a_complete_run_without_a_test_is_complete(tmp_path):
    folder = write_sweep(tmp_path, {"plain": ROWS["plain"]})
    for log in folder.glob("*/*/metrics.jsonl"):
        log.write_text("\n".join(x for x in log.read_text().splitlines() if "test/" not in x))
    with pytest.raises(UserError, match="logged test/accuracy; they logged no test metric"):
        ablation_report.write(folder)


def test_an_own_network_has_its_parameters_and_changed_code_is_reported(two_rows, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(two_rows, folder)
    for path in folder.glob("*/seed?"):
        config = json.loads((path / "config.json").read_text())
        config["model"]["name"] = "mine:Net"  # a report does not import it
        write_json(path / "config.json", config)
        write_json(path / "summary.json", {"params": 1234})
        digest = "b" if path.name == "seed2" else "a"
        write_json(path / "own.json", {"model": [{"name": "mine:Net", "digest": digest}]})
    ablation_report.write(folder)
    markdown = (folder / "report.md").read_text()
    assert line(markdown, "plain")[8:10] == ["1,234", "-"]
    assert "**Not all cells ran the same code**: the source of `mine:Net` changed." in markdown


def test_curves_of_a_metric_that_falls_show_where_they_end(two_rows, tmp_path, monkeypatch):
    drawn = []
    save = lambda figure, png: drawn.append(figure)  # noqa: E731
    monkeypatch.setattr(forest, "save_picture", save)
    ablation_report.write(two_rows, metric="loss")
    ablation_report.write(two_rows)
    (falls, rises) = (drawn[i].axes[0] for i in (1, 3))
    curve = falls.get_lines()[0].get_ydata()  # 1.1 - accuracy
    low, high = falls.get_ylim()
    assert low < curve.min() < curve[len(curve) // 5] < high < curve[0]
    assert rises.get_title().splitlines() == ["plain", f"{100 * (1.1 - curve[-1]):.2f}"]


def test_a_margin_says_what_is_equivalent_and_what_is_only_not_significant(tmp_path, monkeypatch):
    for name in ("draw_differences", "draw_curves"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    monkeypatch.setattr(summaries, "count_params_and_macs", lambda *_: None)
    rows = {
        "plain": ROWS["plain"],
        "unsure": ROWS["unsure"],  # differences 0.04, 0.00, -0.04
        # Differences 1, 0, -1 thousandths: t = 0.01 / (0.001 / sqrt 3) = 17.3, p = 0.00166.
        "alike": ({"mix.mixup": 0.1}, [(0.901, None), (0.91, None), (0.919, None)]),
        # Differences 0.010, 0.012, 0.014: t = 0.022 / 0.0011547 = 19.05 above -0.01, p = 0.00137.
        "better": ROWS["better"],
        "lone": ({"mix.mixup": 0.3}, [(0.93, 0.99), None, None]),
    }
    folder = write_sweep(tmp_path, rows)
    ablation_report.write(folder, margin=1.0)
    markdown, found = (folder / "report.md").read_text(), read(folder)
    assert "| p Holm | within ±1 points | train − test, points |" in markdown
    verdicts = {name: line(markdown, name)[7] for name in rows}
    assert verdicts == {
        "plain": "-",
        "unsure": "undecided",
        "alike": "equivalent, p 0.002",
        "better": "not worse, p 0.001",
        "lone": "-",
    }
    assert "rejects that the row is worse by 1 point or more" in markdown
    values = numbers(found["better"], "margin", "p_not_worse")
    np.testing.assert_allclose(values, [0.01, 0.001372], atol=1e-6)
    assert float(found["better"]["p_equivalent"]) > 0.5
    np.testing.assert_allclose(float(found["alike"]["p_equivalent"]), 0.001660, atol=2e-6)
    assert found["plain"]["p_not_worse"] == found["lone"]["p_not_worse"] == ""
    ablation_report.write(folder, metric="loss", margin=0.01)  # the loss is 1 - accuracy
    markdown = (folder / "report.md").read_text()
    assert line(markdown, "better")[6] == "not worse, p 0.001"
    assert "within ±0.01 |" in markdown
    ablation_report.write(folder)
    assert "within" not in (folder / "report.md").read_text()
    assert "margin" not in read(folder)["better"]
    with pytest.raises(UserError, match="margin: expected a number above 0, got -1"):
        ablation_report.write(folder, margin=-1.0)
