"""Draws the learning curves of a `metrics.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flax_cnns.analysis.plots import style
from flax_cnns.analysis.plots.style import (
    collect_x,
    save_picture,
    shorten,
    tidy_axes,
    widen_single_point,
)
from flax_cnns.errors import UserError

STYLES: dict[str, dict[str, Any]] = {  # colors, lines and markers all differ
    "train": dict(color=style.BLUE, linestyle="-", marker=""),
    "validation": dict(color=style.VERMILION, linestyle="--", marker="o", markersize=3.5),
    "test": dict(color=style.BLACK, linestyle="", marker="*", markersize=13),
}
MIN_SMOOTHED_POINTS = 100  # with this many points, a running mean is drawn above the points
PANELS = ("loss", "accuracy", "learning_rate")

Series = tuple[np.ndarray, np.ndarray]  # (steps, values), [points] each; values may be NaN


def draw_curves(
    metrics_jsonl: str | os.PathLike,
    png: str | os.PathLike,
    title: str = "",
    *,
    metric: str = "accuracy",
    mode: str = "max",
) -> None:
    """Draws loss, accuracy and learning rate over the steps, and writes the PNG atomically.

    `metric` replaces accuracy. The best value of `metric` is the highest, or the lowest if `mode`
    is "min". Panels without data are left out. Values that are not finite are marked at the bottom
    of the panel. Raises `UserError` if the log cannot be read or the picture cannot be written.
    """
    series = _read(Path(metrics_jsonl))
    panels = [metric if name == "accuracy" else name for name in PANELS]
    drawn = [name for name in panels if any(key.split("/")[-1] == name for key in series)]
    width = max(len(drawn), 1)
    figure = Figure(figsize=(4.6 * width, 3.8 if drawn else 1.2), layout="constrained")
    if title:
        figure.suptitle(shorten(title, 50 * width))
    if not drawn:
        figure.text(0.5, 0.4, "nothing has been logged yet", ha="center", va="center")
    for axes, name in zip(np.ravel(figure.subplots(1, len(drawn)) if drawn else []), drawn):
        if name == "learning_rate":
            _learning_rate(axes, series[name])
        else:
            lowest = name == "loss" or mode == "min"
            _compare_splits(axes, name, {s: series.get(f"{s}/{name}") for s in STYLES}, lowest)
        widen_single_point(axes, right=3)  # for the legend
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        tidy_axes(axes)
    save_picture(figure, png)


def _read(path: Path) -> dict[str, Series]:
    """Returns {"train/loss": (steps, values)}; skips lines that are not JSON, or incomplete."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name, value in record.items():
            if name not in ("step", "time"):
                points.setdefault(name, []).append((record["step"], value))
    series = {}
    for name, pairs in points.items():
        steps, values = np.array(pairs, float).T  # the log's null becomes NaN
        series[name] = steps, values
    return series


def _compare_splits(axes: Axes, name: str, series: dict[str, Series | None], lowest: bool) -> None:
    """Draws `name` of each split into a panel, with the best and the test value in the legend."""
    best = np.nanargmin if lowest else np.nanargmax
    finite_values = []
    for split, points in series.items():
        if points is None:
            continue
        steps, values = points
        finite = np.isfinite(values)
        style, label = STYLES[split], split
        if finite.any():
            finite_values.append(values[finite])
            at = best(values)
            if split == "validation":
                label = f"validation, best {_number(values[at])} at {steps[at]:.0f}"
                if len(values) >= MIN_SMOOTHED_POINTS:
                    style = style | dict(marker="")
            elif split == "test":
                label = f"test {_number(values[at])}"
            elif len(values) < MIN_SMOOTHED_POINTS:
                style = style | dict(marker=".")  # a single point must be visible
            else:
                axes.plot(steps, values, color=style["color"], alpha=0.3, linewidth=0.8)
                values = _running_mean(values, len(values) // (MIN_SMOOTHED_POINTS // 2))
                label = "train, running mean"
            axes.plot(steps, values, label=label, **style)
        _mark_not_finite(axes, steps[~finite], split)
    everything = np.concatenate([*finite_values, []])
    if name == "loss" and everything.size and 0 < 20 * everything.min() < everything.max():
        _log_scale(axes)
    if not everything.size:
        axes.set_yticks([])  # ticks would have no meaning
    axes.set_title(name)
    is_single = len(collect_x(axes)) == 1
    axes.legend(frameon=False, fontsize="small", loc="center right" if is_single else "best")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _learning_rate(axes: Axes, series: Series) -> None:
    steps, values = series
    finite = np.isfinite(values)
    marker = "." if len(values) < 2 else ""
    # Not clipped, because a rate of zero is on the axis.
    axes.plot(steps, values, color=STYLES["train"]["color"], marker=marker, zorder=3, clip_on=False)
    _mark_not_finite(axes, steps[~finite], "rate")
    rates = values[finite & (values > 0)]
    # A linear axis would hide the low rates of steps and exponential decay: for a quarter of such a
    # run, the rate is below an eighth of the highest rate. A cosine keeps the linear axis.
    if rates.size and np.quantile(rates, 0.25) < rates.max() / 8:
        _log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set_title("learning rate")


def _mark_not_finite(axes: Axes, steps: np.ndarray, split: str) -> None:
    if steps.size:
        axes.plot(
            steps,
            np.zeros_like(steps),
            "x",
            color="#CC79A7",
            transform=axes.get_xaxis_transform(),  # bottom of the panel at any scale
            clip_on=False,
            label=f"{split}: {steps.size} not finite",
        )


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of the `width` values around each point (fewer near the ends): [points]."""
    finite, window = np.isfinite(values), np.ones(width)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    counts = np.convolve(finite, window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
