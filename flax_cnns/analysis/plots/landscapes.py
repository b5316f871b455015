"""Pictures of loss landscapes: planes, surfaces, lines, and the path of a run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from flax_cnns.analysis.landscape.objective import Levels
from flax_cnns.analysis.plots.curves import STYLES
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes

COLORS = "viridis"
LINES = 14  # contour lines
MAX_RATIO = 1e6  # of the highest to the lowest contour line


class Plane(NamedTuple):
    """The loss on a grid."""

    title: str
    xs: np.ndarray  # f32 [X]
    ys: np.ndarray  # f32 [Y]
    losses: np.ndarray  # f32 [Y X]
    accuracies: np.ndarray  # f32 [Y X]


def draw_planes(
    planes: Sequence[Plane],
    png: str | os.PathLike,
    *,
    note: str = "",
    surface: bool = False,
) -> None:
    """Draws contour lines of each plane's loss, all with the same levels, which are evenly spaced
    on a logarithmic scale.

    `surface` draws the surface of each plane below. `note` is written at the bottom. Raises
    `UserError` if the picture cannot be written.
    """
    rows = 2 if surface else 1
    figure = Figure(figsize=(4.3 * len(planes) + 0.9, 4.3 * rows + 0.3), layout="constrained")
    levels = find_levels([plane.losses for plane in planes])
    for column, plane in enumerate(planes):
        axes = figure.add_subplot(rows, len(planes), column + 1)
        drawn = _contours(axes, plane, levels)
        axes.plot(0, 0, "+", color="white", markersize=10, markeredgewidth=1.8)
        axes.set_aspect("equal")
        axes.set(xlabel="first direction", ylabel="second direction" if column == 0 else "")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.set_title(shorten(plane.title, 48), fontsize=9)
        if column == len(planes) - 1:
            _colorbar(figure, drawn, levels, [axes for axes in figure.axes])
    if surface:
        for column, plane in enumerate(planes):
            axes = figure.add_subplot(2, len(planes), len(planes) + column + 1, projection="3d")
            _surface(axes, plane, levels)
    _write_note(figure, note, 60 * len(planes))
    save_picture(figure, png)


def draw_trajectory(
    plane: Plane,
    points: np.ndarray,
    steps: Sequence[int],
    explained: np.ndarray,
    png: str | os.PathLike,
    *,
    note: str = "",
) -> None:
    """Draws the path of a run over contour lines of the loss.

    points: [steps 2] in the plane; explained: [2], the share of the path's variance along each
    axis. Raises `UserError` if the picture cannot be written.
    """
    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    axes = figure.subplots()
    levels = find_levels([plane.losses])
    drawn = _contours(axes, plane, levels)
    axes.plot(*points.T, "-o", color="white", markeredgecolor="black", markersize=5, linewidth=1.2)
    axes.plot(*points[-1], "*", color="white", markeredgecolor="black", markersize=14)
    for at, up in ((0, 7), (len(steps) - 1, -16)):
        axes.annotate(
            f"step {steps[at]}",
            points[at],
            xytext=(7, up),
            textcoords="offset points",
            fontsize=8,
            bbox=dict(boxstyle="round,pad=0.2", facecolor="white", edgecolor="none", alpha=0.8),
        )
    first, second = (f"{100 * share:.3g} % of the path's variance" for share in explained)
    axes.set(xlabel=f"first component, {first}", ylabel=f"second component, {second}")
    axes.set_title(shorten(plane.title, 70), fontsize=9)
    _colorbar(figure, drawn, levels, [axes])
    _write_note(figure, note, 90)
    save_picture(figure, png)


def draw_line(
    alphas: np.ndarray,
    levels: Mapping[str, Levels],
    ends: tuple[str, str],
    png: str | os.PathLike,
    *,
    note: str = "",
) -> None:
    """Draws the loss and the accuracy of each split along a line.

    alphas: [points]; levels: f32 [points] each; `ends` are the names of the points 0 and 1. Raises
    `UserError` if the picture cannot be written.
    """
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    panels = figure.subplots(1, 2)
    for split, values in levels.items():
        style: dict[str, Any] = dict(STYLES.get(split, {}))
        if split == "test":
            style |= dict(linestyle="--", marker="o", markersize=3.5)
        for axes, numbers in zip(panels, values):
            axes.plot(alphas, np.where(np.isfinite(numbers), numbers, np.nan), label=split, **style)
    finite = [each[np.isfinite(each)] for each, _ in levels.values()]
    lowest, highest = (f(np.concatenate([*finite, [1.0]])) for f in (np.min, np.max))
    if highest > 20 * max(lowest, 1e-12):
        panels[0].set_yscale("log")
    for axes, name in zip(panels, ("loss", "accuracy")):
        for end in (0, 1):
            axes.axvline(end, color="gray", linewidth=0.8, linestyle=":", zorder=0)
        axes.set(xlabel="position on the line", ylabel=name)
        axes.xaxis.set_major_locator(MultipleLocator(0.5))  # shows 0 and 1, the two ends
        tidy_axes(axes)
    panels[1].set_ylim(0, 1.02)
    panels[0].legend(frameon=False)
    figure.suptitle("\n".join(f"{i}: {shorten(end, 90)}" for i, end in enumerate(ends)), fontsize=9)
    _write_note(figure, note, 120)
    save_picture(figure, png)


def find_levels(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Returns `LINES` levels, evenly spaced on a logarithmic scale, from the lowest to the highest
    finite loss of all grids, but at most over a factor of `MAX_RATIO`."""
    losses = np.concatenate([np.ravel(grid) for grid in grids]).astype(float)
    losses = losses[np.isfinite(losses) & (losses > 0)]
    low, high = (losses.min(), losses.max()) if losses.size else (1.0, 10.0)
    low = max(low, 1e-6)
    high = min(max(high, 1.01 * low), MAX_RATIO * low)
    return np.geomspace(low, high, LINES)


