"""The picture of a network's activations by layer, at one or several moments of its training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_cnns.analysis.activations import LayerActivations
from flax_cnns.analysis.plots.histograms import choose_evenly
from flax_cnns.analysis.plots.style import BLUE, GRAY, save_picture, shorten, tidy_axes

MAX_HISTOGRAMS = 12
MAX_MOMENTS = 7


def draw_activations(
    layers: Sequence[Sequence[LayerActivations]],
    gradients: Sequence[Sequence[float]],
    moments: Sequence[str],
    png: str | os.PathLike,
    title: str = "",
) -> None:
    """Draws histograms of layers, and means, spreads, dead shares and gradient norms of all layers.

    `layers` [moments layers], `gradients` [moments layers], NaN where there is none. Histograms are
    of the first moment (an outline) and the last (filled). Of more than `MAX_HISTOGRAMS` layers and
    `MAX_MOMENTS` moments, evenly spaced ones are drawn. Raises `UserError` if the picture cannot be
    written.
    """
    count = len(layers[0])
    shown = choose_evenly(range(count), MAX_HISTOGRAMS)
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(10, 1.45 * rows + 3.0), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.45 * rows, 2.7))
    top, bottom = parts
    grid = top.subplots(rows, 4, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, number in zip(grid.flat, shown):
        _draw_histograms(axes, [moment[number] for moment in layers], number)
    note = "Outputs of the layers"
    note += f" ({len(shown)} of {count}, evenly spaced)" if len(shown) < count else ""
    if len(moments) > 1:
        note += f": {moments[0]} (outline) and {moments[-1]} (filled)"
    top.suptitle(f"{shorten(title, 130)}\n{note}" if title else note, fontsize=9)
    _draw_lines(bottom, layers, gradients, moments)
    save_picture(figure, png)


def _draw_histograms(axes: Axes, moments: Sequence[LayerActivations], number: int) -> None:
    for layer in [moments[-1]] if len(moments) == 1 else [moments[-1], moments[0]]:
        density = layer.counts / max(layer.counts.max(), 1)
        if layer is moments[-1]:
            axes.stairs(density, layer.edges, fill=True, color=BLUE)
        else:
            axes.stairs(density, layer.edges, color="black", linewidth=0.8)
    axes.set_title(f"{number + 1}: {shorten(moments[0].path, 30)}", fontsize=7, pad=2)
    axes.tick_params(labelsize=6, length=2, pad=1)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_lines(
    figure: Any,  # or a SubFigure
    layers: Sequence[Sequence[LayerActivations]],
    gradients: Sequence[Sequence[float]],
    moments: Sequence[str],
) -> None:
    panels: tuple[tuple[str, Callable[[int], list[float]], bool], ...] = (
        ("mean", lambda at: [layer.mean for layer in layers[at]], False),
        ("standard deviation", lambda at: [layer.std for layer in layers[at]], True),
        ("share of dead channels", lambda at: [_or_nan(x.dead) for x in layers[at]], False),
        ("norm of the gradient", lambda at: list(gradients[at]), True),
    )
    chosen = choose_evenly(range(len(moments)), MAX_MOMENTS)
    positions = np.arange(1, len(layers[0]) + 1)
    grid = figure.subplots(1, len(panels))
    for axes, (name, values_of, logarithmic) in zip(grid, panels):
        for number, at in enumerate(chosen):
            color = colormaps["viridis"](0.9 * number / max(len(chosen) - 1, 1))
            values = np.array(values_of(at), np.float64)
            if logarithmic:
                values[values <= 0] = np.nan
            there = np.isfinite(values)
            axes.plot(
                positions[there],
                values[there],
                color=color,
                marker=".",
                markersize=3,
                linewidth=1,
                label=moments[at],
            )
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("layer", fontsize=7)
        axes.tick_params(labelsize=6, which="both")
        axes.set_xlim(0.5, len(positions) + 0.5)
        if logarithmic:
            axes.set_yscale("log")
        if name.startswith("share"):
            axes.set_ylim(-0.03, 1.03)
            if not axes.get_lines() or not any(len(line.get_xdata()) for line in axes.get_lines()):
                axes.text(
                    0.5,
                    0.5,
                    "no ReLU",
                    color=GRAY,
                    transform=axes.transAxes,
                    ha="center",
                    fontsize=8,
                )
        axes.locator_params(axis="x", integer=True, nbins=6)
        tidy_axes(axes)
    if len(moments) > 1:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(chosen),
            fontsize=7,
            frameon=False,
        )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
