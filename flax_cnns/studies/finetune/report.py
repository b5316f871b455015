"""Reports the results of fine-tuning strategies: tables, a picture and JSON."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from flax_cnns import files
from flax_cnns.analysis import statistics
from flax_cnns.analysis.plots import style
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes
from flax_cnns.studies.finetune.compare import StrategyComparison

# The advice of Stanford's CS231n for (little, much) data, by the target's name.
LECTURE_ADVICE = {
    "similar": ("linear classifier on the top", "fine-tune a few layers"),
    "dissimilar": ("linear classifiers on several stages", "fine-tune many layers"),
}


def _mean(values: Sequence[float]) -> str:
    """Formats a mean in percent, "81.2 ± 0.4", with the standard deviation of several values."""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def make_tables(result: StrategyComparison) -> list[Table]:
    """Makes the tables of a comparison.

    Each target has a table of accuracies and, if possible, a table of differences from scratch. If
    all runs have a validation split, a last table shows the best strategies and CS231n's advice.
    """
    tables = []
    for target in result.targets:
        spread = f", mean ± sd, n={result.seeds}" if result.seeds > 1 else ""
        table = Table(title=f"{target}: test accuracy in %{spread}")
        table.add_column("strategy")
        for fraction in result.fractions:
            images = result.select(target, fraction, result.strategies[0])[0].images
            table.add_column(f"{fraction:.4g} ({images:,} images)", justify="right")
        table.add_column("training, s", justify="right")
        for strategy in result.strategies:
            cells = [result.select(target, fraction, strategy) for fraction in result.fractions]
            seconds = np.mean([r.seconds for cell in cells for r in cell])
            row = [_mean([r.test for r in cell]) for cell in cells]
            table.add_row(strategy, *row, f"{seconds:.1f}")
        tables.append(table)
        if "scratch" in result.strategies and len(result.strategies) > 1 and result.seeds > 1:
            tables.append(_make_difference_table(result, target))
    return [*tables, _make_best_table(result)] if _is_validated(result) else tables


def _make_difference_table(result: StrategyComparison, target: str) -> Table:
    """Makes the table of differences from scratch, paired by seed: both see the same examples."""
    table = Table(title=f"{target}: difference from scratch in points, 95 % t interval over seeds")
    table.add_column("strategy")
    for fraction in result.fractions:
        table.add_column(f"{fraction:.4g}", justify="right")

    def accuracies(fraction: float, strategy: str) -> dict[int, float]:
        return {r.seed: 100 * r.test for r in result.select(target, fraction, strategy)}

    for strategy in result.strategies:
        row = []
        for fraction in result.fractions:
            both = accuracies(fraction, strategy), accuracies(fraction, "scratch")
            interval = statistics.paired_difference(*both).interval
            ends = f" ({interval.low:+.1f} to {interval.high:+.1f})" if interval.is_known else ""
            row.append(f"{interval.mean:+.1f}{ends}")
        if strategy != "scratch":
            table.add_row(strategy, *row)
    return table


def _make_best_table(result: StrategyComparison) -> Table:
    """Makes the table of the best strategy of each target with the least and the most data, and
    CS231n's advice."""
    ends = tuple(dict.fromkeys((result.fractions[0], result.fractions[-1])))
    table = Table(title="best by validation: test accuracy in %", show_lines=True)
    table.add_column("target")
    for fraction in ends:
        table.add_column(f"{fraction:.4g} of the training examples")
    for target in result.targets:
        cells = []
        for i, fraction in enumerate(ends):
            best = find_best_strategy(result, target, fraction)
            lines = [f"{best} {_mean([r.test for r in result.select(target, fraction, best)])}"]
            if "scratch" in result.strategies and best != "scratch":
                lines += [
                    f"scratch {_mean([r.test for r in result.select(target, fraction, 'scratch')])}"
                ]
            if target in LECTURE_ADVICE and len(ends) == 2:
                lines += [f"CS231n: {LECTURE_ADVICE[target][i]}"]
            cells.append("\n".join(lines))
        table.add_row(target, *cells)
    return table


def _is_validated(result: StrategyComparison) -> bool:
    return all(record.validation is not None for record in result.records)