def _limit(plane: Plane, levels: np.ndarray) -> np.ndarray:
    """The losses within the levels; a loss that is not a number is the highest."""
    return np.clip(np.nan_to_num(plane.losses, nan=np.inf), levels[0], levels[-1])


def _contours(axes: Axes, plane: Plane, levels: np.ndarray) -> Any:
    losses, norm = _limit(plane, levels), LogNorm(levels[0], levels[-1])
    filled = axes.contourf(plane.xs, plane.ys, losses, levels, norm=norm, cmap=COLORS)
    lines = axes.contour(plane.xs, plane.ys, losses, levels, colors="black", linewidths=0.5)
    # The innermost lines are too short for labels.
    labeled = np.asarray(lines.levels)[LINES // 2 :: 2]
    axes.clabel(lines, labeled, fmt=_name_level, fontsize=7)
    return filled


def _surface(axes: Any, plane: Plane, levels: np.ndarray) -> None:
    heights = np.log10(_limit(plane, levels))
    axes.plot_surface(
        *np.meshgrid(plane.xs, plane.ys),
        heights,
        cmap=COLORS,
        vmin=np.log10(levels[0]),
        vmax=np.log10(levels[-1]),
        rstride=1,
        cstride=1,
        linewidth=0,
    )
    axes.set_zlim(np.log10(levels[0]), np.log10(levels[-1]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.zaxis.set_major_locator(MaxNLocator(5))
    axes.zaxis.set_major_formatter(lambda value, _: f"{10.0**value:.2g}")
    axes.set(xlabel="first direction", ylabel="second direction")
    axes.tick_params(labelsize=7)


def _colorbar(figure: Figure, drawn: Any, levels: np.ndarray, beside: list[Axes]) -> None:
    bar = figure.colorbar(drawn, ax=beside, label="loss", shrink=0.8, pad=0.02)
    shown = levels[::3]
    bar.set_ticks(list(shown), labels=[_name_level(level) for level in shown])
    bar.minorticks_off()


def _name_level(level: float) -> str:
    return f"{float(f'{level:.2g}'):g}"  # 130, not 1.3e+02


def _write_note(figure: Figure, note: str, width: int) -> None:
    if note:
        figure.supxlabel(textwrap.fill(note, width), fontsize=8)
