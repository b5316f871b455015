"""Comparing runs, in folders written by hand."""

from __future__ import annotations

import types

import pytest
from rich.console import Console

from flax_cnns.cli import flags as script
from flax_cnns.errors import UserError
from flax_cnns.runs import compare
from tests.sweeps import rename_accuracy, write_json, write_run


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "a" / "plain", 0.9, fit=0.97)
    write_run(tmp_path / "b" / "mixed", 0.92, mix__mixup=0.2, data__batch_size=32)
    write_run(tmp_path / "b" / "cut", 0.8, end=False, points=4)
    (tmp_path / "b" / "cut" / "metrics.jsonl").open("a").write('{"step": 5')  # an incomplete line
    return [tmp_path / "a" / "plain", tmp_path / "b" / "mixed", tmp_path / "b" / "cut"]


def render(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_differences_and_results(runs):
    records = compare.read_runs([*runs, runs[0]])
    assert list(records) == ["a/plain", "b/mixed", "b/cut"]
    text = render(compare.make_config_table(records)).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text if "│" in line]
    assert cells == [["a/plain", "64", "0.0"], ["b/mixed", "32", "0.2"], ["b/cut", "64", "0.0"]]
    two = render(
        compare.make_config_table(compare.read_runs(runs[:2]))
    )  # as many fields: each a line
    assert [line.split()[1::2] for line in two.splitlines() if "mix.mixup" in line] == [
        ["mix.mixup", "0.0", "0.2"]
    ]
    text = render(compare.make_result_table(records)).splitlines()
    plain, _, cut = (next(line.split("│") for line in text if name in line) for name in records)
    assert [cell.strip() for cell in plain[2:4]] == ["complete", "120"]
    assert [plain[6].strip(), plain[8].strip()] == ["90.00", "7.00"]
    assert [cell.strip() for cell in cut[2:4]] == ["unfinished", "40"]
    assert [cut[6].strip(), cut[8].strip()] == ["-", "-"]
    assert compare.make_config_table(compare.read_runs(runs[:1])) is None


