"""Formats the rows of an ablation as a CSV file and as a Markdown table with notes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from flax_cnns.analysis import statistics
from flax_cnns.analysis.statistics import Difference, Interval
from flax_cnns.runs.metric import Metric
from flax_cnns.studies.ablation import margins, seeds_needed
from flax_cnns.studies.ablation.summaries import ALPHA, RowSummary

STATUSES = ("failed", "diverged", "interrupted", "damaged", "missing")  # each has a column

# Columns of every report.csv. The values of a metric with such a name are in column `test_NAME`.
COLUMNS = {"piece", "row", "seeds", "complete", *STATUSES}
COLUMNS |= {"difference", "pairs", "p", "p_holm", "gap", "parameters", "macs"}
COLUMNS |= {"seconds_per_step", "seconds", *margins.COLUMNS, *seeds_needed.COLUMNS}


def name_column(metric: str) -> str:
    """Returns the column of report.csv with a metric's mean; `_seedS` follows for each seed."""
    return f"test_{metric}" if metric in COLUMNS else metric


def format_csv(summaries: Sequence[RowSummary], metric: Metric, power: float | None) -> str:
    """Formats report.csv: fractions from 0 to 1, unknown values empty, a column per seed."""
    all_seeds = range(max(summary.row.seeds for summary in summaries))
    margin = any(summary.margin for summary in summaries)
    table, column = [], name_column(metric.name)
    for summary in summaries:
        row = summary.row
        line: dict[str, Any] = {"piece": row.piece} if row.piece else {}
        line |= {"row": row.name, "seeds": row.seeds, "complete": summary.value.n}
        line |= {status: row.without_result.get(status, 0) for status in STATUSES}
        unknown = Difference(Interval(math.nan, math.nan, math.nan, 0), math.nan)
        difference = summary.difference or unknown
        intervals = {column: summary.value}
        intervals |= {"error": summary.error} if metric.is_fraction else {}
        intervals |= {"difference": difference.interval}
        for name, interval in intervals.items():
            line |= {
                name: interval.mean,
                f"{name}_low": interval.low,
                f"{name}_high": interval.high,
            }
        line |= {"pairs": difference.interval.n, "p": difference.p, "p_holm": summary.p_holm}
        line |= margins.make_columns(summary.margin, metric) if margin else {}
        if power is not None:
            line |= seeds_needed.make_columns(summary.seeds_needed, power, metric)
        line |= {"gap": row.gap}
        line |= dict(zip(("parameters", "macs"), row.size or (None, None)))
        line |= {"seconds_per_step": row.seconds_per_step, "seconds": row.seconds}
        line |= {f"{column}_seed{s}": row.values.get(s) for s in all_seeds}
        table.append({k: "" if v is None or v != v else v for k, v in line.items()})
    text = io.StringIO()
    out = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    out.writeheader()
    out.writerows(table)
    return text.getvalue()


def format_table(summaries: Sequence[RowSummary], metric: Metric, power: float | None) -> list[str]:
    """Returns the lines of the Markdown table. Pieces are numbered from 1."""
    points = metric.difference_unit
    margin = next((summary.margin for summary in summaries if summary.margin), None)
    pieces = list(dict.fromkeys(s.row.piece for s in summaries if s.row.piece))
    columns = [
        *("row", *(("piece",) if pieces else ()), "seeds", f"test {metric.name}{metric.unit}"),
        *(("test error, %",) if metric.is_fraction else ()),
        *(f"difference{points}", "p", "p Holm"),
        *((margins.make_title(margin, metric),) if margin else ()),
        *((seeds_needed.make_title(power, metric),) if power is not None else ()),
        f"train − test{points}",
        *("parameters", "MACs", "s per step", "time, s"),
    ]
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|",
    ]
    for summary in summaries:
        name, *cells = _format_row(summary, bool(margin), power is not None)
        piece = [str(pieces.index(summary.row.piece) + 1)] if pieces else []
        lines.append("| " + " | ".join([name, *piece, *cells]) + " |")
    return lines


