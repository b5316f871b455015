"""Draws photographs with the predictions of a network."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from flax_cnns.analysis.plots.style import BLUE, save_picture, shorten

MAX_PHOTOS = 40  # photos in one picture
MAX_CLASSES = 15  # classes drawn for each photo
PALE = "#A6CBE3"  # color of all classes except the first


def draw_predictions(
    photos: Sequence[tuple[str, Image.Image, tuple[float, float, float, float]]],
    predictions: Sequence[Sequence[tuple[str, float]]],
    png: str | os.PathLike,
    title: str = "",
) -> None:
    """Draws each photo with bars of its most likely classes, into a PNG.

    Only the first `MAX_PHOTOS` photos and the first `MAX_CLASSES` classes of each are drawn.

    photos: (name, image, box that the network sees). predictions: for each photo, (class,
    probability), the most likely first. Raises `UserError` if the picture cannot be written.
    """
    photos = photos[:MAX_PHOTOS]
    predictions = [classes[:MAX_CLASSES] for classes in predictions[:MAX_PHOTOS]]
    columns = 1 if len(photos) <= 4 else 2
    rows = -(-len(photos) // columns)
    height = max(2.5, 0.26 * max(map(len, predictions), default=0))
    figure = Figure(figsize=(7.6 * columns, height * rows + 0.4), layout="constrained")
    if title:
        figure.suptitle(shorten(title, 80 * columns))
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.1] * columns)
    for axes in grid.flat:
        axes.set_axis_off()
    pairs = grid.reshape(-1, 2)  # row by row
    for (left, right), (name, image, box), classes in zip(pairs, photos, predictions):
        _draw_photo(left, name, image, box)
        _draw_bars(right, classes)
    save_picture(figure, png)


def _draw_photo(
    axes: Axes, name: str, image: Image.Image, box: tuple[float, float, float, float]
) -> None:
    """Draws a photo; the part outside the network's `box` is pale."""
    width, height = image.size
    small = image.convert("RGB")
    small.thumbnail((480, 480))
    edges = (0, width, height, 0)  # in pixels of the photo, like the box
    axes.imshow(np.asarray(small), extent=edges, alpha=0.35)
    seen = axes.imshow(np.asarray(small), extent=edges)
    left, top, right, bottom = box
    seen.set_clip_path(Rectangle((left, top), right - left, bottom - top, transform=axes.transData))
    axes.set_title(shorten(name, 44), fontsize=9)


def _draw_bars(axes: Axes, classes: Sequence[tuple[str, float]]) -> None:
    axes.set_axis_on()
    probabilities = [probability for _, probability in classes]
    places = range(len(classes))
    axes.barh(places, probabilities, color=[BLUE] + [PALE] * (len(classes) - 1), height=0.62)
    for place, probability in zip(places, probabilities):
        axes.text(probability + 0.015, place, f"{probability:.1%}", va="center", fontsize=9)
    names = [shorten(name, 26) for name, _ in classes]
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(max(len(classes), 3) - 0.5, -0.5)  # the most likely on top
    axes.set_xlim(0, 1.18)  # space for the number of a full bar
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
