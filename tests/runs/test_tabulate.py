"""A table of evaluations, from folders written by hand."""

from __future__ import annotations

import csv
import io
import pathlib

import pytest
from rich.console import Console

from flax_cnns.errors import UserError
from flax_cnns.evaluation.uncertainty import wilson_interval
from flax_cnns.runs import tabulate
from tests.sweeps import write_json, write_run


def evaluation(step, accuracy, **changed):
    found = dict(split="test", step=step, checkpoint="latest", examples=360, loss=0.5)
    found |= dict(accuracy=accuracy, top5=1.0)
    found["intervals"] = {"accuracy": [accuracy - 0.02, accuracy + 0.02], "loss": [0.4, 0.6]}
    return found | changed


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for name, accuracy in (("one", 0.9), ("two", 0.8), ("three", 0.7), ("none", 0.6)):
        write_run(tmp_path / name, accuracy)
    write_json(tmp_path / "one/evaluation_test_60.json", evaluation(60, 0.5))
    write_json(tmp_path / "one/evaluation_test_120.json", evaluation(120, 0.75))
    write_json(tmp_path / "one/evaluation_test_120_crops10.json", evaluation(120, 0.95))
    write_json(tmp_path / "one/evaluation_validation_120.json", evaluation(120, 0.1))
    write_json(tmp_path / "two/evaluation_test_120.json", evaluation(120, 0.80))
    old = {k: v for k, v in evaluation(120, 0.70).items() if k != "intervals"}
    write_json(tmp_path / "three/evaluation_test_120.json", old)
    monkeypatch.chdir(tmp_path)
    return ["one", "two", "three", "none"]


def test_the_best_run_first_with_intervals_and_what_is_missing(runs):
    table = tabulate.collect_evaluations([*runs, "one"])
    assert [(row.run, row.step) for row in table.rows] == [
        ("two", 120),
        ("one", 120),
        ("three", 120),
    ]
    assert table.missing == [("none", "flax-cnns evaluate --workdir=none")]
    assert table.rows[0].intervals["accuracy"] == pytest.approx((0.78, 0.82))
    assert table.rows[2].intervals["accuracy"] == wilson_interval(252, 360)  # of an older version
    markdown = tabulate.format_markdown(table).splitlines()
    assert (
        markdown[0] == "| model | run | size | parameters | MACs | top-1, % | top-5, % | images |"
    )
    assert markdown[2] == (
        "| lenet5 | two | 32 | 61,706 | 416,520 | 80.00 [78.00, 82.00] | 100.00 [98.94, 100.00] |"
        " 360 |"
    )
    console = Console(width=160)
    with console.capture() as capture:
        console.print(tabulate.make_rich_table(table))
    assert "80.00 [78.00, 82.00]" in capture.get()


def test_the_csv_has_fractions_and_empty_cells(runs):
    table = tabulate.collect_evaluations(runs)
    rows = list(csv.DictReader(io.StringIO(tabulate.format_csv(table))))
    assert [row["run"] for row in rows] == ["two", "one", "three"]
    assert [float(rows[0][f"accuracy{end}"]) for end in ("", "_low", "_high")] == pytest.approx(
        [0.8, 0.78, 0.82]
    )
    assert [rows[0][name] for name in ("loss_high", "parameters", "macs", "size", "step")] == [
        *("0.6", "61706", "416520", "32", "120")
    ]
    assert [rows[2][name] for name in ("loss", "loss_low", "protocol")] == ["0.5", "", ""]


def test_a_protocol_a_split_and_another_order(runs):
    table = tabulate.collect_evaluations(runs, protocol="crops10")
    assert [row.metrics["accuracy"] for row in table.rows] == [0.95]
    assert len(table.missing) == 3
    assert "Split test, crops10." in tabulate.format_markdown(table)
    larger = evaluation(120, 0.85, protocol={"name": "crops1_size40", "size": 40})
    write_json(pathlib.Path("one/evaluation_test_120_crops1_size40.json"), larger)
    (row,) = tabulate.collect_evaluations(runs, protocol="crops1_size40").rows
    assert (row.size, row.params, row.macs) == ("40", 61706, None)
    table = tabulate.collect_evaluations(runs, split="validation")
    assert table.missing[0][1] == "flax-cnns evaluate --workdir=two --split=validation"
    table = tabulate.collect_evaluations(runs, sort="name")
    assert [row.run for row in table.rows] == ["one", "three", "two"]


def test_labels_of_multilabel_data_and_several_data_sets(runs, tmp_path):
    tags = dict(split="test", step=120, examples=50, loss=0.2, label_accuracy=0.9)
    tags["intervals"] = {"label_accuracy": [0.85, 0.94]}
    write_json(tmp_path / "none/evaluation_test_120.json", tags)
    (tmp_path / "none/dataset.json").unlink()
    table = tabulate.collect_evaluations(runs)
    markdown = tabulate.format_markdown(table).splitlines()
    assert "| top-1, % | top-5, % | label accuracy, % |" in markdown[0]
    line = next(line for line in markdown if "| none |" in line)
    assert line == "| lenet5 | none | - | - | - | - | - | 90.00 [85.00, 94.00] | 50 |"
    rows = [row._replace(data=f"set {i}") for i, row in enumerate(table.rows)]
    assert tabulate.format_markdown(table._replace(rows=rows)).startswith("| model | run | data |")


def test_a_file_of_an_evaluation_is_taken_itself(runs, tmp_path):
    weights = dict(split="imagenet_v2", model="lenet5", network="lenet5", examples=100)
    weights |= dict(accuracy=0.6, loss=1.0, protocol={"set": "imagenet_v2"})
    write_json(tmp_path / "weights.json", weights)
    files = ["weights.json", "one/evaluation_test_120_crops10.json"]
    own, published = tabulate.collect_evaluations([*files, "weights.json"]).rows
    assert (own.run, own.model, own.metrics["accuracy"]) == (files[1], "lenet5", 0.95)
    assert published.size == "32"
    assert (published.params, published.macs) == (own.params, own.macs) == (61706, 416520)
    assert (published.data, published.step) == ("imagenet_v2", 0)
    assert published.intervals["accuracy"] == wilson_interval(60, 100)
    write_json(tmp_path / "weights.json", {"model": "mine"})
    with pytest.raises(UserError, match=r"weights\.json .* names no network of flax_cnns"):
        tabulate.collect_evaluations(["weights.json"])
    with pytest.raises(UserError, match=r"no\.json: there is no such file"):
        tabulate.collect_evaluations(["no.json"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(sort="acuracy"), "--sort: expected accuracy, .*; did you mean 'accuracy'"),
        (
            dict(protocol="crop10"),
            "no run has evaluation_test_STEP_crop10.json; did you mean 'crops",
        ),
        (dict(split="train"), "none of these runs has evaluation_train_STEP.json; first run"),
    ],
)
def test_what_cannot_be_tabulated(runs, options, said):
    with pytest.raises(UserError, match=said):
        tabulate.collect_evaluations(runs, **options)


def test_damaged_files_and_other_suffixes_are_one_line(runs, tmp_path):
    with pytest.raises(UserError, match=r"expected a file \*.md or \*.csv, got 'x.txt'"):
        tabulate.format_for("x.txt", tabulate.collect_evaluations(runs))
    write_json(tmp_path / "two/evaluation_test_120.json", {"accuracy": 0.5})
    with pytest.raises(
        UserError, match=r"evaluation_test_120\.json is not as `evaluate` writes it"
    ):
        tabulate.collect_evaluations(runs)
