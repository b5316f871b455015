"""Draws the trials of a search: history, parallel coordinates, importance, and slices.

Complete trials are dots in a color, pruned trials are pale, and failed trials are crosses at the
lower edge of the panel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flax_cnns.analysis.plots import style
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes

COMPLETE, PRUNED, FAILED, BEST = style.BLUE, "#BBBBBB", style.VERMILION, style.ORANGE
COLORS = "viridis"  # of values: dark is bad, yellow is good
MAX_NAME_LENGTH = 34  # characters of a field's path
MAX_LABEL_LENGTH = 18  # characters of a category
CLIP_AT_MEDIANS = 3.0  # values this many times the median distance below the best are far below
ABSENT = -0.12  # height in parallel coordinates of a field that the trial did not draw


class SearchAxis(NamedTuple):
    """A searched field: a range of numbers, or categories."""

    name: str
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    categories: tuple[str, ...] = ()  # () for a range of numbers

    def scale(self, value: Any) -> float:
        """Returns where a number or category lies between 0, the lower end, and 1."""
        if self.categories:
            return self.categories.index(value) / max(len(self.categories) - 1, 1)
        low, high, value = self.low, self.high, float(value)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / ((high - low) or 1.0)


class TrialPoint(NamedTuple):
    """A trial to draw."""

    drawn: Mapping[str, Any]  # {name of an axis: number or category}
    state: str  # complete, pruned, failed
    value: float  # of a pruned trial, its newest; NaN if there is none
    steps: int  # training steps of this trial alone
    stage: int = 1  # from 1: coarse


# ---------------------------------------------------------------------------- history


def draw_history(
    trials: Sequence[TrialPoint],
    png: str | os.PathLike,
    *,
    y_label: str,
    maximize: bool = True,
) -> None:
    """Draws the values of the trials by their order, and by the training steps spent until then.

    A line shows the best value of a complete trial so far. Values far below the best lie on the
    edge of the panel, as triangles. Raises `UserError` if the file cannot be written.
    """
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    steps = np.cumsum([trial.steps for trial in trials]) if trials else np.array([])
    unit, word = (1000, "thousand training steps") if steps.size and steps[-1] > 9999 else (1, "")
    places = [np.arange(len(trials)), steps / unit]
    labels = ["trial", f"{word or 'training steps'} spent"]
    edge = _find_edge(trials, maximize)
    for axes, xs, label in zip((left, right), places, labels):
        _draw_points(axes, xs, trials, edge, maximize)
        _draw_best(axes, xs, trials, maximize)
        _mark_stages(axes, xs, trials)
        axes.set_xlabel(label)
        tidy_axes(axes)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylabel(y_label)
    if handles := left.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, fontsize=8, loc="outside upper right", ncols=len(handles))
    save_picture(figure, png)


def _find_edge(trials: Sequence[TrialPoint], maximize: bool) -> float:
    """Returns the worst value to show where it is; worse values lie on the edge.

    It is the worst of all, unless half of the axis would be for values that are far below the rest.
    """
    sign = 1 if maximize else -1
    values = sign * np.array([t.value for t in trials if _has_value(t)], float)
    if not values.size:
        return sign * -math.inf
    best, worst = float(values.max()), float(values.min())
    reach = CLIP_AT_MEDIANS * float(np.median(best - values))
    return sign * (best - reach if 0 < 2 * reach < best - worst else worst)


def _has_value(trial: TrialPoint) -> bool:
    return trial.state != "failed" and math.isfinite(trial.value)


def _draw_points(
    axes: Axes, xs: np.ndarray, trials: Sequence[TrialPoint], edge: float, maximize: bool
) -> None:
    def is_inside(trial: TrialPoint) -> bool:
        return trial.value >= edge if maximize else trial.value <= edge

    outside = "v" if maximize else "^"
    for state, color, order in (("pruned", PRUNED, 1), ("complete", COMPLETE, 2)):
        shown = [(x, t) for x, t in zip(xs, trials) if t.state == state and _has_value(t)]
        inside = [(x, t.value) for x, t in shown if is_inside(t)]
        beyond = [x for x, t in shown if not is_inside(t)]
        if inside:
            axes.plot(*zip(*inside), "o", color=color, markersize=5, zorder=order, label=state)
        if beyond:
            line: dict[str, Any] = dict(color=color, markersize=6, clip_on=False, zorder=order)
            label = f"{state}, {'below' if maximize else 'above'} the axis"
            axes.plot(beyond, [edge] * len(beyond), outside, label=label, **line)
    failed = [x for x, t in zip(xs, trials) if t.state == "failed"]
    if failed:
        bottom = edge if math.isfinite(edge) else 0.0
        axes.plot(failed, [bottom] * len(failed), "x", color=FAILED, label="failed", clip_on=False)


def _draw_best(axes: Axes, xs: np.ndarray, trials: Sequence[TrialPoint], maximize: bool) -> None:
    best = find_best_so_far(trials, maximize)
    known = [(x, value) for x, value in zip(xs, best) if value is not None]
    if known:
        steps, values = zip(*known)
        line: dict[str, Any] = dict(where="post", color=BEST, linewidth=1.6, label="best so far")
        axes.step([*steps, xs[-1]], [*values, values[-1]], zorder=3, **line)


def find_best_so_far(trials: Sequence[TrialPoint], maximize: bool = True) -> list[float | None]:
    """Returns the best value of the complete trials up to each trial; None before the first."""
    best: float | None = None
    values = []
    for trial in trials:
        if trial.state == "complete" and math.isfinite(trial.value):
            better = max if maximize else min
            best = trial.value if best is None else better(best, trial.value)
        values.append(best)
    return values


def _mark_stages(axes: Axes, xs: np.ndarray, trials: Sequence[TrialPoint]) -> None:
    """Draws a line where a finer stage begins."""
    for i in range(1, len(trials)):
        if trials[i].stage != trials[i - 1].stage:
            x = (xs[i - 1] + xs[i]) / 2
            axes.axvline(x, color="black", linewidth=0.8, linestyle=":")
            above = axes.get_xaxis_transform()  # y as a fraction of the panel
            text = f"stage {trials[i].stage}"
            axes.text(x, 1.0, text, transform=above, fontsize=8, va="bottom", ha="center")


# ---------------------------------------------------------------------------- parallel coordinates


def draw_parallel_coordinates(
    axes_to_draw: Sequence[SearchAxis],
    trials: Sequence[TrialPoint],
    png: str | os.PathLike,
    *,
    value_label: str,
    maximize: bool = True,
) -> None:
    """Draws a line per trial through its drawn values, colored by the trial's value.

    Pruned trials are pale; the best trial is thick. A field that a trial did not draw, because its
    condition did not hold, lies below the axis. Raises `UserError` if the file cannot be written.
    """
    number = len(axes_to_draw)
    figure = Figure(figsize=(max(5.5, 1.7 * number + 1.4), 4.0), layout="constrained")
    panel = figure.subplots()
    ranked = sorted(
        (t for t in reversed(trials) if t.state == "complete" and _has_value(t)),
        key=lambda trial: trial.value if maximize else -trial.value,
    )
    edge = _find_edge(ranked, maximize)
    values = [trial.value for trial in ranked]
    top = (max(values) if maximize else min(values)) if values else 1.0
    colors = matplotlib.colormaps[COLORS if maximize else f"{COLORS}_r"]
    low, high = sorted((edge, top)) if values and edge != top else (top - 1, top)
    scale = Normalize(low, high, clip=True)
    for trial in trials:
        if trial.state == "pruned":
            heights = _find_heights(axes_to_draw, trial)
            panel.plot(range(number), heights, color=PRUNED, linewidth=0.7, alpha=0.45, zorder=1)
    for trial in ranked:
        is_best = trial is ranked[-1]
        heights = _find_heights(axes_to_draw, trial)
        line: dict[str, Any] = dict(linewidth=3.0 if is_best else 1.1, zorder=2 + is_best)
        panel.plot(range(number), heights, color=colors(scale(trial.value)), **line)
        if is_best:
            panel.plot(range(number), heights, color="black", linewidth=4.4, zorder=2)
    is_absent = any(axis.name not in trial.drawn for axis in axes_to_draw for trial in trials)
    for x, axis in enumerate(axes_to_draw):
        _draw_axis(panel, x, axis)
    panel.set(xlim=(-0.25, number - 1 + 0.75), ylim=(ABSENT - 0.04 if is_absent else -0.04, 1.04))
    if is_absent:
        panel.axhline(ABSENT, color=style.GRAY, linewidth=0.6, linestyle=":", zorder=0)
        text: dict[str, Any] = dict(fontsize=8, color="#555555", va="bottom", ha="left")
        panel.text(number - 1 + 0.08, ABSENT, "not drawn", **text)
    names = [_wrap(axis.name) for axis in axes_to_draw]
    panel.set_xticks(range(number), names, fontsize=8)
    panel.set_yticks([])
    panel.tick_params(axis="x", length=0)
    for side in panel.spines.values():
        side.set_visible(False)
    if values:
        mappable = matplotlib.cm.ScalarMappable(scale, colors)
        is_clipped = edge != ranked[0].value
        extend = "neither" if not is_clipped else "min" if maximize else "max"
        figure.colorbar(mappable, ax=panel, label=value_label, extend=extend, pad=0.02)
    save_picture(figure, png)


def _find_heights(axes: Sequence[SearchAxis], trial: TrialPoint) -> list[float]:
    drawn = trial.drawn
    return [axis.scale(drawn[axis.name]) if axis.name in drawn else ABSENT for axis in axes]


def _draw_axis(panel: Axes, x: int, axis: SearchAxis) -> None:
    panel.plot([x, x], [0, 1], color="black", linewidth=0.8, zorder=4)
    for value, text in list_ticks(axis):
        y = axis.scale(value)
        panel.plot([x, x + 0.03], [y, y], color="black", linewidth=0.8, zorder=4)
        box = dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.6)
        panel.text(x + 0.05, y, text, fontsize=7.5, va="center", ha="left", bbox=box, zorder=5)


def list_ticks(axis: SearchAxis, most: int = 6) -> list[tuple[Any, str]]:
    """Returns (value, text) of an axis's ticks: its ends, and powers of ten or round numbers."""
    if axis.categories:
        return [(name, shorten(name, MAX_LABEL_LENGTH)) for name in axis.categories]
    if axis.is_log:
        first, last = math.log10(axis.low), math.log10(axis.high)
        powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        stride = max(1, math.ceil(len(powers) / most))
        inner = [10.0**power for power in powers[::stride]]
    else:
        inner = [float(v) for v in MaxNLocator(4).tick_values(axis.low, axis.high)]
    ends = [axis.low, axis.high]
    near = 0.07  # ticks nearer to an end would touch its text
    inner = [v for v in inner if near < axis.scale(max(v, axis.low)) < 1 - near]
    return [(value, f"{value:.3g}") for value in sorted({*ends, *inner})]


