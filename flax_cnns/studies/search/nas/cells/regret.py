"""How far the searches end from the best cell of a table, with intervals over seeds.

The simple regret after n evaluations is the best test accuracy of the table, minus the test
accuracy of the cell with the best validation accuracy so far (of equals, the first).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from flax_cnns import files
from flax_cnns.analysis import statistics
from flax_cnns.checkpoint.lock import DirectoryLock
from flax_cnns.errors import UserError
from flax_cnns.models.nas_bench_201 import parse_cell
from flax_cnns.studies.search.nas.cells import journal
from flax_cnns.studies.search.nas.cells.searchers import SEARCHERS
from flax_cnns.studies.search.nas.cells.space import SMALL_SPACE, is_connected, prune_cell
from flax_cnns.studies.search.nas.cells.table import CellRow, CellTable

BASELINE = "random"


class SearcherComparison(NamedTuple):
    """Histories of all searches over one table."""

    table: CellTable
    evaluations: int
    histories: dict[str, dict[int, list[str]]]  # searcher -> seed -> cells in their order


def compare_searchers(
    table: CellTable,
    folder: Path,
    *,
    evaluations: int = 50,
    seeds: int = 20,
    say: Callable[[str], None] = print,
) -> SearcherComparison:
    """Runs every searcher with every seed; searches that are in `folder` are not repeated.

    Raises `UserError` if the folder holds searches over another table or with another number of
    evaluations, or if the table lacks cells.
    """
    size = len(SMALL_SPACE) ** len(parse_cell(next(iter(table.rows))))
    if not 1 <= evaluations <= size or len(table.rows) != size:
        raise UserError(
            f"expected 1 to {size} evaluations and a table of {size} cells, got {evaluations} and"
            f" {len(table.rows)}"
        )
    with DirectoryLock(folder):
        _check_settings(folder / "searches.json", table, evaluations)
        path = folder / "searches.jsonl"
        done = _read_searches(path)
        for name, searcher in SEARCHERS.items():
            missing = [seed for seed in range(seeds) if (name, seed) not in done]
            if missing:
                say(f"{name}: {len(missing)} of {seeds} searches to do")
            for seed in missing:
                history = searcher.search(
                    lambda cell: table.rows[cell].validation[0], evaluations, seed
                )
                row = {"searcher": name, "seed": seed, "cells": history}
                journal.append_row(path, row)
                done[name, seed] = history
    histories = {name: {seed: done[name, seed] for seed in range(seeds)} for name in SEARCHERS}
    return SearcherComparison(table, evaluations, histories)


def _check_settings(path: Path, table: CellTable, evaluations: int) -> None:
    accuracies = [row.validation[0] for row in table.rows.values()]
    wanted = {"evaluations": evaluations, "table": accuracies}
    if not path.exists():
        files.write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    if found["evaluations"] != evaluations:
        what = f"with {found['evaluations']} evaluations, not {evaluations}"
    elif found["table"] != accuracies:
        what = "over another table"
    else:
        return
    raise UserError(f"{path.parent} has searches {what}; use another --workdir")


def _read_searches(path: Path) -> dict[tuple[str, int], list[str]]:
    return {(row["searcher"], row["seed"]): row["cells"] for row in journal.read_rows(path)}


# ---------------------------------------------------------------------------- numbers


def find_best_so_far(table: CellTable, history: Sequence[str]) -> list[CellRow]:
    """Returns the cell with the best validation accuracy after each evaluation."""
    best, out = table.rows[history[0]], []
    for cell in history:
        row = table.rows[cell]
        best = row if row.validation[0] > best.validation[0] else best
        out.append(best)
    return out


def measure_regret(comparison: SearcherComparison) -> dict[str, np.ndarray]:
    """Returns the regrets of each searcher, in points: f64 [seeds evaluations]."""
    best = max(row.test[0] for row in comparison.table.rows.values())
    return {
        name: 100
        * np.array(
            [
                [best - row.test[0] for row in find_best_so_far(comparison.table, history)]
                for _, history in sorted(runs.items())
            ]
        )
        for name, runs in comparison.histories.items()
    }


def measure_floor(table: CellTable) -> float:
    """Returns the regret in points of a search that evaluates all cells.

    It is not 0, because the validation accuracy does not tell the best cells apart.
    """
    rows = list(table.rows.values())
    return 100 * (
        max(row.test[0] for row in rows) - find_best_so_far(table, list(table.rows))[-1].test[0]
    )


def find_winner(comparison: SearcherComparison) -> tuple[CellRow, int]:
    """Returns the cell with the best validation accuracy of all searches, and how many found it."""
    ends = [
        find_best_so_far(comparison.table, history)[-1]
        for runs in comparison.histories.values()
        for history in runs.values()
    ]
    winner = max(ends, key=lambda row: row.validation[0])
    return winner, sum(row.cell == winner.cell for row in ends)


class TableNoise(NamedTuple):
    """How a table's differences between cells compare with those between seeds."""

    connected: int  # cells with a path from the input to the output
    spread: float  # standard deviation of the test accuracy over connected cells, in points
    low: float  # 5 % and 95 % quantile of the test accuracy of connected cells, in percent
    high: float
    seed_noise: float  # standard deviation over the seeds of one cell, pooled, in points
    seed_rank: float  # Spearman's correlation of test accuracies between two seeds, their mean
    split_rank: float  # the same between validation and test accuracy with one seed
    repeated: int  # networks with several seeds


def measure_noise(table: CellTable) -> TableNoise:
    """Measures the noise on connected cells. Of repeated cells, those of one network count once."""
    rows = [row for row in table.rows.values() if is_connected(row.cell)]
    test = 100 * np.array([row.test[0] for row in rows])
    unique = {prune_cell(row.cell): row.test for row in rows if len(row.test) > 1}
    several = 100 * np.array(list(unique.values()))  # [cells seeds]
    pairs = [(i, j) for i in range(several.shape[1]) for j in range(i)]
    ranks = [spearmanr(several[:, i], several[:, j])[0] for i, j in pairs]
    return TableNoise(
        connected=len(rows),
        spread=float(test.std(ddof=1)),
        low=float(np.quantile(test, 0.05)),
        high=float(np.quantile(test, 0.95)),
        seed_noise=float(np.sqrt(several.var(axis=1, ddof=1).mean())),
        seed_rank=float(np.mean(ranks)),
        split_rank=float(spearmanr([row.validation[0] for row in rows], test)[0]),
        repeated=len(several),
    )


def summarize(comparison: SearcherComparison) -> list[dict[str, Any]]:
    """Returns one row for each searcher: its regret, and its paired difference to random search.

    A seed gives random search and evolution the same first cells.
    """
    rows = []
    regrets = measure_regret(comparison)
    ends = {name: dict(enumerate(values[:, -1])) for name, values in regrets.items()}
    for name, values in ends.items():
        interval = statistics.mean(list(values.values()))
        row: dict[str, Any] = dict(
            searcher=name,
            seeds=interval.n,
            regret=interval.mean,
            low=interval.low,
            high=interval.high,
        )
        if name != BASELINE:
            difference = statistics.paired_difference(values, ends[BASELINE])
            _, low, high, _ = difference.interval
            row |= dict(difference=difference.interval.mean, difference_low=low)
            row |= dict(difference_high=high, p=difference.p, verdict=judge(low, high))
        rows.append(row)
    return rows


def judge(low: float, high: float) -> str:
    """Says in words whether an interval of regret minus that of random search excludes 0."""
    if high < 0:
        return "beats random search"
    return "is worse than random search" if low > 0 else "does not beat random search"
