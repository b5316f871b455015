"""Learning curves from the log: what is drawn, where, and how unusual logs are handled."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from flax_cnns.analysis.plots import curves
from flax_cnns.analysis.plots.curves import draw_curves
from flax_cnns.errors import UserError


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, for a look at their lines."""
    saved, save = [], curves.save_picture

    def keep(figure, png):
        saved.append(figure)
        save(figure, png)

    monkeypatch.setattr(curves, "save_picture", keep)
    return saved


def write(path, records):
    path.write_text("".join(json.dumps({"time": 0.0, **record}) + "\n" for record in records))
    return path


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def run(steps, every=20):
    return [
        {"step": s, "train/loss": 2.0 / s, "train/accuracy": 1 - 1 / s, "learning_rate": 0.1}
        for s in range(every, steps + 1, every)
    ]


def test_loss_accuracy_and_learning_rate(tmp_path, figures):
    records = run(200)
    records += [
        {"step": s, "validation/loss": loss, "validation/accuracy": 1 - loss}
        for s, loss in ((100, 0.25), (150, 0.125), (200, 0.5))
    ]
    records += [{"step": 200, "test/loss": 0.3, "test/accuracy": 0.9917}]
    draw_curves(write(tmp_path / "m.jsonl", records), tmp_path / "curves.png", title="digits")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "m.jsonl"]
    loss, accuracy, rate = figures[0].axes
    assert [a.get_title() for a in figures[0].axes] == ["loss", "accuracy", "learning rate"]
    assert labels(loss) == ["train", "validation, best 0.1250 at 150", "test 0.3000"]
    assert labels(accuracy) == ["train", "validation, best 0.8750 at 150", "test 0.9917"]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata()[-1], 1 - 1 / 200)
    assert accuracy.lines[2].get_xdata() == [200]
    assert loss.get_yscale() == "log"  # 0.5 and 0.01 on one axis
    assert rate.get_yscale() == "linear"


def test_a_long_run_gets_a_running_mean_that_skips_what_is_not_finite(tmp_path, figures):
    noise = np.random.default_rng(0).normal(1.0, 0.2, 400)
    records = [{"step": s, "train/loss": v} for s, v in enumerate(noise, start=1)]
    records[99]["train/loss"] = None
    draw_curves(write(tmp_path / "m.jsonl", records), tmp_path / "curves.png")
    [loss] = figures[0].axes
    points, mean, lost = loss.lines
    assert labels(loss) == ["train, running mean", "train: 1 not finite"]
    assert np.isnan(points.get_ydata()[99])
    assert np.nanstd(mean.get_ydata()) < 0.6 * np.nanstd(points.get_ydata())
    np.testing.assert_allclose(
        mean.get_ydata()[99], noise[[*range(95, 99), *range(100, 103)]].mean()
    )
    assert lost.get_xdata() == [100]


def test_steps_of_ten_are_drawn_on_a_log_scale_and_a_cosine_is_not(tmp_path, figures):
    steps = np.arange(100)
    for rates in (0.1 ** (1 + steps // 34), 0.05 * (1 + np.cos(np.pi * steps / 100))):
        records = [{"step": int(s), "learning_rate": float(r)} for s, r in zip(steps, rates)]
        draw_curves(write(tmp_path / "m.jsonl", records), tmp_path / "curves.png")
    assert [figure.axes[0].get_yscale() for figure in figures] == ["log", "linear"]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "norm/grads": 1.0}],
        run(20),
        [{"step": s, "train/loss": None, "train/accuracy": None} for s in (1, 2)],
        [{"step": 1, "learning_rate": None}],
        [{"step": 1, "test/loss": None, "test/accuracy": 0.1}],
    ],
)
def test_odd_logs_are_drawn_without_a_warning(tmp_path, records):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(write(tmp_path / "m.jsonl", records), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 500


def test_a_torn_line_is_skipped(tmp_path, figures):
    path = write(tmp_path / "m.jsonl", run(60))
    path.write_text(path.read_text() + '{"step": 80, "tra')
    draw_curves(path, tmp_path / "curves.png")
    assert figures[0].axes[0].lines[0].get_xdata().tolist() == [20, 40, 60]


def test_a_log_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*m\.jsonl"):
        draw_curves(tmp_path / "m.jsonl", tmp_path / "curves.png")
    with pytest.raises(UserError, match=r"cannot write the picture .*curves\.png"):
        draw_curves(write(tmp_path / "m.jsonl", run(20)), tmp_path / "none" / "curves.png")


def test_a_picture_is_what_its_name_says(tmp_path):
    figure = Figure(figsize=(1, 1))
    for name, begins in (("a.png", b"\x89PNG"), ("a.jpg", b"\xff\xd8"), ("a", b"\x89PNG")):
        curves.save_picture(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)
    with pytest.raises(UserError, match=r"a\.jpgg: use a suffix such as \.png"):
        curves.save_picture(figure, tmp_path / "a.jpgg")
    assert not list(tmp_path.glob("*.tmp"))
