"""The report of an ablation: tables and pictures of what is complete.

Everything is made anew from `ablation.json` and each run's config and `metrics.jsonl`; a cell's own
JSON says only why it has no result.
"""

from __future__ import annotations

import collections
import csv
import io
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_cnns.analysis import statistics
from flax_cnns.analysis.plots import forest
from flax_cnns.analysis.statistics import Difference, Interval
from flax_cnns.errors import UserError
from flax_cnns.files import write_text
from flax_cnns.names import escape_unprintable
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.ablation.reading import (
    RowResults,
    check_metric_logged,
    count_datasets,
    count_params_and_macs,
    find_changed_sources,
    read_cells,
    read_plan,
    require_metric,
)

ALPHA = 0.05  # of a corrected p-value below which a difference is printed bold


class RowSummary(NamedTuple):
    """A line of the tables; NaN or None where nothing is known."""

    row: RowResults
    value: Interval  # of the metric
    error: Interval  # 1 less the metric, for shares
    difference: Difference | None  # None: the baseline
    p_holm: float
    gap: float | None  # of the metric, on the training examples less the test's
    size: tuple[int, int | None] | None  # parameters, MACs
    seconds_per_step: float | None
    seconds: float | None
    metric: Metric = Metric("accuracy")

    @property
    def is_significant(self) -> bool:
        """Whether the difference stands out: its interval leaves zero out, as printed too, and the
        corrected p-value is small."""
        if self.difference is None or not self.p_holm < ALPHA:
            return False
        found, rounded = self.difference.interval, self.metric.round
        return found._replace(low=rounded(found.low), high=rounded(found.high)).excludes_zero


def write(
    folder: str | os.PathLike, *, interval: str = "t", metric: str = "accuracy"
) -> list[pathlib.Path]:
    """report.md, report.csv, forest.png and curves.png of an ablation's folder.

    `interval`: t or bootstrap (see `analysis.statistics`); p-values are those of paired t-tests
    with either. `metric`: NAME of `test/NAME` in the runs' logs. Raises `UserError` where there is
    no ablation, no cell of it is complete, or no complete one logged the metric.
    """
    statistics.check_method(interval)
    folder, name = pathlib.Path(folder), metric.removeprefix("test/")
    plan = read_plan(folder)
    rows = [
        RowResults(one["name"], one["overrides"], read_cells(folder / one["name"], plan["seeds"]))
        for one in plan["rows"]
    ]
    if not any(row.records for row in rows):
        states = collections.Counter(cell.status for row in rows for cell in row.cells.values())
        counts = ", ".join(f"{n} {status}" for status, n in sorted(states.items()))
        raise UserError(f"{folder}: no cell is complete ({counts}): there is nothing to report")
    check_metric_logged(rows, name, folder)
    rows = [require_metric(row, name) for row in rows]
    values = [value for row in rows for value in row.values(f"test/{name}").values()]
    of = make_metric(name, values)
    told = _tell(rows, plan["baseline"], interval, of)
    paths = [folder / name for name in ("report.md", "report.csv", "forest.png", "curves.png")]
    _forest(told, plan, of, paths[2])
    _curves(rows, plan["baseline"], of, paths[3])
    write_text(paths[1], escape_unprintable(_csv(told, plan["seeds"], of)))
    write_text(paths[0], escape_unprintable(_markdown(told, plan, interval, of, folder)))
    return paths


# ---------------------------------------------------------------------------- numbers


def _tell(
    rows: Sequence[RowResults], baseline: str, method: str, metric: Metric
) -> list[RowSummary]:
    test = f"test/{metric.name}"
    reference = next((row.values(test) for row in rows if row.name == baseline), {})
    differences = [
        None
        if row.name == baseline
        else statistics.paired_difference(row.values(test), reference, method=method)
        for row in rows
    ]
    corrected = statistics.holm([math.nan if d is None else d.p for d in differences])
    told = []
    for row, difference, p_holm in zip(rows, differences, corrected):
        values, fit = row.values(test), row.values(f"fit/{metric.name}")
        done = row.records.values()
        told.append(
            RowSummary(
                row,
                statistics.mean(list(values.values()), method=method),
                statistics.mean([1 - value for value in values.values()], method=method),
                difference,
                p_holm,
                _mean(fit[s] - values[s] for s in fit),
                next((found for record in done if (found := count_params_and_macs(record))), None),
                _mean(record.seconds_per_step for record in done),
                _mean(record.seconds for record in done),
                metric,
            )
        )
    return told


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


# ---------------------------------------------------------------------------- tables


