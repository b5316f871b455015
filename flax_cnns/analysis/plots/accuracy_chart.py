"""Accuracy against operations: a bubble for each network, whose area is its parameters.

Canziani, Culurciello and Paszke 2016, "An Analysis of Deep Neural Network Models for Practical
Applications", https://arxiv.org/abs/1605.07678, figure 2.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from flax_cnns.analysis.plots import style


class ChartPoint(NamedTuple):
    """One network of the chart."""

    label: str
    accuracy: float  # percent
    macs: float  # for one image
    params: float
    family: str = ""  # networks of a family have one color


_COLORS = (
    style.BLUE,
    style.ORANGE,
    style.GREEN,
    style.VERMILION,
    style.PURPLE,
    style.SKY_BLUE,
    style.BLACK,
    style.GRAY,
)
_POINTS_OF_LARGEST = 36.0  # the diameter of the largest bubble, in points
_DISTANCES = (3, 8, 16, 28, 42, 58, 76)  # of a label from its bubble, in points
_DIRECTIONS = [math.radians(degrees) for degrees in (0, 180, 90, 270, *range(30, 360, 30))]


def draw_accuracy_chart(
    points: Sequence[ChartPoint], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws the chart; operations are on a logarithmic axis if they differ by more than 4 times.

    Raises `UserError` if the picture cannot be written.
    """
    style.save_picture(make_accuracy_chart(points, title), path)


def make_accuracy_chart(points: Sequence[ChartPoint], title: str = "") -> Figure:
    """Returns the figure of the chart. Labels are placed so that they do not overlap each other, as
    far as there is room."""
    figure = Figure(figsize=(11, 7.5))
    axes = figure.subplots()
    style.tidy_axes(axes)
    families = list(dict.fromkeys(point.family for point in points))
    colors = dict(zip(families, itertools.cycle(_COLORS)))
    macs = [point.macs / 1e9 for point in points]
    if max(macs) > 4 * min(macs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    largest = max(point.params for point in points)
    diameters = [_POINTS_OF_LARGEST * math.sqrt(point.params / largest) for point in points]
    for point, x, diameter in zip(points, macs, diameters):
        color = colors[point.family]
        axes.scatter(x, point.accuracy, s=diameter**2, color=color, alpha=0.45, linewidths=0)
        axes.plot(x, point.accuracy, ".", color=color, markersize=3)
    axes.margins(0.1)
    axes.set_xlabel("multiply-adds of one image, in billions")
    axes.set_ylabel("accuracy in percent")
    axes.set_title(title)
    legend = _add_sizes(axes, largest)
    _place_labels(axes, legend, points, macs, diameters, [colors[p.family] for p in points])
    return figure


def _add_sizes(axes: Axes, largest: float) -> Legend:
    """Adds a legend with three bubbles of round numbers of parameters."""
    power = 10 ** math.floor(math.log10(largest))
    top = power * math.floor(largest / power)
    for n in (top, top / 10, top / 100):
        text = f"{n / 1e6:g} M parameters" if n >= 1e5 else f"{n:,.0f} parameters"
        size = _POINTS_OF_LARGEST**2 * n / largest
        axes.scatter([], [], s=size, color=style.GRAY, alpha=0.45, linewidths=0, label=text)
    return axes.legend(loc="lower right", labelspacing=1.6, borderpad=1.2, frameon=False)


def _place_labels(
    axes: Axes,
    legend: Legend,
    points: Sequence[ChartPoint],
    macs: Sequence[float],
    diameters: Sequence[float],
    colors: Sequence[str],
) -> None:
    """Puts each label at the best free place around its bubble; small bubbles choose first."""
    figure = axes.figure
    figure.canvas.draw()  # fixes the scales of the axes
    frame, unit = axes.get_window_extent(), figure.dpi / 72  # unit: pixels per point
    centers = [axes.transData.transform((x, p.accuracy)) for x, p in zip(macs, points)]
    dots = [_square(center, 2 * unit) for center in centers]
    bubbles = [_square(c, 0.4 * unit * d) for c, d in zip(centers, diameters)]
    labels: list[Bbox] = [legend.get_window_extent()]
    for i in sorted(range(len(points)), key=lambda i: diameters[i]):
        first = _annotate(axes, points[i], macs[i], (0, 0), "black", line=False)
        size = first.get_window_extent()
        first.remove()
        obstacles = [*zip(labels, itertools.repeat(20)), *zip(dots, itertools.repeat(8))]
        obstacles += zip([*bubbles[:i], *bubbles[i + 1 :]], itertools.repeat(2))
        places = []
        for across, up, far in _offsets(diameters[i] / 2):
            box = _move(size, centers[i] + unit * np.array([across, up]), across, up)
            hits = sum(weight for other, weight in obstacles if box.overlaps(other))
            places.append((hits + 20 * (not _contains(frame, box)) + far / 10, across, up, far))
        _, across, up, far = min(places, key=lambda place: place[0])  # the first of equals
        label = _annotate(axes, points[i], macs[i], (across, up), colors[i], line=far > 3)
        labels.append(label.get_window_extent().expanded(1.02, 1.1))


def _move(size: Bbox, anchor: np.ndarray, across: float, up: float) -> Bbox:
    """Returns the box of a label that lies in the direction (across, up) of its anchor."""
    x = anchor[0] - (0 if across > 1 else size.width if across < -1 else size.width / 2)
    y = anchor[1] - (0 if up > 1 else size.height if up < -1 else size.height / 2)
    return Bbox.from_bounds(x, y, size.width, size.height)


def _annotate(
    axes: Axes,
    point: ChartPoint,
    x: float,
    offset: tuple[float, float],
    color: str,
    *,
    line: bool,
) -> Annotation:
    across, up = offset
    return axes.annotate(
        style.shorten(point.label, 28),
        (x, point.accuracy),
        xytext=offset,
        textcoords="offset points",
        fontsize=7.5,
        ha="left" if across > 1 else "right" if across < -1 else "center",
        va="bottom" if up > 1 else "top" if up < -1 else "center",
        arrowprops=dict(arrowstyle="-", color=color, linewidth=0.6, shrinkA=0, shrinkB=0)
        if line
        else None,
    )


def _offsets(radius: float) -> Iterator[tuple[float, float, int]]:
    """Yields (points to the right, points up, distance from the bubble), the nearest first."""
    for far in _DISTANCES:
        for angle in _DIRECTIONS:
            length = radius + far
            yield length * math.cos(angle), length * math.sin(angle), far


def _square(center: np.ndarray, half: float) -> Bbox:
    x, y = center
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _contains(outer: Bbox, box: Bbox) -> bool:
    across = outer.x0 <= box.x0 and box.x1 <= outer.x1
    return bool(across and outer.y0 <= box.y0 and box.y1 <= outer.y1)
