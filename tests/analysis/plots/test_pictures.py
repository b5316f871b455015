"""The layout of every figure with one point, one row, hundreds of rows, and long names."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from experiments.benchmarks import report
from flax_cnns.analysis.plots import confusion, curves, forest, predictions, style
from flax_cnns.analysis.statistics import Interval
from flax_cnns.runs import compare
from flax_cnns.runs.record import RunRecord as Run
from flax_cnns.studies.finetune import report as finetune_report
from flax_cnns.studies.finetune.compare import StrategyComparison, StrategyRecord

LONG = [
    f"a class with quite a long name, as the synsets of ImageNet have, n0{i}" for i in range(10)
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved."""
    saved: list[Figure] = []
    for module in (compare, confusion, curves, finetune_report, predictions, forest):
        monkeypatch.setattr(module, "save_picture", lambda figure, png: saved.append(figure))
    return saved


def texts(labels):
    return [label.get_text() for label in labels]


def laid_out(figure):
    """Returns the figure after its layout is computed."""
    figure.draw_without_rendering()
    return figure


def overlap(labels):
    boxes = [label.get_window_extent() for label in labels]
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_shortened_names_keep_both_ends():
    assert curves.shorten("short", 5) == "short"
    assert curves.shorten("n02123045_tabby_cat.jpeg", 15) == "n02123045….jpeg"
    short = [curves.shorten(name, 24) for name in LONG]
    assert len(set(short)) == len(LONG)
    assert max(map(len, short)) <= 24


def result(targets, fractions, strategies, base=1000):
    records = [
        StrategyRecord(target, fraction, round(base * fraction), strategy, seed, 0.9, 0.9, 1.0, {})
        for target in targets
        for fraction in fractions
        for strategy in strategies
        for seed in range(2)
    ]
    return StrategyComparison("run", tuple(targets), fractions, strategies, 2, records)


def test_strategies_of_one_size_stand_together(figures):
    strategies = tuple(finetune_report._STYLES)
    finetune_report.draw(result(["digits"], (1.0,), strategies), "x.png")
    (panel,) = figures[0].axes
    low, high = np.log(panel.get_xlim())
    xs = np.log([float(line.get_xdata()[0]) for line, *_ in panel.containers])
    assert len(xs) == len(strategies)
    assert np.ptp(xs) < 0.35 * (high - low)
    assert xs.mean() == pytest.approx(np.log(1000))
    assert np.mean([low, high]) == pytest.approx(np.log(1000))


def test_sizes_that_are_close_are_numbered_once_and_targets_stand_in_rows(figures):
    finetune_report.draw(result(LONG[:6], (0.5, 0.501, 1.0), ("scratch",), 60_000), "x.png")
    panels = [axes for axes in laid_out(figures[0]).axes if axes.get_visible()]
    assert texts(panels[0].get_xticklabels()) == ["30,000", "60,000"]
    assert len(panels) == 6
    assert figures[0].get_figwidth() < 20
    assert not overlap([panel.title for panel in panels])


@pytest.mark.parametrize(("classes", "names"), [(10, LONG), (2, LONG[:2]), (200, [])])
def test_a_confusion_matrix_has_room_for_names_and_counts(figures, classes, names):
    matrix = np.diag(np.full(classes, 123_456))
    confusion.draw_confusion(matrix, names or ["c"] * classes, "x.png")
    axes = laid_out(figures[0]).axes[0]
    box = axes.get_window_extent()
    assert box.width > 0.5 * figures[0].bbox.width
    cell = box.width / classes
    assert all(text.get_window_extent().width <= cell for text in axes.texts)
    assert not overlap(axes.get_yticklabels())
    assert axes.get_ylabel() == ("true class" if names else "true class, numbered from 0")


def test_one_step_stands_on_its_number_and_beside_the_legend(figures, tmp_path):
    log = tmp_path / "m.jsonl"
    values = {"loss": 2.0, "accuracy": 0.5}
    record = {f"{split}/{k}": v for split in curves.STYLES for k, v in values.items()}
    log.write_text(json.dumps({"step": 7, "learning_rate": 0.0, **record}))
    curves.draw_curves(log, tmp_path / "x.png", title="t" * 500)
    figure = laid_out(figures[0])
    for axes in figure.axes:
        assert axes.get_xlim() == (6, 10)
        assert all(tick == round(tick) for tick in axes.get_xticks())
        point = axes.transData.transform((7, axes.get_ylim()[1]))
        legend = axes.get_legend()
        assert legend is None or legend.get_window_extent().x0 > point[0] + 10
    assert not figure.axes[2].get_lines()[0].get_clip_on()  # a rate of zero is on the axis
    assert figure._suptitle.get_window_extent().width < figure.bbox.width


