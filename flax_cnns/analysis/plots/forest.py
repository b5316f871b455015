"""Pictures of rows, each trained with several seeds: a forest plot of the differences to the
baseline, and the learning curves with the seeds' range as a band."""

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

BETTER, WORSE, UNKNOWN = style.BLUE, style.VERMILION, "#777777"  # the sign says it too
MAX_NAME_LENGTH, MAX_TITLE_LENGTH = (
    48,
    36,
)  # characters of a row's name: at its line, above its panel
CLIP_AT_MEDIANS = (
    4.0  # beyond so many medians of the rows' reach a row leaves the picture, with an arrow
)


class ForestRow(NamedTuple):
    name: str
    interval: Interval  # of the difference to the baseline, in points
    seeds: Sequence[float]  # the differences that it is of
    note: str = ""  # instead of numbers, where there are none


def draw_forest(
    effects: Sequence[ForestRow],
    png: str | os.PathLike,
    *,
    title: str,
    what: str,
    decimals: int = 2,
    more_is_better: bool = True,
) -> None:
    """A line for each effect, in their order: every seed's difference, the mean and its interval,
    gray where that holds zero or is not there; `what` names the axis. Without `more_is_better` the
    color does not tell the sign. Raises `UserError` where it cannot be written."""
    limit = _limit(effects)
    figure = Figure(figsize=(8.6, 1.5 + 0.34 * len(effects)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for y, effect in enumerate(effects):
        _effect(axes, y, effect, limit, f"+.{decimals}f", WORSE if more_is_better else BETTER)
    axes.set_yticks(
        range(len(effects)), [shorten(effect.name, MAX_NAME_LENGTH) for effect in effects]
    )
    axes.set(xlim=(-limit, limit), ylim=(max(len(effects), 1) - 0.4, -0.6))
    if not effects:
        axes.text(0, 0, "only the baseline ", ha="right", va="center", color=UNKNOWN)
    axes.set_xlabel(f"{what}; ticks: seeds, bars: 95 % intervals, uncorrected")
    axes.set_title(shorten(title, 90), fontsize="medium", loc="left")
    axes.tick_params(axis="y", length=0, pad=10)  # room for an arrow
    tidy_axes(axes, grid="x", hidden=("top", "right", "left"))
    save_picture(figure, png)


def _limit(effects: Sequence[ForestRow]) -> float:
    """Of both sides of the axis: what all need, unless a few need much more than most."""
    reach = []
    for effect in effects:
        ends = (effect.interval.mean, *effect.interval[1:3], *effect.seeds)
        reach += [max(abs(end) for end in ends if math.isfinite(end))] if effect.seeds else []
    if not any(reach):
        return 1.0
    return 1.05 * min(max(reach), CLIP_AT_MEDIANS * float(np.median([r for r in reach if r])))


def _effect(axes: Axes, y: int, effect: ForestRow, limit: float, form: str, below: str) -> None:
    found = effect.interval
    right = axes.get_yaxis_transform()  # x as a share of the panel
    if not effect.seeds:
        axes.text(1.02, y, effect.note, transform=right, va="center", fontsize=9, color=UNKNOWN)
        return
    color = UNKNOWN
    if found.excludes_zero:
        color = BETTER if found.mean > 0 else below
    inside = [seed for seed in effect.seeds if abs(seed) <= limit]
    axes.plot(inside, [y] * len(inside), "|", color=color, markersize=9, alpha=0.45)
    words = f"{found.mean:{form}}"
    if found.is_known:
        low, high = np.clip(found[1:3], -limit, limit)
        axes.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        words += f" [{found.low:{form}}, {found.high:{form}}]"
    if abs(found.mean) <= limit:
        filled = color if found.is_known else "white"
        axes.plot([found.mean], [y], "o", color=color, markerfacecolor=filled, markersize=6)
    ends = found[1:3] if found.is_known else (found.mean, found.mean)
    for end, side, marker in zip(ends, (-limit, limit), "<>"):
        if abs(end) > limit and end * side > 0:
            axes.plot([side], [y], marker, color=color, markersize=8, clip_on=False)
    axes.text(1.02, y, f"{words}  n={found.n}", transform=right, va="center", fontsize=9)


def draw_row_curves(
    rows: Mapping[str, Sequence[Series]],
    baseline: str,
    png: str | os.PathLike,
    *,
    what: str,
    across: str,
    decimals: int = 2,
    more_is_better: bool = True,
) -> None:
    """A panel for each row: the mean of its seeds' series over a band from the lowest to the
    highest, in front of the baseline's mean. `what` and `across` name the axes; all panels share
    them, and show the later part of the curves, where the rows differ; what lies below (without
    `more_is_better` perhaps above) is told by the last value in a panel's title."""
    columns = min(len(rows), min((5, 4, 3), key=lambda columns: -len(rows) % columns))
    columns = max(columns, math.isqrt(len(rows)))  # hundreds of rows: no long strip
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.7 * columns + 0.6, 2.1 * lines + 0.7), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    bands = {name: _band(series) for name, series in rows.items()}
    for axes, (name, (x, mean, low, high)) in zip(panels, bands.items()):
        if name != baseline and baseline in bands:
            behind = dict(linestyle="--", marker="." if len(bands[baseline][0]) < 3 else "")
            axes.plot(*bands[baseline][:2], color=UNKNOWN, linewidth=1.2, **behind)
        color = "black" if name == baseline else BETTER
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(x, mean, color=color, linewidth=1.5, marker="." if len(x) < 3 else "")
        none = "not logged" if rows[name] else "no complete run"
        last = f"{mean[-1]:.{decimals}f}" if len(mean) else none
        axes.set_title(f"{shorten(name, MAX_TITLE_LENGTH)}\n{last}", fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        tidy_axes(axes)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[max(len(rows) - columns, 0) : len(rows)]:
        axes.tick_params(labelbottom=True)  # also above an empty place
    if len({float(x) for xs, *_ in bands.values() for x in xs}) == 1:
        widen_single_point(
            max(panels, key=lambda axes: len(axes.get_lines()))
        )  # all share their axes
    panels[0].set_ylim(*_limits(list(bands.values()), more_is_better))
    figure.supxlabel(across, fontsize="medium")
    figure.supylabel(what, fontsize="medium")
    save_picture(figure, png)


def _band(runs: Sequence[Series]) -> tuple[np.ndarray, ...]:
    """(x, mean, lowest, highest), [points] each, of the runs that are there at each x."""
    at: dict[float, list[float]] = {}
    for xs, ys in runs:
        for x, y in zip(xs, ys):
            if np.isfinite(y):
                at.setdefault(float(x), []).append(float(y))
    points = [(x, np.mean(ys), min(ys), max(ys)) for x, ys in sorted(at.items())]
    return tuple(np.array(points, float).reshape(-1, 4).T)


def _limits(bands: Sequence[tuple[np.ndarray, ...]], rise: bool) -> tuple[float, float]:
    """Limits of y; curves that need not `rise`, and most of which fall, are seen upside down."""
    ends = [mean[-1] - mean[0] for _, mean, _, _ in bands if len(mean)]
    if rise or not ends or np.median(ends) >= 0:
        return _later(bands)
    bottom, top = _later([(x, -mean, -high, -low) for x, mean, low, high in bands])
    return -top, -bottom


def _later(bands: Sequence[tuple[np.ndarray, ...]]) -> tuple[float, float]:
    """Limits of y: from where half of the rows are after a fifth of the run to the highest; of
    curves of a few points all."""
    there = [band for band in bands if len(band[0])]
    if not there:
        return 0.0, 100.0
    few = max(len(x) for x, *_ in there) < 5
    lows = [low.min() if few else low[len(low) // 5] for _, _, low, _ in there]
    bottom = float(min(lows) if few else np.median(lows))
    top = max(float(high.max()) for _, _, _, high in there)
    margin = 0.06 * (top - bottom) or 1.0
    return bottom - margin, top + margin
