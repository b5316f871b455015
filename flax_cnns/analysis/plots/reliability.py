"""Draws reliability diagrams with histograms of the confidence, and risk-coverage curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_cnns.analysis.plots.style import (
    BLACK,
    BLUE,
    GRAY,
    ORANGE,
    VERMILION,
    save_picture,
    tidy_axes,
)

MAX_CURVE_POINTS = 2000


class ReliabilityPanel(NamedTuple):
    """One network's column of the picture, in M bins of its confidence."""

    title: str
    low: np.ndarray  # [M], and so are the next four
    high: np.ndarray
    count: np.ndarray
    confidence: np.ndarray  # mean; NaN in an empty bin
    accuracy: np.ndarray  # mean; NaN in an empty bin
    coverage: np.ndarray  # [N]
    risk: np.ndarray  # [N], the fraction of errors at each coverage


def draw_reliability(
    panels: Sequence[ReliabilityPanel], png: str | os.PathLike, title: str = ""
) -> None:
    """Draws a reliability diagram above a histogram of the confidence for each panel, and the
    risk-coverage curves of all panels.

    A bar is the accuracy of a bin; the dot on it is at the bin's mean confidence. Red is the gap
    between the two. Raises `UserError` if the file cannot be written.
    """
    columns = len(panels) + 1
    figure = Figure(figsize=(3.9 * columns, 5.2), layout="constrained")
    grid: Any = figure.add_gridspec(2, columns, height_ratios=(3, 1))
    for column, panel in enumerate(panels):
        upper = figure.add_subplot(grid[0, column])
        _draw_gaps(upper, panel)
        lower = figure.add_subplot(grid[1, column], sharex=upper)
        _draw_histogram(lower, panel)
        if not column:
            upper.set_ylabel("accuracy of the bin")
            lower.set_ylabel("images")
    _draw_risk(figure.add_subplot(grid[:, -1]), panels)
    figure.suptitle(title, fontsize="medium")
    save_picture(figure, png)


def _draw_gaps(axes: Axes, panel: ReliabilityPanel) -> None:
    full = panel.count > 0
    low, width = panel.low[full], (panel.high - panel.low)[full]
    accuracy, confidence = panel.accuracy[full], panel.confidence[full]
    bars: dict[str, Any] = dict(align="edge", edgecolor="white", linewidth=0.5)
    axes.bar(low, accuracy, width, color=BLUE, label="accuracy", **bars)
    axes.bar(
        low,
        confidence - accuracy,
        width,
        bottom=accuracy,
        color=VERMILION,
        alpha=0.45,
        label="gap to the confidence",
        **bars,
    )
    axes.plot(confidence, accuracy, ".", color=BLACK, markersize=6, label="at mean confidence")
    axes.plot([0, 1], [0, 1], "--", color=GRAY, linewidth=1, label="perfect")
    axes.set(title=panel.title, xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelbottom=False)
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    tidy_axes(axes)


def _draw_histogram(axes: Axes, panel: ReliabilityPanel) -> None:
    axes.bar(
        panel.low,
        panel.count,
        panel.high - panel.low,
        align="edge",
        color=GRAY,
        edgecolor="white",
        linewidth=0.5,
    )
    total = panel.count.sum()
    means = [
        (np.nansum(values * panel.count) / total, color, name)
        for values, color, name in (
            (panel.accuracy, BLUE, "accuracy"),
            (panel.confidence, VERMILION, "mean confidence"),
        )
    ]
    for mean, color, name in means:
        axes.axvline(mean, color=color, linewidth=1.5, label=f"{name} {100 * mean:.1f} %")
    axes.set(xlabel="confidence")
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    tidy_axes(axes, grid="y")


def _draw_risk(axes: Axes, panels: Sequence[ReliabilityPanel]) -> None:
    for panel, color, style in zip(panels, (ORANGE, BLUE, BLACK), ("-", "--", ":")):
        points = len(panel.risk)
        some = np.unique(np.linspace(0, points - 1, min(points, MAX_CURVE_POINTS)).astype(int))
        axes.plot(
            100 * panel.coverage[some],
            100 * panel.risk[some],
            style,
            color=color,
            label=panel.title,
        )
    axes.set(
        title="selective prediction", xlabel="most confident images answered, %", xlim=(0, 100)
    )
    axes.set_ylabel("errors among them, %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    tidy_axes(axes)