def _wrap(path: str) -> str:
    """Breaks a field's path after its section."""
    section, _, field = path.rpartition(".")
    name = shorten(field, MAX_NAME_LENGTH // 2)
    return f"{shorten(section, MAX_NAME_LENGTH // 2)}.\n{name}" if section else name


# ---------------------------------------------------------------------------- importance


class ImportanceBar(NamedTuple):
    """The importance of a field, as a share of the sum over all fields."""

    name: str
    share: float
    chance: float  # a field without an effect stays below this share in 95 % of all cases


def draw_importance(bars: Sequence[ImportanceBar], png: str | os.PathLike, *, title: str) -> None:
    """Draws a bar per field, the most important at the top, with a mark for what is chance.

    Bars that do not reach their mark are pale. Raises `UserError` if the file cannot be written.
    """
    figure = Figure(figsize=(7.4, 1.3 + 0.38 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for y, bar in enumerate(bars):
        is_real = bar.share > bar.chance
        color = COMPLETE if is_real else PRUNED
        axes.barh(y, 100 * bar.share, height=0.62, color=color)
        chance = [100 * min(bar.chance, 1.0)] * 2
        axes.plot(chance, [y - 0.4, y + 0.4], color="black", linewidth=1.4, clip_on=False)
        right = axes.get_yaxis_transform()  # x as a fraction of the panel
        text = f"{100 * bar.share:.0f} %"
        axes.text(1.02, y, text, transform=right, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [shorten(bar.name, 44) for bar in bars])
    axes.set(ylim=(len(bars) - 0.4, -0.6))
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the importance, %; line: 95 % of shuffled searches stay below")
    axes.set_title(shorten(title, 100), fontsize="medium", loc="left")
    axes.tick_params(axis="y", length=0)
    tidy_axes(axes, grid="x", hidden=("top", "right", "left"))
    save_picture(figure, png)


# ---------------------------------------------------------------------------- slices


def draw_slices(
    axes_to_draw: Sequence[SearchAxis],
    trials: Sequence[TrialPoint],
    png: str | os.PathLike,
    *,
    y_label: str,
    given: Mapping[str, Any] | None = None,
    maximize: bool = True,
) -> None:
    """Draws a panel per field: the values of the trials over the field's drawn values.

    Later trials are darker. Trials of finer stages are diamonds. A dotted line marks the `given`
    config's value. Raises `UserError` if the file cannot be written.
    """
    columns = min(len(axes_to_draw), 3 if len(axes_to_draw) in (3, 5, 6, 9) else 4)
    lines = math.ceil(len(axes_to_draw) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.7 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    edge = _find_edge(trials, maximize)
    order = Normalize(0, max(len(trials) - 1, 1))
    for panel, axis in zip(panels, axes_to_draw):
        for index, trial in enumerate(trials):
            if axis.name in trial.drawn:
                _draw_slice_point(panel, axis, trial, edge, maximize, float(order(index)))
        if given and axis.name in given:
            x = axis.categories.index(given[axis.name]) if axis.categories else given[axis.name]
            panel.axvline(x, color="black", linewidth=0.9, linestyle=":", zorder=0)
        _set_x_axis(panel, axis)
        tidy_axes(panel)
    for panel in panels[len(axes_to_draw) :]:
        panel.set_visible(False)
    figure.supylabel(y_label, fontsize="medium")
    notes = ["darker: later"]
    notes += ["gray: pruned"] if any(trial.state == "pruned" for trial in trials) else []
    notes += ["crosses: failed"] if any(trial.state == "failed" for trial in trials) else []
    notes += ["diamonds: stage 2"] if any(trial.stage > 1 for trial in trials) else []
    notes += ["dotted: the given config"] if given else []
    figure.suptitle("; ".join(notes), fontsize=8.5, x=0.01, ha="left")
    save_picture(figure, png)


def _draw_slice_point(
    panel: Axes, axis: SearchAxis, trial: TrialPoint, edge: float, maximize: bool, age: float
) -> None:
    x = axis.categories.index(trial.drawn[axis.name]) if axis.categories else trial.drawn[axis.name]
    if axis.categories:  # spread the trials of a category, in their order
        x += 0.5 * (age - 0.5)
    if not _has_value(trial):
        bottom = edge if math.isfinite(edge) else 0.0
        panel.plot([x], [bottom], "x", color=FAILED, markersize=5, clip_on=False, zorder=1)
        return
    is_inside = trial.value >= edge if maximize else trial.value <= edge
    marker = "D" if trial.stage > 1 else "o"
    if not is_inside:
        marker = "v" if maximize else "^"
    color = PRUNED if trial.state == "pruned" else matplotlib.colormaps["Blues"](0.35 + 0.65 * age)
    line: dict[str, Any] = dict(color=color, markersize=5, clip_on=False)
    line |= dict(zorder=1 if trial.state == "pruned" else 2, markeredgewidth=0)
    panel.plot([x], [trial.value if is_inside else edge], marker, **line)


def _set_x_axis(panel: Axes, axis: SearchAxis) -> None:
    panel.set_xlabel(_wrap(axis.name), fontsize=8.5)
    if axis.categories:
        number = len(axis.categories)
        labels = [shorten(name, MAX_LABEL_LENGTH) for name in axis.categories]
        panel.set_xticks(range(number), labels, fontsize=8, rotation=30 if number > 3 else 0)
        panel.set_xlim(-0.6, number - 0.4)
        return
    if axis.is_log:
        panel.set_xscale("log")
        margin = (axis.high / axis.low) ** 0.04
        panel.set_xlim(axis.low / margin, axis.high * margin)
        if axis.high < 100 * axis.low:  # powers of ten alone would be one tick or two
            panel.set_xticks(*zip(*list_ticks(axis)))
    else:
        margin = 0.04 * (axis.high - axis.low)
        panel.set_xlim(axis.low - margin, axis.high + margin)
        panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.xaxis.set_minor_formatter(FuncFormatter(lambda value, at: ""))
    panel.tick_params(axis="x", labelsize=8)
