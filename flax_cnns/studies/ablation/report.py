"""Writes the report of an ablation: tables and pictures of the complete cells.

Everything is computed anew from `ablation.json` and each run's config and `metrics.jsonl`. A cell's
JSON file only says why the cell has no result.
"""

from __future__ import annotations

import collections
import csv
import io
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from flax_cnns.analysis import statistics
from flax_cnns.analysis.power import check_difference
from flax_cnns.analysis.statistics import Difference, Interval
from flax_cnns.errors import UserError
from flax_cnns.files import write_text
from flax_cnns.names import escape_unprintable
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.ablation import (
    margins,
    pictures,
    seeds_needed,
    sharing,
    stopping,
    tuning_report,
)
from flax_cnns.studies.ablation.reading import (
    RowResults,
    check_metric_logged,
    count_datasets,
    find_changed_sources,
    read_cells,
    read_plan,
    require_metric,
)
from flax_cnns.studies.ablation.summaries import ALPHA, RowSummary, summarize_rows


def write(
    folder: str | os.PathLike,
    *,
    interval: str = "t",
    metric: str = "accuracy",
    margin: float | None = None,
    power: float | None = None,
) -> list[pathlib.Path]:
    """Writes report.md, report.csv, forest.png and curves.png into an ablation's folder.

    Also tuning.csv if rows are tuned; without a complete cell, only this file and report.md.

    `interval`: t or bootstrap (see `analysis.statistics`); the p-values are from paired t-tests in
    both cases. `metric`: NAME of `test/NAME` in the runs' logs. `margin`: see `margins`. `power`:
    see `seeds_needed`. Returns the paths. Raises UserError if there is no ablation, if no cell is
    complete and no row is tuned, or if no complete cell logged the metric.
    """
    statistics.check_method(interval)
    if power is not None:
        check_difference(power)
    folder, name = pathlib.Path(folder), metric.removeprefix("test/")
    plan = read_plan(folder)
    rows = [
        RowResults(
            row["name"],
            row["overrides"],
            read_cells(folder / row["name"], row.get("seeds", plan["seeds"])),
        )
        for row in plan["rows"]
    ]
    tuned = tuning_report.read_rows(folder, plan)
    tuning_paths = [tuning_report.write_csv(folder, tuned)] if tuned else []
    tuning_lines = tuning_report.format_section(tuned, plan)
    if tuned and not any(row.records for row in rows):
        text = "\n".join([f"# Ablation: {folder.resolve().name}", "", *tuning_lines])
        write_text(folder / "report.md", escape_unprintable(text))
        return [folder / "report.md", *tuning_paths]
    if not any(row.records for row in rows):
        states = collections.Counter(cell.status for row in rows for cell in row.cells.values())
        counts = ", ".join(f"{n} {status}" for status, n in sorted(states.items()))
        raise UserError(f"{folder}: no cell is complete ({counts}), so there is nothing to report")
    check_metric_logged(rows, name, folder)
    rows = [require_metric(row, name) for row in rows]
    values = [value for row in rows for value in row.values(f"test/{name}").values()]
    form = make_metric(name, values)
    summaries = summarize_rows(rows, plan["baseline"], interval, form, margin, power)
    paths = [folder / name for name in ("report.md", "report.csv", "forest.png", "curves.png")]
    pictures.draw_differences(summaries, plan, form, paths[2])
    pictures.draw_curves(rows, plan["baseline"], form, paths[3])
    write_text(paths[1], escape_unprintable(_format_csv(summaries, form, power)))
    markdown = _format_markdown(summaries, plan, interval, form, folder, power, tuning_lines)
    write_text(paths[0], escape_unprintable(markdown))
    return [*paths, *tuning_paths]


# ---------------------------------------------------------------------------- tables


# Columns of every report.csv. The values of a metric with such a name are in column `test_NAME`.
_COLUMNS = {"row", "seeds", "complete", "failed", "diverged", "interrupted", "damaged", "missing"}
_COLUMNS |= {"difference", "pairs", "p", "p_holm", "gap", "parameters", "macs"}
_COLUMNS |= {"seconds_per_step", "seconds", *margins.COLUMNS, *seeds_needed.COLUMNS}


def _format_csv(summaries: Sequence[RowSummary], metric: Metric, power: float | None) -> str:
    """Formats report.csv: fractions from 0 to 1, unknown values empty, a column per seed."""
    all_seeds = range(max(len(summary.row.cells) for summary in summaries))
    margin = any(summary.margin for summary in summaries)
    table, column = [], f"test_{metric.name}" if metric.name in _COLUMNS else metric.name
    for summary in summaries:
        row = summary.row
        line: dict[str, Any] = {"row": row.name, "seeds": len(row.cells)}
        line |= {"complete": summary.value.n}
        states = collections.Counter(cell.status for cell in row.cells.values())
        for status in ("failed", "diverged", "interrupted", "damaged", "missing"):
            line[status] = states[status]
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
        line |= {"gap": summary.gap}
        line |= dict(zip(("parameters", "macs"), summary.size or (None, None)))
        line |= {"seconds_per_step": summary.seconds_per_step, "seconds": summary.seconds}
        values = row.values(f"test/{metric.name}")
        line |= {f"{column}_seed{s}": values.get(s) for s in all_seeds}
        table.append({k: "" if v is None or v != v else v for k, v in line.items()})
    text = io.StringIO()
    out = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    out.writeheader()
    out.writerows(table)
    return text.getvalue()


