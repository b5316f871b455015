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
    SKY_BLUE,
    VERMILION,
    save_picture,
    tidy_axes,
)

MAX_CURVE_POINTS = 2000


class ReliabilityPanel(NamedTuple):
    """One network's column of the picture, in M bins of its confidence."""

    name: str
    low: np.ndarray  # [M], and so are the next four
    high: np.ndarray
    images: np.ndarray
    confidence: np.ndarray  # mean; NaN in an empty bin
    accuracy: np.ndarray  # mean; NaN in an empty bin
    coverage: np.ndarray  # [N]
    risk: np.ndarray  # [N], the fraction of errors at each coverage


def draw_reliability(
    panels: Sequence[ReliabilityPanel], png: str | os.PathLike, title: str = ""
) -> None:
    """Draws a reliability diagram above a histogram of the confidence for each panel, and the
    risk-coverage curves of all panels.

    A bar is as high as the accuracy of its bin; the dot is at the bin's mean confidence. The gap
    between the two is red if the network is too sure, and pale if it is not sure enough. Raises
    `UserError` if the file cannot be written.
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
    full = panel.images > 0
    low, width = panel.low[full], (panel.high - panel.low)[full]
    accuracy, confidence = panel.accuracy[full], panel.confidence[full]
    bars: dict[str, Any] = dict(align="edge", edgecolor="white", linewidth=0.5)
    shared = np.minimum(accuracy, confidence)
    axes.bar(low, shared, width, color=BLUE, label="accuracy", **bars)
    for gap, color, label in (
        (confidence - accuracy, VERMILION, "too sure"),
        (accuracy - confidence, SKY_BLUE, "not sure enough"),
    ):
        axes.bar(low, np.maximum(gap, 0), width, bottom=shared, color=color, label=label, **bars)
    axes.plot(confidence, accuracy, ".", color=BLACK, markersize=6, label="at mean confidence")
    axes.plot([0, 1], [0, 1], "--", color=GRAY, linewidth=1, label="perfect")
    error = np.abs(accuracy - confidence) @ panel.images[full] / panel.images.sum()
    axes.set(title=f"{panel.name}: ECE {100 * error:.2f} %", xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelbottom=False)
    axes.legend(loc="upper left", framealpha=0.85, edgecolor="none", fontsize="small")
    tidy_axes(axes)


def _draw_histogram(axes: Axes, panel: ReliabilityPanel) -> None:
    axes.bar(
        panel.low,
        panel.images,
        panel.high - panel.low,
        align="edge",
        color=GRAY,
        edgecolor="white",
        linewidth=0.5,
    )
    total = panel.images.sum()
    means = [
        (np.nansum(values * panel.images) / total, color, name)
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
            label=f"{panel.name}: AURC {100 * panel.risk.mean():.2f} %",
        )
    axes.set(
        title="selective prediction", xlabel="most confident images answered, %", xlim=(0, 100)
    )
    axes.set_ylabel("errors among them, %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    tidy_axes(axes)
