"""The report of a search of cells: Markdown, CSV, curves of the regret, and the found cell."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from flax_cnns import files
from flax_cnns.analysis import statistics
from flax_cnns.analysis.plots import style
from flax_cnns.models.nas_bench_201 import EDGES, parse_cell
from flax_cnns.studies.search.nas.cells.regret import (
    BASELINE,
    SearcherComparison,
    find_winner,
    measure_floor,
    measure_noise,
    measure_regret,
    summarize,
)
from flax_cnns.studies.search.nas.cells.searchers import SEARCHERS
from flax_cnns.studies.search.nas.cells.space import prune_cell

COLORS = (style.BLACK, style.VERMILION, style.BLUE, style.SKY_BLUE)
OPERATION_COLORS = {
    "nor_conv_3x3": style.BLUE,
    "nor_conv_1x1": style.GREEN,
    "skip_connect": style.ORANGE,
    "avg_pool_3x3": style.PURPLE,
}


def write_report(comparison: SearcherComparison, folder: Path) -> list[str]:
    """Writes the report into `folder` and returns the names of its files."""
    winner, _ = find_winner(comparison)
    files.write_text(folder / "cells.md", write_markdown(comparison))
    files.write_text(folder / "regret.csv", write_csv(comparison))
    files.write_json(folder / "cell.json", winner._asdict())
    draw_regret(comparison, folder / "regret.png")
    draw_cell(winner.cell, folder / "cell.png")
    return ["cells.md", "regret.csv", "regret.png", "cell.json", "cell.png"]


def write_csv(comparison: SearcherComparison) -> str:
    """Returns the curves: mean regret and its 95 % interval after each evaluation."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["searcher", "evaluations", "regret", "low", "high", "seeds"])
    for name, values in measure_regret(comparison).items():
        for n, column in enumerate(values.T, 1):
            mean, low, high, seeds = statistics.mean(column)
            writer.writerow([name, n, *(f"{v:.4f}" for v in (mean, low, high)), seeds])
    return out.getvalue()


def write_markdown(comparison: SearcherComparison) -> str:
    """Returns the report: the noise of the table, the regrets, and the found cell."""
    noise, (winner, finders) = measure_noise(comparison.table), find_winner(comparison)
    rows = summarize(comparison)
    best = max(comparison.table.rows.values(), key=lambda row: row.test[0])
    searches = sum(map(len, comparison.histories.values()))
    lines = [
        "# Search of cells",
        "",
        f"{len(comparison.table.rows)} cells, {noise.connected} of them with a path from the input"
        f" to the output. Test accuracy of these: {noise.low:.1f} to {noise.high:.1f} % (5 % and"
        f" 95 % quantile), standard deviation {noise.spread:.2f} points. Over seeds, the standard"
        f" deviation of one cell is {noise.seed_noise:.2f} points ({noise.repeated} networks). The"
        f" ranks of two seeds have a correlation of {noise.seed_rank:.2f}, those of validation and"
        f" test accuracy {noise.split_rank:.2f}.",
        "",
        f"Simple regret after {comparison.evaluations} evaluations, in points of test accuracy;"
        f" mean and 95 % interval over {rows[0]['seeds']} seeds. A search that evaluates all cells"
        f" has a regret of {measure_floor(comparison.table):.2f}.",
        "",
        "| searcher | regret | minus random search | p | |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = [row["searcher"], _format_interval(row["regret"], row["low"], row["high"])]
        if row["searcher"] == BASELINE:
            cells += ["", "", ""]
        else:
            ends = row["difference_low"], row["difference_high"]
            cells += [
                _format_interval(row["difference"], *ends),
                statistics.format_p(row["p"]),
                row["verdict"],
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {each.description}" for name, each in SEARCHERS.items()), ""]
    lines += [
        f"Best validation accuracy of all {searches} searches, found by {finders} of them:"
        f" `{winner.cell}`, validation {100 * winner.validation[0]:.2f} %, test"
        f" {100 * winner.test[0]:.2f} %, {winner.params:,} parameters. Best test accuracy of the"
        f" table: {100 * best.test[0]:.2f} %.",
        "",
        "![regret](regret.png) ![cell](cell.png)",
        "",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------- pictures


def draw_regret(comparison: SearcherComparison, path: Path) -> None:
    """Draws the mean regret of each searcher after each evaluation, with 95 % intervals."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    regrets = measure_regret(comparison)
    for (name, values), color in zip(regrets.items(), COLORS):
        intervals = [statistics.mean(column) for column in values.T]
        x = range(1, len(intervals) + 1)
        axes.plot(x, [each.mean for each in intervals], color=color, label=name)
        ends = [each.low for each in intervals], [each.high for each in intervals]
        axes.fill_between(x, *ends, color=color, alpha=0.12, linewidth=0)
    floor = measure_floor(comparison.table)
    axes.axhline(floor, color=style.GRAY, linestyle="--", label="all cells evaluated")
    top = max(float(values[:, 2:].mean(0).max()) for values in regrets.values())
    axes.set_ylim(0, 1.3 * top)  # the first cells would hide the rest
    axes.set(xlabel="evaluations", ylabel="simple regret, points of test accuracy")
    seeds = len(next(iter(regrets.values())))
    axes.set_title(f"mean and 95 % interval over {seeds} seeds")
    axes.legend(frameon=False)
    style.tidy_axes(axes)
    style.save_picture(figure, path)


PLACES = ((0.0, 0.0), (1.0, 0.62), (2.0, -0.62), (3.0, 0.0))  # of the nodes


def draw_cell(cell: str, path: Path) -> None:
    """Draws a cell as a graph. Edges that cannot change the output are gray and dashed."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    pruned = parse_cell(prune_cell(cell))
    for (source, target), operation, kept in zip(EDGES, parse_cell(cell), pruned):
        if operation == "none":
            continue
        start, end = PLACES[source], PLACES[target]
        is_long = (source, target) == (0, 3)
        color = style.GRAY if kept == "none" else OPERATION_COLORS[operation]
        arrow = FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={-0.55 if is_long else 0}",
            arrowstyle="-|>",
            mutation_scale=16,
            shrinkA=24 if source == 0 else 13,
            shrinkB=26 if target == 3 else 13,
            linewidth=1.8,
            linestyle="--" if kept == "none" else "-",
            color=color,
        )
        axes.add_patch(arrow)
        share = 0.5 if is_long else 0.36 if (source, target) in ((0, 2), (1, 3)) else 0.5
        x, y = (a + share * (b - a) for a, b in zip(start, end))
        y += 0.83 if is_long else 0.0
        axes.text(
            *(x, y, operation),
            ha="center",
            va="center",
            fontsize=9,
            color=color,
            bbox=dict(facecolor="white", edgecolor="none", pad=1.5),
        )
    for number, (x, y) in enumerate(PLACES):
        name = {0: "input", 3: "output"}.get(number, str(number))
        axes.text(
            *(x, y, name),
            ha="center",
            va="center",
            fontsize=10,
            bbox=dict(boxstyle="circle,pad=0.35", facecolor="white", edgecolor="black"),
        )
    axes.set(xlim=(-0.4, 3.4), ylim=(-0.95, 1.15))
    axes.axis("off")
    style.save_picture(figure, path)


def _format_interval(mean: float, low: float, high: float) -> str:
    """Formats "1.20 (0.70 to 1.70)"; without the ends if they are unknown, as of one seed."""
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if math.isfinite(low) else f"{mean:.2f}"
