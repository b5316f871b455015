"""The pictures of the sanity checks, from the numbers of sanity.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_cnns.analysis.activations import LayerActivations
from flax_cnns.analysis.plots.activations import draw_activations
from flax_cnns.analysis.plots.maps import draw_tiles
from flax_cnns.analysis.plots.style import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    VERMILION,
    save_picture,
    tidy_axes,
)
from flax_cnns.studies.search.sanity.bench import HostBatch, SanityBench
from flax_cnns.studies.search.sanity.findings import Numbers
from flax_cnns.studies.search.sanity.judge_trainings import read_rates
from flax_cnns.studies.search.sanity.trainings import FEW, smooth

Path = str | os.PathLike


def draw_examples(bench: SanityBench, train: HostBatch, png: Path) -> None:
    """Draws the images that the network learns by heart, with their labels.

    Images are drawn as the network sees them, from each image's lowest to its highest value.
    """
    images = bench.normalize(train["image"][:FEW])
    low, high = (f(images, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    tiles = (images - low) / np.maximum(high - low, 1e-12)
    names = bench.dataset.class_names
    labels = train["label"][:FEW]
    if labels.ndim == 2 and bench.dataset.task == "multilabel":
        shown = [", ".join(names[i] for i in np.flatnonzero(row)) for row in labels]
    else:
        shown = [names[int(i)] for i in (labels.argmax(1) if labels.ndim == 2 else labels)]
    title = f"{bench.dataset.name}: the first training images, normalized, and their labels"
    draw_tiles(list(tiles), shown, png, title, columns=10)


def draw_layers(numbers: Numbers, png: Path, title: str) -> None:
    """Draws activations and gradient norms by layer at initialization."""
    layers, gradients = [], []
    for row in numbers["layers"]:
        counts = np.asarray(row["counts"])
        low, high = row["range"]
        edges = np.linspace(low, high, len(counts) + 1)
        layers.append(
            LayerActivations(
                row["path"], row["values"], row["mean"], row["std"], row["dead"], counts, edges
            )
        )
        gradients.append(float("nan") if row["gradient"] is None else row["gradient"])
    draw_activations([layers], [gradients], ["initialization"], png, title)


def draw_rates(numbers: Numbers, png: Path, title: str) -> None:
    """Draws the loss over the exponentially growing learning rate."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes: Any = figure.subplots()
    rates, losses = np.asarray(numbers["rates"]), np.asarray(numbers["losses"], np.float64)
    reading, curve = read_rates(numbers), smooth(numbers["losses"])
    axes.plot(rates, losses, color=GRAY, linewidth=0.8, label="loss of a batch")
    axes.plot(rates, curve, color=BLUE, linewidth=2, label="smoothed")
    axes.set_xscale("log")
    finite = losses[np.isfinite(losses)]
    top = min(2.0 * reading.start, finite.max()) if finite.size else 1.0
    bottom = min(0.0, finite.min()) if finite.size else 0.0
    axes.set_ylim(bottom, max(top, 1.1 * reading.start) * 1.05)
    axes.set_xlim(rates[0], max(rates[-1], 1.5 * numbers["own"]))
    marks = [
        (numbers["own"], BLACK, "-", "the config's rate"),
        (reading.suggested, GREEN, "--", "suggested: a tenth of the lowest point's"),
        (reading.limit, VERMILION, ":", "above the first loss again"),
    ]
    for at, color, style, name in marks:
        if at is not None:
            label = f"{name}, {at:.2g}"
            axes.axvline(at, color=color, linestyle=style, linewidth=1.5, label=label)
    axes.set(xlabel="learning rate", ylabel="training loss")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    tidy_axes(axes)
    save_picture(figure, png)


def draw_trainings(parts: Mapping[str, Numbers], png: Path, title: str) -> None:
    """Draws how a few images are learned by heart, and the short trainings at each width."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    if "overfit" in parts:
        _draw_overfit(left, parts["overfit"])
    else:
        left.set_axis_off()
    if "capacity" in parts:
        _draw_widths(middle, right, parts["capacity"])
    else:
        middle.set_axis_off()
        right.set_axis_off()
    figure.suptitle(title, fontsize=9)
    save_picture(figure, png)


def _draw_overfit(axes: Axes, numbers: Numbers) -> None:
    for attempt in numbers["attempts"]:
        end = f"all in {attempt['steps']} steps" if attempt["steps"] else f"{attempt['best']:.0%}"
        losses = np.asarray(attempt["losses"], np.float64)
        axes.plot(np.maximum(losses, 1e-5), label=f"rate {attempt['rate']:.2g}: {end}")
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=f"{numbers['images']} images by heart")
    axes.legend(frameon=False, fontsize=7)
    tidy_axes(axes)


def _draw_widths(curves: Axes, bars: Axes, numbers: Numbers) -> None:
    rows = numbers["widths"]
    for row in rows:
        curves.plot(smooth(row["losses"]), label=f"width x{row['width']:g}")
    curves.set(xlabel="step", ylabel="training loss, smoothed", title="short trainings")
    curves.legend(frameon=False, fontsize=7)
    at = np.arange(len(rows))
    for number, (split, color) in enumerate((("train", BLUE), ("validation", VERMILION))):
        if split in rows[0]:
            heights = [100 * row[split]["accuracy"] for row in rows]
            drawn = bars.bar(at + 0.38 * (number - 0.5), heights, 0.36, color=color, label=split)
            bars.bar_label(drawn, fmt="%.1f", fontsize=7)
    bars.set_xticks(at, [f"x{row['width']:g}" for row in rows])
    bars.set_ylim(0, 118)
    bars.set(xlabel="width", ylabel="accuracy, %", title="after the short trainings")
    bars.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)
    for axes in (curves, bars):
        tidy_axes(axes, grid="y")