def test_curves_are_over_images_seen_if_batch_sizes_differ(runs, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(compare, "save_picture", lambda figure, png: saved.append(figure))
    compare.draw_runs(compare.read_runs(runs), tmp_path / "x.png")
    compare.draw_runs(compare.read_runs([runs[0], runs[2]]), tmp_path / "x.png")
    both, steps = (figure.axes for figure in saved)
    assert [axes.get_xlabel() for axes in (*both, *steps)] == ["images seen"] * 3 + ["step"] * 3
    ends = [max(line.get_xdata()) for line in both[1].lines if len(line.get_xdata()) > 1]
    assert ends == [7680, 7680, 3840, 3840, 2560, 2560]  # training and validation of each run
    assert [text.get_text() for text in saved[0].legends[0].get_texts()][2] == "b/cut (unfinished)"


def test_a_run_that_has_only_begun_is_drawn(runs, tmp_path):
    (runs[2] / "metrics.jsonl").unlink()
    records = compare.read_runs(runs)
    compare.draw_runs(records, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "unfinished" in render(compare.make_result_table(records))


def test_a_run_of_any_name_is_in_the_legend(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "save_picture", lambda figure, png: drawn.append(figure))
    runs[0].rename(tmp_path / "a" / "_old")
    compare.draw_runs(
        compare.read_runs([tmp_path / "a" / "_old", tmp_path / "a" / "_old"]), "x.png"
    )
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["_old"]


def test_a_folder_without_a_run_is_a_one_line_error(runs, tmp_path):
    with pytest.raises(UserError, match=r"none: no run here \(config.json is missing\)"):
        compare.read_runs([*runs, tmp_path / "none"])


def test_the_time_of_an_interrupted_run_is_the_sum_of_its_sessions(tmp_path):
    from flax_cnns.runs import record as records
    from flax_cnns.train.writer import read_jsonl

    write_run(tmp_path / "run", 0.9, end=False, points=2)
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    later = [line | {"time": line["time"] + 1e6} for line in first]
    record = records.read_record(tmp_path / "run")
    assert record.seconds == pytest.approx(4.0)  # 2 s until the first step, then 2 windows of 1 s
    assert record._replace(lines=first + later).seconds == pytest.approx(8.0)
    assert record._replace(lines=[]).seconds is None


def test_a_picture_without_a_name_replaces_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag = types.SimpleNamespace(name="out", value="comparison.png")

    def choose(present, **kwargs):
        given = {"out": types.SimpleNamespace(present=present)}
        monkeypatch.setattr(script.flags, "FLAGS", given)
        return script.choose_picture_path(flag, **kwargs)

    assert choose(0) == ("comparison.png", "comparison.png")
    (tmp_path / "comparison.png").touch()
    (tmp_path / "comparison-2.png").symlink_to("nowhere")
    assert choose(0)[0] == "comparison-3.png"
    assert choose(1) == ("comparison.png", "comparison.png, which replaces the old file")
    with pytest.raises(UserError, match=r"comparison\.png is one of the photos"):
        choose(1, inputs=[str(tmp_path / "missing.png"), str(tmp_path / "comparison.png")])
    for value, message in (("none/a.png", "there is no folder none"), (".", "is a folder")):
        flag.value = value
        with pytest.raises(UserError, match=message):
            choose(1)


def columns(runs, metric):
    """The heading and the rows of the results, as strings."""
    table = compare.make_result_table(compare.read_runs(runs), metric)
    return [column.header for column in table.columns], list(zip(*(c.cells for c in table.columns)))


def test_another_metric_takes_the_place_of_the_accuracy(runs, tmp_path, monkeypatch):
    head, rows = columns(runs, "loss")
    assert head[3:7] == ["validation loss", "best", "test loss", "train − test"]
    assert rows[0][5] == "0.1"
    assert float(rows[0][4]) == pytest.approx(0.2, abs=0.02)  # the lowest value
    rename_accuracy(tmp_path, "f1", "b/mixed")
    head, rows = columns(runs, "f1")
    assert head[3:7] == ["validation f1", "best", "test f1", "test loss"]
    assert [row[5] for row in rows] == ["-", "0.92", "-"]
    assert rows[1][4] == "-"  # the config does not say whether more is better
    assert columns(runs, "accuracy")[1][1][3:6] == ("-", "-", "-")
    drawn = []
    monkeypatch.setattr(compare, "save_picture", lambda figure, png: drawn.append(figure))
    for metric in ("f1", "loss"):
        compare.draw_runs(compare.read_runs(runs), "x.png", metric)
    titles = [[axes.get_title() for axes in figure.axes] for figure in drawn]
    assert titles == [["loss", "f1", "learning rate"], ["loss", "learning rate"]]


def test_the_best_value_of_an_own_metric_uses_its_runs_mode(tmp_path):
    for mode in ("min", "max"):
        chosen = dict(train__best_by="validation/f1", train__best_mode=mode)
        write_run(tmp_path / mode / "seed0", 0.9, **chosen)
    rename_accuracy(tmp_path, "f1")
    runs = [tmp_path / mode / "seed0" for mode in ("min", "max")]
    low, high = (float(row[4]) for row in columns(runs, "f1")[1])
    assert low < 0.6 < 0.85 < high


def test_the_training_examples_may_be_evaluated_later(tmp_path):
    write_run(tmp_path / "run", 0.9)
    records = compare.read_runs([tmp_path / "run"])
    assert columns([tmp_path / "run"], "accuracy")[1][0][7] == "-"
    note = compare.explain_missing_fit(records, "accuracy")
    assert f"evaluate --workdir={tmp_path / 'run'} --split=train`" in note
    write_json(tmp_path / "run" / "evaluation_train_60.json", {"accuracy": 0.8})  # another step
    assert columns([tmp_path / "run"], "accuracy")[1][0][7] == "-"
    write_json(tmp_path / "run" / "evaluation_train_120.json", {"accuracy": 0.96})
    assert columns([tmp_path / "run"], "accuracy")[1][0][7] == "6.00"
    assert compare.explain_missing_fit(records, "accuracy") == ""
    write_json(tmp_path / "run" / "summary.json", {"test/step": 60})  # the best one was tested
    assert columns([tmp_path / "run"], "accuracy")[1][0][7] == "-10.00"


def test_a_metric_that_no_run_logged_is_a_one_line_error(runs, tmp_path):
    records = compare.read_runs(runs)
    assert compare.check_metric(records, "validation/loss") == "loss"
    with pytest.raises(UserError, match=r"none of these runs logged 'los'; did you mean 'loss'"):
        compare.check_metric(records, "los")
    rename_accuracy(tmp_path, "label_accuracy")
    records = compare.read_runs(runs)
    assert compare.check_metric(records, "accuracy") == "accuracy"  # its columns show "-"
    assert compare.find_metrics(records) == ["label_accuracy", "loss"]