def _format_row(summary: RowSummary, with_margin: bool, with_power: bool) -> list[str]:
    """Returns the cells of a row of the table."""
    row, difference, metric = summary.row, summary.difference, summary.metric
    parameters, macs = row.size or (None, None)
    text = "baseline"
    if difference is not None:
        text = _format_interval(difference.interval, metric, "+")
        if difference.interval.n < summary.value.n:
            text += f" ({difference.interval.n} pairs)"
    seeds = f"{summary.value.n} of {row.seeds}"
    return [
        row.name,
        seeds + (f" ({row.why_incomplete})" if row.why_incomplete else ""),
        _format_interval(summary.value, metric),
        *([_format_interval(summary.error, metric)] if metric.is_fraction else []),
        f"**{text}**" if summary.is_significant else text,
        statistics.format_p(math.nan if difference is None else difference.p),
        statistics.format_p(summary.p_holm),
        *([margins.describe(summary.margin, metric)] if with_margin else []),
        *([seeds_needed.describe(summary.seeds_needed)] if with_power else []),
        "-" if row.gap is None else metric.format(row.gap, "+"),
        "-" if parameters is None else f"{parameters:,}",
        "-" if macs is None else f"{macs:,}",
        "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}",
        "-" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def _format_interval(interval: Interval, metric: Metric, sign: str = "") -> str:
    if not interval.n:
        return "-"
    mean, low, high = (metric.format(value, sign) for value in interval[:3])
    return f"{mean} [{low}, {high}]" if interval.is_known else mean


def describe_seeds(summaries: Sequence[RowSummary]) -> str:
    """Returns the number of seeds of the rows: "5", or "3 to 20"."""
    numbers = sorted({summary.row.seeds for summary in summaries})
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def make_reading_notes(
    summaries: Sequence[RowSummary], method: str, metric: Metric, power: float | None
) -> list[str]:
    """Returns the lines below the table that say how to read it."""
    tests = sum(not math.isnan(summary.p_holm) for summary in summaries)
    kind = (
        "Student's t over the seeds"
        if method == "t"
        else f"percentile bootstrap with {statistics.RESAMPLES:,} resamples, too narrow for few"
        " seeds"
    )
    notes = [
        f"Brackets: 95 % intervals ({kind}). Differences from the baseline are paired by seed, over"
        " the seeds that both rows have. p is from the paired t-test; p Holm is corrected for"
        f" {tests} tests. Bold: the interval excludes zero, and the corrected p is below {ALPHA}."
        " No brackets: one seed, or the same value for all seeds, so the spread is unknown.",
        "",
        f"Means over the complete seeds: train − test is the {metric.name} on the training examples"
        " without augmentation (`train.evaluate_train`) minus that on the test split. Seconds per"
        " step exclude compiling, evaluating and saving; the time of a run includes them.",
    ]
    if margin := next((summary.margin for summary in summaries if summary.margin), None):
        notes += ["", margins.make_note(margin, metric)]
    return notes + (["", seeds_needed.make_note(power, metric)] if power is not None else [])


def make_warnings(summaries: Sequence[RowSummary], metric: Metric) -> list[str]:
    """Returns the lines below the table about what may make it misleading."""
    notes = []
    if not metric.is_fraction:
        notes += [
            "",
            f"A positive difference means more {metric.name}, which may be better or worse.",
        ]
    if incomplete := [summary.row for summary in summaries if summary.row.why_incomplete]:
        names = "; ".join(f"{row.name} ({row.why_incomplete})" for row in incomplete)
        notes += ["", f"Not all seeds are complete: {names}."]
    if any(summary.difference is None and not summary.value.n for summary in summaries):
        notes += ["", "No seed of the baseline is complete, so there are no differences yet."]
    return notes
