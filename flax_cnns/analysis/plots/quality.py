"""Draws how good saliency maps are: similarity under randomization, and measures as bars."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_cnns.analysis.plots import style
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes
from flax_cnns.analysis.statistics import Interval

_COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY_BLUE)
_DASHES = ("-", "--", ":")  # from the seventh method on


def draw_quality(
    similarity: Mapping[str, Sequence[Interval]],
    layers: Sequence[str],
    measures: Mapping[str, Mapping[str, Interval]],
    png: str | os.PathLike,
    title: str = "",
    *,
    higher_is_better: Mapping[str, bool],
) -> None:
    """Draws a panel of similarity by layer with bands, and a panel of bars for each measure.

    similarity: {method: interval at each of `layers`}; measures: {method: {measure: interval}}.
    Methods that are not in `similarity` are baselines, which are gray. Raises `UserError` if the
    picture cannot be written.
    """
    names = list(higher_is_better)
    height = max(4.6, 1.6 + 0.3 * len(measures))
    figure = Figure(figsize=(5.4 + 2.3 * len(names), height), layout="constrained")
    curves, *panels = figure.subplots(1, 1 + len(names), width_ratios=[2.1, *[1.0] * len(names)])
    looks = {
        name: (_COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % len(_DASHES)])
        for i, name in enumerate(similarity)
    }
    _draw_curves(curves, similarity, layers, looks)
    for i, (axes, name) in enumerate(zip(panels, names)):
        colors = [looks[m][0] if m in looks else style.GRAY for m in measures]
        _draw_bars(axes, {m: values[name] for m, values in measures.items()}, colors)
        better = "higher" if higher_is_better[name] else "lower"
        axes.set_title(f"{name}: {better} is better", fontsize=9)
        if i:
            axes.set_yticklabels([])
    if title:
        figure.suptitle(shorten(title, 110), fontsize=10)
    save_picture(figure, png)


def _draw_curves(
    axes: Axes,
    similarity: Mapping[str, Sequence[Interval]],
    layers: Sequence[str],
    looks: Mapping[str, tuple[str, str]],
) -> None:
    places = np.arange(1 + len(layers))
    axes.axhline(0, color="black", linewidth=0.8)
    for name, intervals in similarity.items():
        color, dashes = looks[name]
        means, low, high = (np.array(a) for a in zip(*(interval[:3] for interval in intervals)))
        label = name.replace("_", " ")
        axes.plot(
            places, [1.0, *means], dashes, color=color, marker=".", linewidth=1.4, label=label
        )
        axes.fill_between(places[1:], low, high, color=color, alpha=0.15, linewidth=0)
    labels = ["trained", *(shorten(layer or "input", 22) for layer in layers)]
    axes.set_xticks(places, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_xlabel("random from the head down to this layer", fontsize=8)
    axes.set_ylabel("Spearman's correlation with the trained network's map", fontsize=8)
    axes.set_title("randomization: lower explains more of the network", fontsize=9)
    axes.set_ylim(top=1.02)
    tidy_axes(axes)
    if similarity:
        axes.legend(framealpha=0.85, edgecolor="none", fontsize=7)


def _draw_bars(axes: Axes, intervals: Mapping[str, Interval], colors: Sequence[str]) -> None:
    places = np.arange(len(intervals))
    means = np.array([interval.mean for interval in intervals.values()])
    reach = np.array(
        [
            (each.mean - each.low, each.high - each.mean) if each.is_known else (0.0, 0.0)
            for each in intervals.values()
        ]
    )
    axes.barh(places, means, height=0.62, color=colors, alpha=0.55)
    axes.errorbar(means, places, xerr=reach.T, fmt="none", ecolor="black", elinewidth=1)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [shorten(name.replace("_", " "), 22) for name in intervals], fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(len(intervals) - 0.4, -0.6)
    tidy_axes(axes, grid="x")