# Columns of every report.csv; a metric that is called like one of them is `test_NAME` there.
_COLUMNS = {"row", "seeds", "complete", "failed", "diverged", "interrupted", "damaged", "missing"}
_COLUMNS |= {"difference", "pairs", "p", "p_holm", "gap", "parameters", "macs"}
_COLUMNS |= {"seconds_per_step", "seconds"}


def _csv(told: Sequence[RowSummary], number: int, metric: Metric) -> str:
    """Shares of 1, not per cent; empty where nothing is known; a column for each seed's value."""
    table, column = [], f"test_{metric.name}" if metric.name in _COLUMNS else metric.name
    for one in told:
        row, line = one.row, {"row": one.row.name, "seeds": number, "complete": one.value.n}
        states = collections.Counter(cell.status for cell in row.cells.values())
        for status in ("failed", "diverged", "interrupted", "damaged", "missing"):
            line[status] = states[status]
        apart = one.difference or Difference(Interval(*[math.nan] * 3, 0), math.nan)
        columns = {column: one.value} | ({"error": one.error} if metric.is_share else {})
        for name, found in (*columns.items(), ("difference", apart.interval)):
            line |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        line |= {"pairs": apart.interval.n, "p": apart.p, "p_holm": one.p_holm, "gap": one.gap}
        line |= dict(zip(("parameters", "macs"), one.size or (None, None)))
        line |= {"seconds_per_step": one.seconds_per_step, "seconds": one.seconds}
        values = row.values(f"test/{metric.name}")
        line |= {f"{column}_seed{s}": values.get(s) for s in range(number)}
        table.append({k: "" if v is None or v != v else v for k, v in line.items()})
    text = io.StringIO()
    out = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    out.writeheader()
    out.writerows(table)
    return text.getvalue()


def _markdown(
    told: Sequence[RowSummary],
    plan: dict[str, Any],
    method: str,
    metric: Metric,
    folder: pathlib.Path,
) -> str:
    columns = [
        *("row", "seeds", f"test {metric.name}{metric.unit}"),
        *(("test error, %",) if metric.is_share else ()),
        *(f"difference{metric.points}", "p", "p Holm", f"train − test{metric.points}"),
        *("parameters", "MACs", "s per step", "time, s"),
    ]
    lines = [
        f"# Ablation: {folder.resolve().name}",
        "",
        f"{len(told)} rows × {plan['seeds']} seeds; the baseline is `{plan['baseline']}`.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|",
    ]
    lines += ["| " + " | ".join(_line(one)) + " |" for one in told]
    lines += [
        "",
        *_notes(told, plan, method, metric),
        "",
        "![differences to the baseline](forest.png)",
        "",
    ]
    lines += ["![learning curves](curves.png)", "", "## Rows", ""]
    for one in told:
        changed = ", ".join(f"`{name}={value!r}`" for name, value in one.row.overrides.items())
        lines.append(f"- {one.row.name}: {changed or 'the config as it is'}")
    broken = [
        f"- {one.row.name}, seed {s}: {cell.status}" + (f": {cell.error}" if cell.error else "")
        for one in told
        for s, cell in one.row.cells.items()
        if cell.record is None
    ]
    if broken:
        lines += ["", "## Cells without a result", "", *broken]
    return "\n".join(lines) + "\n"


def _notes(
    told: Sequence[RowSummary], plan: dict[str, Any], method: str, metric: Metric
) -> list[str]:
    rows, tests = [one.row for one in told], sum(not math.isnan(one.p_holm) for one in told)
    kind = (
        "Student's t over the seeds"
        if method == "t"
        else f"the percentile bootstrap of {statistics.RESAMPLES:,} resamples, too narrow from a"
        " few seeds"
    )
    notes = [
        f"In brackets: 95 % intervals, {kind}. Differences to the baseline are paired by seed, over"
        f" the seeds that both have; p is that of the paired t-test, Holm's corrects for {tests}"
        f" tests. Bold: zero is outside the interval, and the corrected p is below {ALPHA}. No"
        " brackets: one seed, or equal values in all, which tell nothing of the spread.",
        "",
        f"Means over the complete seeds: train − test is the {metric.name} on the training examples"
        " as they are (`train.evaluate_train`) less the test's; seconds per step leave out"
        " compiling, evaluating and saving, the time of a run does not.",
    ]
    if not metric.is_share:
        notes += [
            "",
            f"A positive difference is more {metric.name}, whether that is better or not.",
        ]
    if short := [one.row for one in told if one.row.why_incomplete]:
        named = "; ".join(f"{row.name} ({row.why_incomplete})" for row in short)
        notes += ["", f"Not all seeds are complete: {named}."]
    if not any(one.row.records for one in told if one.row.name == plan["baseline"]):
        notes += ["", "No seed of the baseline is complete: there are no differences yet."]
    if count_datasets(rows, plan) > 1:
        notes += [
            "",
            "**Not all cells have seen the same data**: they changed between the runs.",
        ]
        notes += ["The same command without --rows and --index runs the older cells again."]
    if changed := find_changed_sources(rows):
        named = ", ".join(f"`{name}`" for name in changed)
        notes += ["", f"**Not all cells ran the same code**: the source of {named} changed."]
    return notes


