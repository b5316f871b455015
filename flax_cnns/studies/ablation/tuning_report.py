"""Reports how the rows of an ablation were tuned: what was chosen, and how sensitive each row is.

Everything comes from `ROW/tuned.json`; nothing needs Optuna.
"""

from __future__ import annotations

import csv
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_cnns.config.spaces import format_value
from flax_cnns.files import write_text
from flax_cnns.names import escape_unprintable
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.ablation.tuned_rows import TunedRow, TunedTrial, read_tuned_row

EDGE = 0.05  # a chosen value is at an edge if it is within this share of its range from the end


def read_rows(folder: pathlib.Path, plan: Mapping[str, Any]) -> list[TunedRow]:
    """Reads the rows that are tuned, in the order of the plan; [] if the plan tunes none."""
    names = [row["name"] for row in plan["rows"]] if "tuning" in plan else []
    rows = [read_tuned_row(folder, name) for name in names]
    return [row for row in rows if row is not None]


def write_csv(folder: pathlib.Path, rows: Sequence[TunedRow]) -> pathlib.Path:
    """Writes tuning.csv: a line for each trial of each row. Returns its path.

    `value`: the validation score. `untuned`: 1 for the row as it is in `sweep()`. `chosen`: 1 for
    the best trial. `values`: the drawn values as JSON.
    """
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["row", "trial", "state", "metric", "value", "untuned", "chosen", "values"])
    for row in rows:
        for trial in row.trials:
            out.writerow(
                [
                    *(row.name, trial.number, trial.state, row.metric),
                    "" if trial.validation is None else f"{trial.validation:.6g}",
                    int(row.has_untuned and trial.number == 0),
                    int(trial.number == row.best),
                    json.dumps(trial.values),
                ]
            )
    path = folder / "tuning.csv"
    write_text(path, escape_unprintable(text.getvalue()))
    return path


def format_section(rows: Sequence[TunedRow], plan: Mapping[str, Any]) -> list[str]:
    """Formats the section "Tuning" of the report; [] if the plan tunes no row."""
    if "tuning" not in plan:
        return []
    trials = plan["tuning"]["trials"]
    lines = [
        "## Tuning",
        "",
        f"Each row had {trials} trials over its own space, scored on the validation split. Its"
        " cells have the values of its best trial, and other seeds than the trials. Trials never"
        " saw the test split.",
        "",
    ]
    waiting = [row["name"] for row in plan["rows"] if row["name"] not in {r.name for r in rows}]
    if rows:
        metric = make_metric(rows[0].metric.removeprefix("validation/"))
        columns = [
            *("row", "trials", "chosen", "at an edge"),
            *(f"untuned{metric.unit}", f"chosen{metric.unit}", f"gain{metric.difference_unit}"),
            *(f"worst, median, best{metric.unit}", "rank of the untuned"),
        ]
        lines += ["| " + " | ".join(columns) + " |"]
        lines += ["|" + "|".join(["---"] * 4 + ["---:"] * (len(columns) - 4)) + "|"]
        lines += ["| " + " | ".join(_format_row(row, metric)) + " |" for row in rows]
        lines += [
            "",
            "Untuned, chosen, and worst to best are validation scores. The best of several trials"
            " is too optimistic by chance, so gains are not effects: the first table has the"
            " effects, on the test split. Worst to best shows how sensitive a row is to its values."
            f" A value is at an edge if it is within {EDGE:.0%} of its range from the end: a better"
            " one may be outside. All trials are in tuning.csv.",
        ]
    if unequal := [row for row in rows if _count_complete(row) < trials]:
        names = "; ".join(f"{row.name} ({_count_complete(row)})" for row in unequal)
        lines += ["", f"Not all {trials} trials of a row are complete: {names}. A trial that"]
        lines[-1] += " diverged or failed counts as one of its budget."
    if without := [row.name for row in rows if not row.has_untuned]:
        names = ", ".join(without)
        lines += ["", f"The space does not contain the row as it is: {names}."]
    if waiting:
        lines += ["", f"Not tuned yet: {', '.join(waiting)}."]
    return [*lines, ""]


def find_edges(row: TunedRow) -> list[str]:
    """Lists the chosen values at an edge of their range, such as "low schedule.learning_rate"."""
    edges = []
    for path, value in row.chosen.values.items() if row.chosen else ():
        known = row.space.get(path, {})
        if known.get("kind") not in ("float", "integer"):
            continue
        low, high = known["low"], known["high"]
        if known["log"]:
            low, high, value = math.log(low), math.log(high), math.log(value)
        place = (value - low) / (high - low)
        if place <= EDGE:
            edges.append(f"low {path}")
        elif place >= 1 - EDGE:
            edges.append(f"high {path}")
    return edges


def rank_untuned(row: TunedRow) -> tuple[int, int] | None:
    """Returns (rank of trial 0 among the complete trials from 1, their number).

    Equal scores get the better rank. None if trial 0 is not the row as it is or is not complete.
    """
    untuned = _get_untuned(row)
    if untuned is None or untuned.validation is None:
        return None
    scores = _list_scores(row)
    sign = 1 if row.mode == "max" else -1
    better = sum(sign * score > sign * untuned.validation for score in scores)
    return better + 1, len(scores)


def _format_row(row: TunedRow, metric: Metric) -> list[str]:
    """Returns the cells of a row of the table."""
    scores, chosen, untuned = _list_scores(row), row.chosen, _get_untuned(row)
    values = chosen.values if chosen else {}
    spread = "-"
    if scores:
        order = sorted(scores, reverse=row.mode == "min")
        parts = order[0], float(np.median(scores)), order[-1]
        spread = ", ".join(map(metric.format, parts))
    best = chosen.validation if chosen else None
    first = untuned.validation if untuned else None
    rank = rank_untuned(row)
    sign = 1 if row.mode == "max" else -1  # a gain is positive, also where less is better
    return [
        row.name,
        f"{len(scores)} of {len(row.trials)}",
        ", ".join(f"`{path}={format_value(value)}`" for path, value in values.items()) or "-",
        ", ".join(f"{which} `{path}`" for which, path in map(str.split, find_edges(row))) or "no",
        "-" if first is None else metric.format(first),
        "-" if best is None else metric.format(best),
        "-" if first is None or best is None else metric.format(sign * (best - first), "+"),
        spread,
        "-" if rank is None else f"{rank[0]} of {rank[1]}",
    ]


def _list_scores(row: TunedRow) -> list[float]:
    return [trial.validation for trial in row.trials if trial.validation is not None]


def _count_complete(row: TunedRow) -> int:
    return sum(trial.state == "complete" for trial in row.trials)


def _get_untuned(row: TunedRow) -> TunedTrial | None:
    return row.trials[0] if row.has_untuned and row.trials else None
