"""Draws the best value that searches have found, over what they have spent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flax_cnns.analysis.plots import style
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes

COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE)


class BudgetCurve(NamedTuple):
    """The best value so far of one kind of search, over its seeds; NaN where it is unknown."""

    spent: np.ndarray  # [points]
    mean: np.ndarray  # [points]
    low: np.ndarray  # [points] the ends of the mean's interval
    high: np.ndarray  # [points]
    seeds: Sequence[np.ndarray]  # [points] each


def draw_budget_curves(
    curves: Mapping[str, BudgetCurve],
    png: str | os.PathLike,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
) -> None:
    """Draws the mean over the seeds, a band for its interval, and a thin line for each seed.

    The y axis leaves out what all searches have passed after a fifth of the budget. Raises
    `UserError` if the file cannot be written.
    """
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), COLORS * len(curves)):
        for seed in curve.seeds:
            axes.step(curve.spent, seed, where="post", color=color, linewidth=0.7, alpha=0.55)
        axes.step(curve.spent, curve.mean, where="post", color=color, linewidth=2.2, label=name)
        band: dict[str, Any] = dict(step="post", color=color, alpha=0.16, linewidth=0)
        axes.fill_between(curve.spent, curve.low, curve.high, **band)
    seeds = [seed for curve in curves.values() for seed in curve.seeds]
    later = np.concatenate([seed[len(seed) // 5 :] for seed in seeds] or [np.array([])])
    later = later[np.isfinite(later)]
    if later.size and np.ptp(later):
        margin = 0.08 * np.ptp(later)
        axes.set_ylim(later.min() - margin, later.max() + margin)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(shorten(title, 100), fontsize="medium", loc="left")
    axes.legend(fontsize=9, loc="best", title="mean, 95 % interval; thin: seeds", title_fontsize=8)
    tidy_axes(axes)
    save_picture(figure, png)