def find_best_strategy(result: StrategyComparison, target: str, fraction: float) -> str:
    """Returns the strategy with the best mean validation accuracy; the first of equal ones."""

    def accuracy(strategy: str) -> float:
        records = result.select(target, fraction, strategy)
        values = [r.validation for r in records if r.validation is not None]
        return float(np.mean(values))

    return max(result.strategies, key=accuracy)


def describe_speed(result: StrategyComparison) -> list[str]:
    """Compares the training times of `features` and `linear`, one line for each fraction."""
    if not {"linear", "features"} <= set(result.strategies):
        return []
    lines = []
    for fraction in result.fractions:
        linear, features = (
            np.mean([r.seconds for t in result.targets for r in result.select(t, fraction, name)])
            for name in ("linear", "features")
        )
        lines.append(
            f"{fraction:g} of the examples: features {features:.2f} s, linear {linear:.2f} s,"
            f" {linear / features:.1f} times as long"
        )
    return lines


# Dashed: the network is frozen. Dotted: part of it is not loaded.
_STYLES: dict[str, dict[str, Any]] = {
    "scratch": dict(color=style.BLACK, marker="o", linewidth=2),
    "linear": dict(color=style.SKY_BLUE, marker="s", linestyle="--"),
    "features": dict(color=style.BLUE, marker="D", linestyle="--"),
    "linear_stages": dict(color="#7B4FA3", marker="P", linestyle="--"),
    "last_k": dict(color="#F0C000", marker="^"),
    "all_slowly": dict(color=style.VERMILION, marker="v"),
    "head_then_all": dict(color=style.ORANGE, marker="<"),
    "gradual": dict(color=style.GREEN, marker=">"),
    "layer_decay": dict(color=style.PURPLE, marker="X"),
    "upper_only": dict(color="#666666", marker="x", linestyle=":"),
    "lower_only": dict(color=style.GRAY, marker="+", linestyle=":"),
}


def draw(result: StrategyComparison, png: pathlib.Path) -> None:
    """Draws the test accuracy over the number of training images, a panel for each target."""
    number = len(result.targets)
    columns = min(number, 4)
    rows = -(-number // columns)
    figure = Figure(figsize=(1.8 + 4.4 * columns, 0.5 + 4.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[number:]:
        panel.set_visible(False)
    for panel, target in zip(panels, result.targets):
        for i, strategy in enumerate(result.strategies):
            cells = [result.select(target, fraction, strategy) for fraction in result.fractions]
            images = np.array([cell[0].images for cell in cells])
            # Shifted slightly, so that the error bars do not overlap.
            images = images * 1.02 ** (i - (len(result.strategies) - 1) / 2)
            accuracy = [100 * np.mean([r.test for r in cell]) for cell in cells]
            spread = [
                100 * np.std([r.test for r in cell], ddof=1) for cell in cells if len(cell) > 1
            ]
            panel.errorbar(
                images,
                accuracy,
                spread or None,
                label=strategy,
                capsize=2,
                markersize=5,
                elinewidth=0.8,
                **_STYLES[strategy],
            )
        panel.set(xscale="log", xlabel="training images", title=shorten(target, 44))
        sizes = [result.select(target, f, result.strategies[0])[0].images for f in result.fractions]
        # Wide limits keep the shifted points of one size together, even with a single size.
        low, high = min(sizes) / 1.5, max(sizes) * 1.5
        panel.set_xlim(low, high)
        ticks = sizes[:1]
        for size in sizes[1:]:  # ticks are at least the width of a number apart
            if math.log(size / ticks[-1]) > 0.12 * math.log(high / low):
                ticks.append(size)
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.minorticks_off()
        tidy_axes(panel)
    for panel in panels[::columns]:
        panel.set_ylabel("test accuracy, %")
    seeds = f"n={result.seeds} seeds, bars: standard deviation" if result.seeds > 1 else "one seed"
    figure.suptitle(f"fine-tuning against training from scratch; {seeds}", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    save_picture(figure, png)


def save(result: StrategyComparison, path: pathlib.Path, command: dict[str, Any]) -> None:
    """Writes the results, the best strategies and the command into a JSON file."""
    best = {
        target: {f"{f:g}": find_best_strategy(result, target, f) for f in result.fractions}
        for target in (result.targets if _is_validated(result) else ())
    }
    content = {
        "command": command,
        "source": result.source,
        "best_by_validation": best,
        "records": [record._asdict() for record in result.records],
    }
    files.write_json(path, content)
