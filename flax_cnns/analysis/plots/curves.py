"""Learning curves: what `metrics.jsonl` says, as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flax_cnns.analysis.plots import style
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes, widen_single_point
from flax_cnns.errors import UserError

STYLES = {  # line and marker differ too
    "train": dict(color=style.BLUE, linestyle="-", marker=""),
    "validation": dict(color=style.VERMILION, linestyle="--", marker="o", markersize=3.5),
    "test": dict(color=style.BLACK, linestyle="", marker="*", markersize=13),
}
MIN_SMOOTHED_POINTS = 100  # from so many points on, the running mean is drawn above the points
PANELS = ("loss", "accuracy", "learning_rate")

Series = tuple[np.ndarray, np.ndarray]  # steps and values, [points] each; a value may be NaN


def draw_curves(
    metrics_jsonl: str | os.PathLike,
    png: str | os.PathLike,
    title: str = "",
    *,
    metric: str = "accuracy",
    mode: str = "max",
) -> None:
    """Draws loss, accuracy and learning rate over the steps into a PNG, whole or not at all.

    `metric` takes the place of accuracy; its best value is the highest, or the lowest if `mode` is
    "min". A panel that the log has nothing for is left out; values that are not finite are marked
    at the panel's foot. Raises `UserError` where the log cannot be read or the picture not be
    written.
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
    """{"train/loss": (steps, values)}; lines that are no JSON (a torn last one) are skipped."""
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
    # As floats, the log's null becomes NaN.
    return {name: tuple(np.array(columns, float).T) for name, columns in points.items()}


def _compare_splits(axes: Axes, name: str, series: dict[str, Series | None], lowest: bool) -> None:
    """One panel: `name` of each split that has it, the best and the test's value in words."""
    best = np.nanargmin if lowest else np.nanargmax
    seen = []
    for split, found in series.items():
        if found is None:
            continue
        steps, values = found
        finite = np.isfinite(values)
        style, label = STYLES[split], split
        if finite.any():
            seen.append(values[finite])
            at = best(values)
            if split == "validation":
                label = f"validation, best {_number(values[at])} at {steps[at]:.0f}"
                if len(values) >= MIN_SMOOTHED_POINTS:
                    style = style | dict(marker="")
            elif split == "test":
                label = f"test {_number(values[at])}"
            elif len(values) < MIN_SMOOTHED_POINTS:
                style = style | dict(marker=".")  # a lone point must show, too
            else:
                axes.plot(steps, values, color=style["color"], alpha=0.3, linewidth=0.8)
                values = _running_mean(values, len(values) // (MIN_SMOOTHED_POINTS // 2))
                label = "train, running mean"
            axes.plot(steps, values, label=label, **style)
        _mark_not_finite(axes, steps[~finite], split)
    everything = np.concatenate([*seen, []])
    if name == "loss" and everything.size and 0 < 20 * everything.min() < everything.max():
        _log_scale(axes)
    if not everything.size:
        axes.set_yticks([])  # they would be numbers about nothing
    axes.set_title(name)
    alone = len({float(x) for line in axes.get_lines() for x in line.get_xdata()}) == 1
    axes.legend(frameon=False, fontsize="small", loc="center right" if alone else "best")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _learning_rate(axes: Axes, series: Series) -> None:
    steps, values = series
    finite = np.isfinite(values)
    marker = "." if len(values) < 2 else ""
    # Drawn over the axis, where a rate of zero lies.
    axes.plot(steps, values, color=STYLES["train"]["color"], marker=marker, zorder=3, clip_on=False)
    _mark_not_finite(axes, steps[~finite], "rate")
    rates = values[finite & (values > 0)]
    # Where a quarter of the run has less than an eighth of the highest rate (steps, exponential
    # decay), a linear axis would hide it; a cosine stays linear.
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
            transform=axes.get_xaxis_transform(),  # the foot of the panel, whatever its scale
            clip_on=False,
            label=f"{split}: {steps.size} not finite",
        )


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """[points]: the mean of the `width` values around each, near the ends of those there are."""
    finite, window = np.isfinite(values), np.ones(width)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    counts = np.convolve(finite, window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
