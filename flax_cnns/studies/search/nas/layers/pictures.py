"""Pictures of a search of layers: rewards over the trials, and a network as a graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from flax_cnns.analysis.plots.style import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    save_picture,
    tidy_axes,
)
from flax_cnns.models.nas import Layer, find_unread

CURVES = (GRAY, BLUE, VERMILION, GREEN, PURPLE, BLACK)
COLORS = {"controller": VERMILION, "random": BLUE}


def average_over_window(values: Sequence[float], window: int) -> np.ndarray:
    """Returns the mean of each value and the `window - 1` before it, [N]; at first of fewer."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_rewards(
    rewards: Mapping[str, Sequence[float]], window: int, path: str | os.PathLike
) -> None:
    """Draws each method's rewards with their moving mean, and the best so far.

    The left axis leaves out the worst rewards if they would flatten the rest; its title says so.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    every = np.concatenate(list(rewards.values()))
    low = min(np.quantile(every, 0.1), *(min(np.maximum.accumulate(r)) for r in rewards.values()))
    low -= 0.05 * (every.max() - low)
    hidden = int((every < low).sum())
    for method, values in rewards.items():
        trials, color = np.arange(1, len(values) + 1), COLORS[method]
        left.plot(trials, values, ".", color=color, alpha=0.45)
        left.plot(trials, average_over_window(values, window), color=color, label=method)
        right.step(trials, np.maximum.accumulate(values), where="post", color=color, label=method)
    left.set(xlabel="trial", ylabel="reward: cube of validation accuracy")
    note = f"; {hidden} of {len(every)} are below" if hidden else ""
    left.set_title(f"rewards and means of the last {window}{note}", fontsize=10)
    left.set_ylim(bottom=low)
    right.set(xlabel="trial", ylabel="best reward so far")
    right.set_title("best so far", fontsize=10)
    for axes in (left, right):
        tidy_axes(axes)
        axes.legend(fontsize=8, loc="lower right")
    save_picture(figure, path)


def draw_network(
    table: Sequence[Layer],
    path: str | os.PathLike,
    *,
    strides: Sequence[tuple[int, int]] = (),
    title: str = "",
) -> None:
    """Draws a table of `models.nas.NAS` as a graph, from the images at the top to the head.

    An arrow goes to each layer from what it takes. Arrows that pass over layers are curves, in the
    color of where they start.
    """
    last = len(table) + 1
    texts = ["images"]
    for i, layer in enumerate(table, 1):
        (height, width), filters = layer.kernel_size, layer.width
        text = f"{i}:  {height} × {width},  {filters} filters"
        if strides:
            text += f",  strides {strides[i - 1][0]}, {strides[i - 1][1]}"
        texts.append(text)
    texts.append("mean of the maps, dense layer")
    edges = [(j, i) for i, layer in enumerate(table, 1) for j in layer.sources]
    edges += [(i, last) for i in find_unread(table)]

    edge = 1.75 if strides else 1.3  # half of a box
    reach = edge + 0.35 * (last + 1) ** 0.85
    figure = Figure(figsize=(1.6 * reach, 0.75 * (last + 1) + 0.5), layout="constrained")
    axes = figure.subplots()
    for i, text in enumerate(texts):
        color = SKY_BLUE if 0 < i < last else ORANGE
        style: dict[str, Any] = dict(boxstyle="round,pad=0.02", facecolor=color, edgecolor=BLACK)
        axes.add_patch(FancyBboxPatch((-edge, -i - 0.16), 2 * edge, 0.32, **style))
        axes.text(0, -i, text, ha="center", va="center", fontsize=9)
    for number, (start, end) in enumerate(sorted(edges)):
        if end - start == 1:
            style = dict(arrowstyle="-|>", mutation_scale=12, color=BLACK)
            axes.add_patch(FancyArrowPatch((0, -start - 0.2), (0, -end + 0.2), **style))
            continue
        side = 1 if number % 2 else -1  # on both sides, so that fewer curves cross
        out = side * (edge + 0.42 * (end - start) ** 0.85)
        points = [(side * edge, -start - 0.05), (out, -start), (out, -end)]
        curve = Path(
            [*points, (side * (edge + 0.02), -end + 0.08)], [Path.MOVETO, *[Path.CURVE4] * 3]
        )
        color = CURVES[start % len(CURVES)]
        style = dict(arrowstyle="-|>", mutation_scale=9, color=color, linewidth=1.1, zorder=1)
        axes.add_patch(FancyArrowPatch(path=curve, **style))
    axes.set(xlim=(-reach, reach), ylim=(-last - 0.5, 0.5))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    save_picture(figure, path)
