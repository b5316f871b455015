"""Writes the report of an ablation: tables and pictures of the complete cells.

Everything is computed anew from `ablation.json` and each run's config and `metrics.jsonl`. A cell's
JSON file only says why the cell has no result.
"""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from flax_cnns.analysis import statistics
from flax_cnns.analysis.power import check_difference
from flax_cnns.errors import UserError
from flax_cnns.files import write_text
from flax_cnns.names import escape_unprintable
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.ablation import pictures, sharing, stopping, tables, tuning_report
from flax_cnns.studies.ablation.reading import (
    RowResults,
    check_metric_logged,
    count_datasets,
    find_changed_sources,
    read_cells,
    read_plan,
    require_metric,
)
from flax_cnns.studies.ablation.summaries import RowSummary, measure_row, summarize_rows


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
    measured = [measure_row(row, form) for row in rows]
    summaries = summarize_rows(measured, plan["baseline"], interval, form, margin, power)
    paths = [folder / name for name in ("report.md", "report.csv", "forest.png", "curves.png")]
    pictures.draw_differences(summaries, form, paths[2])
    pictures.draw_curves(rows, plan["baseline"], form, paths[3])
    write_text(paths[1], escape_unprintable(tables.format_csv(summaries, form, power)))
    markdown = _format_markdown(summaries, rows, plan, interval, form, folder, power, tuning_lines)
    write_text(paths[0], escape_unprintable(markdown))
    return [*paths, *tuning_paths]


def _format_markdown(
    summaries: Sequence[RowSummary],
    rows: Sequence[RowResults],
    plan: dict[str, Any],
    method: str,
    metric: Metric,
    folder: pathlib.Path,
    power: float | None,
    tuning_lines: Sequence[str],
) -> str:
    lines = [
        f"# Ablation: {folder.resolve().name}",
        "",
        f"{len(summaries)} rows × {tables.describe_seeds(summaries)} seeds; the baseline is"
        f" `{plan['baseline']}`." + (" Every row is tuned." if tuning_lines else ""),
        "",
        *tables.format_table(summaries, metric, power),
        "",
        *tables.make_reading_notes(summaries, method, metric, power),
        *stopping.make_note(folder, plan),
        *sharing.make_note(folder, plan),
        *tables.make_warnings(summaries, metric),
        *_make_change_notes(rows, plan),
        "",
        "![differences from the baseline](forest.png)",
        "",
        "![learning curves](curves.png)",
        "",
        *tuning_lines,
        "## Rows",
        "",
    ]
    for row in rows:
        changes = ", ".join(f"`{name}={value!r}`" for name, value in row.overrides.items())
        lines.append(f"- {row.name}: {changes or 'the config as it is'}")
    incomplete = [
        f"- {row.name}, seed {s}: {cell.status}" + (f": {cell.error}" if cell.error else "")
        for row in rows
        for s, cell in row.cells.items()
        if cell.record is None
    ]
    if incomplete:
        lines += ["", "## Cells without a result", "", *incomplete]
    return "\n".join(lines) + "\n"


def _make_change_notes(rows: Sequence[RowResults], plan: dict[str, Any]) -> list[str]:
    """Returns the lines about data and code that changed between the cells."""
    notes = []
    if count_datasets(rows, plan) > 1:
        notes += ["", "**Not all cells saw the same data**: the data changed between the runs."]
        notes += ["The same command without --rows and --index runs the older cells again."]
    if changed := find_changed_sources(rows):
        names = ", ".join(f"`{name}`" for name in changed)
        notes += ["", f"**Not all cells ran the same code**: the source of {names} changed."]
    return notes
