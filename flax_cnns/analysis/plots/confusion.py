"""Draws confusion matrices."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from flax_cnns.analysis.plots.style import save_picture, shorten

MAX_ANNOTATED_CLASSES = 20  # with more classes, the cells show no counts
MAX_NAMED_CLASSES = 60  # with more classes, the axes show no class names
MAX_NAME_LENGTH = 32  # characters of a class name


def draw_confusion(
    matrix: np.ndarray, class_names: Sequence[str], png: str | os.PathLike, title: str = ""
) -> None:
    """Draws the counts `matrix` [true class, predicted class]; colors are fractions of the row.

    With at most 20 classes, cells show their counts, except zeros. With at most 60 classes, every
    class is named. Raises `ValueError` if the matrix does not have a row and a column for each
    name, and `UserError` if the file cannot be written.
    """
    matrix = np.asarray(matrix).astype(np.int64)
    classes = len(class_names)
    if matrix.shape != (classes, classes):
        raise ValueError(f"expected a matrix of {classes} x {classes} classes, got {matrix.shape}")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    size = float(np.clip(0.48 * classes, 4.5, 11.0))
    size = max(size, min(classes / 80, 25.0))  # inches; at least one pixel per class
    small = 9 if classes <= MAX_ANNOTATED_CLASSES else 6
    names = (
        [shorten(name, MAX_NAME_LENGTH) for name in class_names]
        if classes <= MAX_NAMED_CLASSES
        else []
    )
    # The names get extra space, in inches, so that they do not shrink the matrix.
    room = 0.6 * small / 72 * max(map(len, names), default=0)
    figure = Figure(figsize=(size + 1.6 + room, size + 0.8 + room), layout="constrained")
    axes = figure.subplots()
    # The square root makes the few mistakes of a good network visible.
    image = axes.imshow(
        shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_ticks(
        [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1],
        labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"],
    )
    bar.set_label("fraction of the true class")
    numbers = "" if names else ", numbered from 0"
    axes.set_xlabel(f"predicted class{numbers}")
    axes.set_ylabel(f"true class{numbers}")
    correct, count = np.trace(matrix), matrix.sum()
    axes.set_title(title or f"{correct} of {count} correct ({100 * correct / max(count, 1):.2f} %)")
    if names:
        axes.set_xticks(range(classes), names, rotation=90, fontsize=small)
        axes.set_yticks(range(classes), names, fontsize=small)
        if all(len(name) <= 2 for name in class_names):
            axes.tick_params(axis="x", rotation=0)
    if classes <= MAX_ANNOTATED_CLASSES:
        digits = len(str(matrix.max(initial=0)))
        count_size = min(8.0, 72 * size / classes / (0.8 * digits))  # fits into its cell
        for row, column in np.argwhere(matrix):
            axes.text(
                column,
                row,
                str(matrix[row, column]),
                ha="center",
                va="center",
                fontsize=count_size,
                color="white" if shares[row, column] > 0.35 else "black",
            )
    save_picture(figure, png)