def _format_markdown(
    summaries: Sequence[RowSummary],
    plan: dict[str, Any],
    method: str,
    metric: Metric,
    folder: pathlib.Path,
    power: float | None,
    tuning_lines: Sequence[str],
) -> str:
    points = metric.difference_unit
    margin = next((summary.margin for summary in summaries if summary.margin), None)
    columns = [
        *("row", "seeds", f"test {metric.name}{metric.unit}"),
        *(("test error, %",) if metric.is_fraction else ()),
        *(f"difference{points}", "p", "p Holm"),
        *((margins.make_title(margin, metric),) if margin else ()),
        *((seeds_needed.make_title(power, metric),) if power is not None else ()),
        f"train − test{points}",
        *("parameters", "MACs", "s per step", "time, s"),
    ]
    lines = [
        f"# Ablation: {folder.resolve().name}",
        "",
        f"{len(summaries)} rows × {_describe_seeds(summaries)} seeds; the baseline is"
        f" `{plan['baseline']}`." + (" Every row is tuned." if tuning_lines else ""),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|",
    ]
    for summary in summaries:
        cells = _format_row(summary, bool(margin), power is not None)
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *_make_notes(summaries, plan, method, metric, folder, power),
        "",
        "![differences from the baseline](forest.png)",
        "",
    ]
    lines += ["![learning curves](curves.png)", "", *tuning_lines, "## Rows", ""]
    for summary in summaries:
        overrides = summary.row.overrides.items()
        changes = ", ".join(f"`{name}={value!r}`" for name, value in overrides)
        lines.append(f"- {summary.row.name}: {changes or 'the config as it is'}")
    incomplete = [
        f"- {summary.row.name}, seed {s}: {cell.status}" + (f": {cell.error}" if cell.error else "")
        for summary in summaries
        for s, cell in summary.row.cells.items()
        if cell.record is None
    ]
    if incomplete:
        lines += ["", "## Cells without a result", "", *incomplete]
    return "\n".join(lines) + "\n"


def _make_notes(
    summaries: Sequence[RowSummary],
    plan: dict[str, Any],
    method: str,
    metric: Metric,
    folder: pathlib.Path,
    power: float | None,
) -> list[str]:
    """Returns the lines below the table: how to read it, and what may make it misleading."""
    rows = [summary.row for summary in summaries]
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
    notes += ["", seeds_needed.make_note(power, metric)] if power is not None else []
    notes += [*stopping.make_note(folder, plan), *sharing.make_note(folder, plan)]
    if not metric.is_fraction:
        notes += [
            "",
            f"A positive difference means more {metric.name}, which may be better or worse.",
        ]
    if incomplete := [row for row in rows if row.why_incomplete]:
        names = "; ".join(f"{row.name} ({row.why_incomplete})" for row in incomplete)
        notes += ["", f"Not all seeds are complete: {names}."]
    if not any(row.records for row in rows if row.name == plan["baseline"]):
        notes += ["", "No seed of the baseline is complete, so there are no differences yet."]
    if count_datasets(rows, plan) > 1:
        notes += ["", "**Not all cells saw the same data**: the data changed between the runs."]
        notes += ["The same command without --rows and --index runs the older cells again."]
    if changed := find_changed_sources(rows):
        names = ", ".join(f"`{name}`" for name in changed)
        notes += ["", f"**Not all cells ran the same code**: the source of {names} changed."]
    return notes


def _describe_seeds(summaries: Sequence[RowSummary]) -> str:
    numbers = sorted({len(summary.row.cells) for summary in summaries})
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _format_row(summary: RowSummary, with_margin: bool, with_power: bool) -> list[str]:
    """Returns the cells of a row of the table."""
    row, difference, metric = summary.row, summary.difference, summary.metric
    parameters, macs = summary.size or (None, None)
    text = "baseline"
    if difference is not None:
        text = _format_interval(difference.interval, metric, "+")
        if difference.interval.n < summary.value.n:
            text += f" ({difference.interval.n} pairs)"
    seeds = f"{summary.value.n} of {len(row.cells)}"
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
        "-" if summary.gap is None else metric.format(summary.gap, "+"),
        "-" if parameters is None else f"{parameters:,}",
        "-" if macs is None else f"{macs:,}",
        "-" if summary.seconds_per_step is None else f"{summary.seconds_per_step:.3g}",
        "-" if summary.seconds is None else f"{summary.seconds:.0f}",
    ]


def _format_interval(interval: Interval, metric: Metric, sign: str = "") -> str:
    if not interval.n:
        return "-"
    mean, low, high = (metric.format(value, sign) for value in interval[:3])
    return f"{mean} [{low}, {high}]" if interval.is_known else mean