def _line(one: RowSummary) -> list[str]:
    row, apart, metric = one.row, one.difference, one.metric
    parameters, macs = one.size or (None, None)
    difference = "baseline" if apart is None else _interval(apart.interval, metric, "+")
    if apart is not None and apart.interval.n < one.value.n:
        difference += f" ({apart.interval.n} pairs)"
    return [
        row.name,
        f"{one.value.n} of {len(row.cells)}"
        + (f" ({row.why_incomplete})" if row.why_incomplete else ""),
        _interval(one.value, metric),
        *([_interval(one.error, metric)] if metric.is_share else []),
        f"**{difference}**" if one.is_significant else difference,
        _p(math.nan if apart is None else apart.p),
        _p(one.p_holm),
        "-" if one.gap is None else metric.write(one.gap, "+"),
        "-" if parameters is None else f"{parameters:,}",
        "-" if macs is None else f"{macs:,}",
        "-" if one.seconds_per_step is None else f"{one.seconds_per_step:.3g}",
        "-" if one.seconds is None else f"{one.seconds:.0f}",
    ]


def _interval(found: Interval, metric: Metric, sign: str = "") -> str:
    if not found.n:
        return "-"
    mean, low, high = (metric.write(value, sign) for value in found[:3])
    return f"{mean} [{low}, {high}]" if found.is_known else mean


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


# ---------------------------------------------------------------------------- pictures


def _forest(
    told: Sequence[RowSummary], plan: dict[str, Any], metric: Metric, png: pathlib.Path
) -> None:
    baseline = next((one for one in told if one.row.name == plan["baseline"]), None)
    effects, test, factor = [], f"test/{metric.name}", metric.factor
    for one in told:
        if one.difference is None:
            continue
        mean, low, high, n = one.difference.interval
        points = Interval(factor * mean, factor * low, factor * high, n)
        ours = one.row.values(test)
        theirs = baseline.row.values(test) if baseline else {}
        pairs = [factor * (ours[s] - theirs[s]) for s in sorted(ours.keys() & theirs.keys())]
        without = f" ({one.row.why_incomplete})" if one.row.why_incomplete else ""
        effects.append(forest.ForestRow(one.row.name, points, pairs, f"no complete pair{without}"))
    title = f"against {plan['baseline']}"
    if baseline and baseline.value.n:
        unit = " %" if metric.is_share else ""
        title += f": {metric.write(baseline.value.mean)}{unit}, n={baseline.value.n}"
    forest.draw_forest(
        effects,
        png,
        title=title,
        what=f"difference of test {metric.name}{metric.points}",
        decimals=metric.decimals,
        more_is_better=metric.is_share,
    )


def _curves(rows: Sequence[RowResults], baseline: str, metric: Metric, png: pathlib.Path) -> None:
    """Against the images seen, since batch sizes may differ; of the training batches, as they are
    augmented and mixed, where most runs validate too seldom for a curve."""
    logs = [record for row in rows for record in row.records.values()]

    def points(split: str) -> float:
        return float(
            np.median([record.series(f"{split}/{metric.name}")[0].size for record in logs])
        )

    often = points("validation") > 2 or not points("train")
    split, what = ("validation", "validation") if often else ("train", "training batches'")
    most = max(record.step * record.config.data.batch_size for record in logs)
    unit, word = (1000, "thousand images seen") if most >= 10_000 else (1, "images seen")
    drawn = {}
    for row in rows:
        drawn[row.name] = []
        for record in row.records.values():
            steps, values = record.series(f"{split}/{metric.name}")
            if not often:
                steps, values = _windows(steps), _windows(values)
            images = steps * record.config.data.batch_size / unit
            drawn[row.name].append((images, metric.factor * values))
    forest.draw_row_curves(
        drawn,
        baseline,
        png,
        what=f"{what} {metric.name}{metric.unit}",
        across=word,
        decimals=metric.decimals,
        more_is_better=metric.is_share,
    )


def _windows(series: np.ndarray, most: int = 25) -> np.ndarray:
    """Means of `most` windows at most: a few batches' accuracy is too noisy for a picture."""
    return np.array([part.mean() for part in np.array_split(series, most) if part.size])