def run(lines, step=1):
    config = ConfigDict({"data": {"batch_size": 8}})
    found = [{"step": step + i, "train/loss": 1.0, "validation/loss": 2.0} for i in range(lines)]
    return Run(pathlib.Path("nowhere"), config, found)


def test_runs_beside_each_other(figures):
    compare.draw_runs({f"run{i}": run(2) for i in range(64)}, "x.png")
    figure = figures.pop()
    lines = figure.axes[0].get_lines()[-64:]
    styles = {(*np.atleast_1d(line.get_color()), line.get_linestyle()) for line in lines}
    assert len(styles) == 64
    assert max(figure.get_size_inches()) < 20
    compare.draw_runs({"a" * 200: run(1), "b": run(0)}, "x.png")
    loss, accuracy, _ = laid_out(figures.pop()).axes
    assert loss.get_xlim() == (0, 2)
    assert texts(accuracy.texts) == ["not logged"]
    assert loss.get_window_extent().width > 200


def test_rows_with_long_names_and_many_of_them(figures):
    series = (np.arange(3.0), np.arange(3.0))
    forest.draw_row_curves(
        {name: [series] for name in LONG}, LONG[0], "x.png", y_label="w", x_label="a"
    )
    figure = laid_out(figures.pop())
    assert not overlap([axes.title for axes in figure.axes if axes.get_visible()])
    rows = {f"row{i}": [series] for i in range(36)}
    forest.draw_row_curves(rows, "row0", "x.png", y_label="w", x_label="a")
    width, height = figures.pop().get_size_inches()
    assert height < width
    one = (np.array([100.0]), np.array([50.0]))
    forest.draw_row_curves({"a": [one], "b": [one]}, "a", "x.png", y_label="w", x_label="a")
    assert [axes.get_xlim() for axes in figures.pop().axes] == [(99, 101)] * 2


def test_a_forest_of_long_names_and_of_none(figures):
    effects = [forest.ForestRow(name, Interval(1.0, 0.5, 1.5, 3), [1.0]) for name in LONG]
    forest.draw_forest(effects, "x.png", title="t" * 300, x_label="w")
    figure = laid_out(figures.pop())
    (axes,) = figure.axes
    assert axes.get_window_extent().width > 0.25 * figure.bbox.width
    assert axes.get_yticklabels()[0].get_window_extent().x0 >= 0
    forest.draw_forest([], "x.png", title="t", x_label="w")
    assert texts(figures.pop().axes[0].texts) == ["only the baseline "]


def test_photos_keep_the_ends_of_names_and_a_bounded_number_of_bars(figures):
    photo = ("n02123045_tabby_cat_without_any_space_in_its_name.jpeg", Image.new("RGB", (9, 9)))
    guesses = [(f"{LONG[0]}{i}", 0.01) for i in range(100)]
    predictions.draw_predictions([(*photo, (0, 0, 9, 9))], [guesses], "x.png")
    left, right = laid_out(figures[0]).axes
    assert left.get_title().startswith("n02123045_tabby_cat")
    assert left.get_title().endswith("name.jpeg")
    labels = right.get_yticklabels()
    assert len(set(texts(labels))) == predictions.MAX_CLASSES
    assert not overlap(labels)


def test_bars_of_many_series_and_of_many_decades(monkeypatch):
    saved = []
    monkeypatch.setattr(style, "save_picture", lambda figure, png: saved.append(figure))
    report.draw_bars(report.Bars(["a"], {f"s{i}": [1.0] for i in range(8)}, "ms"), "t", "x.png")
    colors = {bars.patches[0].get_facecolor() for bars in saved.pop().axes[0].containers}
    assert len(colors) == 8
    report.draw_bars(report.Bars(["a", "b"], {"s": [1e-4, 1e6]}, "ratio", 1.0), "t", "x.png")
    assert len(list(filter(None, texts(laid_out(saved.pop()).axes[0].get_xticklabels())))) > 3
