"""Draws rows that were trained with several seeds.

A forest plot shows the differences to the baseline; learning curves show the range of the seeds as
a band.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flax_cnns.analysis.plots import style
from flax_cnns.analysis.plots.curves import Series
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes, widen_single_point
from flax_cnns.analysis.statistics import Interval

BETTER, WORSE, UNKNOWN = style.BLUE, style.VERMILION, "#777777"
MAX_NAME_LENGTH = 48  # characters of a row's name in the forest plot
MAX_TITLE_LENGTH = 36  # characters of a row's name above its panel
CLIP_AT_MEDIANS = 4.0  # rows beyond this many times the median reach are cut off, with an arrow


class ForestRow(NamedTuple):
    """A row of the forest plot."""

    name: str
    interval: Interval  # of the mean difference to the baseline, in points
    seeds: Sequence[float]  # the difference of each seed
    note: str = ""  # shown if no seed has a difference


def draw_forest(
    forest_rows: Sequence[ForestRow],
    png: str | os.PathLike,
    *,
    title: str,
    x_label: str,
    decimals: int = 2,
    more_is_better: bool = True,
) -> None:
    """Draws a line per row, in the given order, with the seeds' differences, mean and interval.

    A row is gray if its interval includes zero or is unknown. The other rows have a color for
    better or worse, or one color if `more_is_better` is False. Raises `UserError` if the file
    cannot be written.
    """
    limit = _limit(forest_rows)
    figure = Figure(figsize=(8.6, 1.5 + 0.34 * len(forest_rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for y, row in enumerate(forest_rows):
        _draw_row(axes, y, row, limit, f"+.{decimals}f", WORSE if more_is_better else BETTER)
    axes.set_yticks(
        range(len(forest_rows)), [shorten(row.name, MAX_NAME_LENGTH) for row in forest_rows]
    )
    axes.set(xlim=(-limit, limit), ylim=(max(len(forest_rows), 1) - 0.4, -0.6))
    if not forest_rows:
        axes.text(0, 0, "only the baseline ", ha="right", va="center", color=UNKNOWN)
    axes.set_xlabel(f"{x_label}; ticks: seeds, bars: 95 % intervals, uncorrected")
    axes.set_title(shorten(title, 90), fontsize="medium", loc="left")
    axes.tick_params(axis="y", length=0, pad=10)  # space for an arrow
    tidy_axes(axes, grid="x", hidden=("top", "right", "left"))
    save_picture(figure, png)


def _limit(forest_rows: Sequence[ForestRow]) -> float:
    """Returns the limit of the axis: enough for all rows, unless a few reach much further."""
    reach = []
    for row in forest_rows:
        ends = (row.interval.mean, *row.interval[1:3], *row.seeds)
        reach += [max(abs(end) for end in ends if math.isfinite(end))] if row.seeds else []
    if not any(reach):
        return 1.0
    return 1.05 * min(max(reach), CLIP_AT_MEDIANS * float(np.median([r for r in reach if r])))


def _draw_row(axes: Axes, y: int, row: ForestRow, limit: float, form: str, negative: str) -> None:
    interval = row.interval
    right = axes.get_yaxis_transform()  # x as a fraction of the panel
    if not row.seeds:
        axes.text(1.02, y, row.note, transform=right, va="center", fontsize=9, color=UNKNOWN)
        return
    color = UNKNOWN
    if interval.excludes_zero:
        color = BETTER if interval.mean > 0 else negative
    inside = [seed for seed in row.seeds if abs(seed) <= limit]
    axes.plot(inside, [y] * len(inside), "|", color=color, markersize=9, alpha=0.45)
    words = f"{interval.mean:{form}}"
    if interval.is_known:
        low, high = np.clip(interval[1:3], -limit, limit)
        axes.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        words += f" [{interval.low:{form}}, {interval.high:{form}}]"
    if abs(interval.mean) <= limit:
        filled = color if interval.is_known else "white"
        axes.plot([interval.mean], [y], "o", color=color, markerfacecolor=filled, markersize=6)
    ends = interval[1:3] if interval.is_known else (interval.mean, interval.mean)
    for end, side, marker in zip(ends, (-limit, limit), "<>"):
        if abs(end) > limit and end * side > 0:
            axes.plot([side], [y], marker, color=color, markersize=8, clip_on=False)
    axes.text(1.02, y, f"{words}  n={interval.n}", transform=right, va="center", fontsize=9)


def draw_row_curves(
    rows: Mapping[str, Sequence[Series]],
    baseline: str,
    png: str | os.PathLike,
    *,
    x_label: str,
    y_label: str,
    decimals: int = 2,
    more_is_better: bool = True,
) -> None:
    """Draws a panel per row: the mean of the seeds, over a band from their lowest to their highest.

    A dashed line shows the mean of the baseline in every panel. All panels share their axes, which
    show the later part of the curves, where the rows differ. The title of a panel shows the last
    value, even if the curve lies outside the axes.
    """
    columns = min(len(rows), min((5, 4, 3), key=lambda columns: -len(rows) % columns))
    columns = max(columns, math.isqrt(len(rows)))  # hundreds of rows: not a long strip
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.7 * columns + 0.6, 2.1 * lines + 0.7), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    bands = {name: _band(series) for name, series in rows.items()}
    for axes, (name, (x, mean, low, high)) in zip(panels, bands.items()):
        if name != baseline and baseline in bands:
            marker = "." if len(bands[baseline][0]) < 3 else ""
            line = dict(color=UNKNOWN, linewidth=1.2, linestyle="--", marker=marker)
            axes.plot(*bands[baseline][:2], **line)
        color = "black" if name == baseline else BETTER
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(x, mean, color=color, linewidth=1.5, marker="." if len(x) < 3 else "")
        why_empty = "not logged" if rows[name] else "no complete run"
        last = f"{mean[-1]:.{decimals}f}" if len(mean) else why_empty
        axes.set_title(f"{shorten(name, MAX_TITLE_LENGTH)}\n{last}", fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        tidy_axes(axes)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[max(len(rows) - columns, 0) : len(rows)]:
        axes.tick_params(labelbottom=True)  # also above an empty panel
    if len({float(x) for xs, *_ in bands.values() for x in xs}) == 1:
        # All panels share their axes.
        widen_single_point(max(panels, key=lambda axes: len(axes.get_lines())))
    panels[0].set_ylim(*_limits(list(bands.values()), more_is_better))
    figure.supxlabel(x_label, fontsize="medium")
    figure.supylabel(y_label, fontsize="medium")
    save_picture(figure, png)


def _band(runs: Sequence[Series]) -> tuple[np.ndarray, ...]:
    """Returns (x, mean, lowest, highest), [points] each, over the runs with a finite value at x."""
    at: dict[float, list[float]] = {}
    for xs, ys in runs:
        for x, y in zip(xs, ys):
            if np.isfinite(y):
                at.setdefault(float(x), []).append(float(y))
    points = [(x, np.mean(ys), min(ys), max(ys)) for x, ys in sorted(at.items())]
    return tuple(np.array(points, float).reshape(-1, 4).T)


def _limits(bands: Sequence[tuple[np.ndarray, ...]], must_rise: bool) -> tuple[float, float]:
    """Returns limits of y. Curves are turned upside down for this if they may fall and most do."""
    ends = [mean[-1] - mean[0] for _, mean, _, _ in bands if len(mean)]
    if must_rise or not ends or np.median(ends) >= 0:
        return _find_late_limits(bands)
    bottom, top = _find_late_limits([(x, -mean, -high, -low) for x, mean, low, high in bands])
    return -top, -bottom


def _find_late_limits(bands: Sequence[tuple[np.ndarray, ...]]) -> tuple[float, float]:
    """Returns limits of y for rising curves.

    The upper limit is the highest value. The lower limit is the median over the rows of the lowest
    value after a fifth of the run. Curves of fewer than 5 points are shown whole.
    """
    nonempty = [band for band in bands if len(band[0])]
    if not nonempty:
        return 0.0, 100.0
    few = max(len(x) for x, *_ in nonempty) < 5
    lows = [low.min() if few else low[len(low) // 5] for _, _, low, _ in nonempty]
    bottom = float(min(lows) if few else np.median(lows))
    top = max(float(high.max()) for _, _, _, high in nonempty)
    margin = 0.06 * (top - bottom) or 1.0
    return bottom - margin, top + margin
