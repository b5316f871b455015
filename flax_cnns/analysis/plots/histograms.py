"""Pictures of histograms by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_cnns.analysis.plots.style import BLUE, VERMILION, save_picture

_Item = TypeVar("_Item")


def choose_evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """Returns all items, or `most` of them at even distances, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(at)] for at in np.linspace(0, len(items) - 1, most)]


def draw_dense_stacks(
    found: Mapping[Any, Sequence[Any]],
    png: str | os.PathLike,
    title: str = "",
    *,
    most: int = 6,
) -> None:
    """Draws the result of `analysis.initialization.measure_dense_stacks` as CS231n does: a row
    for each setting, and in it a histogram for each layer with mean and standard deviation.

    Outputs that are exactly 0 have no bar, and their share is printed. Each histogram has its own
    height. Of more than `most` layers, `most` evenly spaced ones are drawn. Raises `UserError` if
    the picture cannot be written.
    """
    shown = choose_evenly(range(max(len(layers) for layers in found.values())), most)
    columns = len(shown)
    size = (1.25 * columns + 1.3, 0.95 * len(found) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(found), columns, squeeze=False)
    for row, (setting, layers) in zip(grid, found.items()):
        color = BLUE if setting.activation == "tanh" else VERMILION
        for number, axes in zip(shown, row):
            layer = layers[number]
            _draw_bars(axes, layer.counts, layer.edges, color)
            if axes in grid[0]:
                axes.set_title(f"layer {number + 1}", fontsize=8)
            text = f"mean {_short(layer.mean)}\nstd {_short(layer.std)}"
            if layer.zeros > 0.005:
                text += f", zero {layer.zeros:.0%}"
            axes.set_xlabel(text, fontsize=7, labelpad=1)
        name = "ReLU" if setting.activation == "relu" else setting.activation
        row[0].set_ylabel(
            f"{name}\n{setting.label}", fontsize=8, rotation=0, ha="right", va="center"
        )
    if title:
        figure.suptitle(title, fontsize=9)
    save_picture(figure, png)


def _draw_bars(axes: Axes, counts: np.ndarray, edges: np.ndarray, color: str) -> None:
    axes.stairs(counts, edges, fill=True, color=color)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(counts.max() * 1.05, 1))
    axes.set_yticks([])
    axes.set_xticks([edges[0], (edges[0] + edges[-1]) / 2, edges[-1]])
    axes.tick_params(labelsize=6, length=2, pad=1)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(value: float) -> str:
    """The number with three digits: 0.0123, 1.23, 5.1e+13, overflow."""
    if not np.isfinite(value):
        return "overflow"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
    return f"{value:.1e}"
