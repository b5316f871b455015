"""Pictures of corruptions: errors by severity, and a sheet of corrupted images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from flax_cnns.analysis.plots import style

_COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE)
_COLUMNS = 5


def draw_corruption_curves(
    errors: Mapping[str, Mapping[str, Sequence[float]]],
    clean: Mapping[str, float],
    severities: Sequence[int],
    path: str | os.PathLike,
) -> None:
    """Draws one panel for each corruption: error in % against severity, one line for each network.

    `errors`: {network: {corruption: error of each severity}}, fractions; `clean`: {network: error
    without corruption}, drawn at severity 0. Raises UserError if `path` cannot be written.
    """
    names = list(next(iter(errors.values())))
    rows = -(-len(names) // _COLUMNS)
    columns = min(len(names), _COLUMNS)
    figure = Figure(figsize=(2.3 * columns, 1.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.remove()
    for at, name in enumerate(names):
        panel = panels.flat[at]
        for color, (network, table) in zip(_COLORS, errors.items()):
            values = 100 * np.array([clean[network], *table[name]])
            label = style.shorten(network, 40)
            panel.plot([0, *severities], values, "o-", color=color, ms=3, lw=1.4, label=label)
        panel.set_title(name.replace("_", " "), fontsize=9)
        panel.set_ylim(0, 100)
        panel.set_xticks([0, *severities])
        panel.tick_params(labelsize=8, labelbottom=at >= len(names) - columns)
        style.tidy_axes(panel)
        if at % columns == 0:
            panel.set_ylabel("error, %", fontsize=8)
        if at >= len(names) - columns:
            panel.set_xlabel("severity", fontsize=8)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    style.save_picture(figure, path)


def draw_corruption_sheet(
    images: Mapping[str, np.ndarray], severities: Sequence[int], path: str | os.PathLike
) -> None:
    """Draws one row for each corruption and one column for each severity.

    `images`: {corruption: u8 [severities H W C]}, C is 1 or 3. Raises UserError if `path` cannot be
    written.
    """
    columns, size = len(severities), 0.72
    figure = Figure(figsize=(size * columns + 1.5, size * len(images)))
    panels = figure.subplots(len(images), columns, squeeze=False)
    figure.subplots_adjust(0.32, 0.01, 0.99, 0.95, 0.04, 0.04)
    for first, (row, (name, some)) in enumerate(zip(panels, images.items())):
        for at, (panel, image) in enumerate(zip(row, some)):
            shown = image[..., 0] if image.shape[-1] == 1 else image
            panel.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if first == 0:
                panel.set_title(f"{severities[at]}" if severities[at] else "clean", fontsize=8)
        label = name.replace("_", " ")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    style.save_picture(figure, path)
