"""Picture of the image patches that excite units most, with a second picture of each patch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_cnns.analysis.plots.style import save_picture, shorten

MAX_UNITS = 16  # units in one picture
GAP = 0.06  # between patches, of a patch's side


class UnitPatches(NamedTuple):
    """The strongest patches of one unit, the strongest first."""

    label: str
    patches: np.ndarray  # f32 [K h w C] in 0..1
    projections: np.ndarray  # f32 [K h w C], signed


def draw_patches(
    units: Sequence[UnitPatches],
    method: str,
    png: str | os.PathLike,
    title: str = "",
) -> None:
    """Draws for each unit a square of its patches, and to the right a square of the projections.

    The strongest patch is in the upper left corner. `method` names the projections. Each projection
    is divided by its largest absolute value; 0 is gray. At most `MAX_UNITS` units are drawn. Raises
    `UserError` if the picture cannot be written.
    """
    units = list(units)[:MAX_UNITS]
    columns = min(len(units), 2)
    rows = -(-len(units) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, unit in enumerate(units):
        row, column = number // columns, 2 * (number % columns)
        _show(grid[row, column], unit.patches, shorten(unit.label, 24))
        peaks = np.abs(unit.projections).max((1, 2, 3), keepdims=True)
        shown = 0.5 + unit.projections / (2 * np.maximum(peaks, 1e-12))
        _show(grid[row, column + 1], shown, shorten(method, 24))
    if title:
        figure.suptitle(shorten(title, 48 * columns), fontsize=9)
    save_picture(figure, png)


def _show(axes: Axes, patches: np.ndarray, label: str) -> None:
    axes.imshow(np.clip(arrange(patches), 0, 1), interpolation="nearest")
    axes.set_title(label, fontsize=8)


def arrange(patches: np.ndarray) -> np.ndarray:
    """Returns one picture f32 [H W 3] of patches [K h w C], in rows on white."""
    count, height, width, channels = patches.shape
    if channels != 3:
        patches = np.repeat(patches.mean(-1, keepdims=True), 3, -1)
    columns = math.ceil(count**0.5)
    rows = -(-count // columns)
    gap = max(1, round(GAP * max(height, width)))
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.float32)
    for number, patch in enumerate(patches):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = patch
    return sheet
