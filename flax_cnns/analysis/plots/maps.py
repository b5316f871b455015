"""Pictures of images with maps: saliency, features, filters, visualizations."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_cnns.analysis.plots.style import save_picture, shorten

MAX_ROWS = 12  # images in one picture
MAX_TILES = 64  # maps or filters in one picture


def draw_saliency(
    pixels: np.ndarray,
    maps: Mapping[str, np.ndarray],
    names: Sequence[str],
    png: str | os.PathLike,
    title: str = "",
) -> None:
    """Draws each image, and beside it a map of each method over the pale image.

    pixels: f32 [N H W C] in 0..1; maps: {method: f32 [N H W]}, not negative. Each map is scaled to
    its 99th percentile. At most `MAX_ROWS` images are drawn. Raises `UserError` if the picture
    cannot be written.
    """
    count = min(len(pixels), MAX_ROWS)
    figure = Figure(figsize=(1.7 * (1 + len(maps)), 2.0 * count + 0.5), layout="constrained")
    grid = figure.subplots(count, 1 + len(maps), squeeze=False)
    for row in range(count):
        _show(grid[row, 0], pixels[row])
        lines = [shorten(line, 26) for line in names[row].split("\n")]
        grid[row, 0].set_title("\n".join(lines), fontsize=8)
        for axes, (method, found) in zip(grid[row, 1:], maps.items()):
            _show(axes, pixels[row], pale=0.25)
            top = max(float(np.percentile(found[row], 99)), 1e-12)
            axes.imshow(found[row], cmap="inferno", vmin=0, vmax=top, alpha=0.8)
            if row == 0:
                axes.set_title(method.replace("_", " "), fontsize=8)
    _write_title(figure, title)
    save_picture(figure, png)


def draw_tiles(
    tiles: Sequence[np.ndarray],
    labels: Sequence[str],
    png: str | os.PathLike,
    title: str = "",
    *,
    signed: bool = False,
    columns: int | None = None,
) -> None:
    """Draws a grid of small pictures: images f32 [H W 1 or 3] in 0..1, or maps f32 [H W].

    A map is gray, from its own lowest to its own highest value. `signed` maps are white at 0,
    and all have one scale. `columns`: tiles of a row, by default at most 8. At most `MAX_TILES`
    are drawn; the title says so. Raises `UserError` if the picture cannot be written.
    """
    if len(tiles) > MAX_TILES:
        title += f", {MAX_TILES} of {len(tiles)}"
    tiles = list(tiles)[:MAX_TILES]
    columns = columns or min(len(tiles), 8)
    rows = -(-len(tiles) // columns)
    side = 1.25 if len(tiles) > 8 else 2.2
    figure = Figure(figsize=(side * columns, (side + 0.2) * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    reach = max(*(float(np.abs(tile).max()) for tile in tiles), 1e-12) if signed else 0.0
    for axes, tile, label in zip(grid.flat, tiles, labels):
        if signed:
            axes.imshow(tile, cmap="RdBu_r", vmin=-reach, vmax=reach)
        else:
            _show(axes, tile)
        axes.set_title(shorten(label, int(14 * side)), fontsize=7)
    _write_title(figure, title)
    save_picture(figure, png)


def _write_title(figure: Figure, title: str) -> None:
    """Writes the title, in as many lines as the figure's width asks for."""
    if title:
        width = int(12.5 * figure.get_figwidth())  # letters
        figure.suptitle(textwrap.fill(shorten(title, 4 * width), width), fontsize=9)


def _show(axes: Axes, tile: np.ndarray, pale: float = 1.0) -> None:
    axes.set_axis_off()
    if tile.ndim == 2:
        axes.imshow(tile, cmap="gray", alpha=pale)
    elif tile.shape[-1] == 3:
        axes.imshow(np.clip(tile, 0, 1), alpha=pale)
    else:
        axes.imshow(tile.mean(-1), cmap="gray", vmin=0, vmax=1, alpha=pale)
