"""One table of many runs, from the files that `evaluate` wrote: network, size, cost, accuracies.

table = collect_evaluations(["runs/a", "runs/b"]); text = format_markdown(table)
"""

from __future__ import annotations

import csv
import io
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from flax_cnns.analysis.cost import cost
from flax_cnns.checkpoint import finding
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation.uncertainty import wilson_interval
from flax_cnns.models import registry
from flax_cnns.names import escape_unprintable
from flax_cnns.runs import record as records
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.metric import FRACTION_METRICS

TITLES = {"accuracy": "top-1", "top5": "top-5"}
# Proportions of images: files of older versions, without intervals, get Wilson's.
_PROPORTIONS = ("accuracy", "top5", "subset_accuracy")


class TableRow(NamedTuple):
    """One evaluation of one run."""

    run: str
    model: str
    data: str
    step: int
    size: str  # of the images: "32", or "32x48"
    params: int | None
    macs: int | None  # of one image at the training's size
    examples: int
    metrics: dict[str, float]  # accuracies in 0..1, and "loss"
    intervals: dict[str, tuple[float, float]]


class EvaluationTable(NamedTuple):
    """Rows in order, and the runs without the evaluation that was asked for."""

    rows: list[TableRow]
    missing: list[tuple[str, str]]  # (run, how to evaluate it)
    split: str
    protocol: str  # "": the plain evaluation


# What --sort names -> the key of a row; unknown values come last.
SORTS: dict[str, Callable[[TableRow], Any]] = {
    "accuracy": lambda row: -row.metrics.get(_main_metric(row), -1.0),
    "name": lambda row: (row.model, row.run),
    "parameters": lambda row: (row.params is None, row.params or 0),
    "macs": lambda row: (row.macs is None, row.macs or 0),
}


def collect_evaluations(
    runs: Sequence[str | os.PathLike],
    *,
    split: str = "test",
    protocol: str = "",
    sort: str = "accuracy",
) -> EvaluationTable:
    """Reads an evaluation of each run, sorted by `sort`, one of `SORTS`.

    `runs`: RUN takes the evaluation with the highest step; RUN@best, RUN@latest and RUN@STEP that
    of this checkpoint; a file *.json is taken itself. `split`: also the name of a set of `evaluate
    --set`. `protocol`: the end of the file's name, such as crops10; "" is the plain evaluation.
    Raises UserError if a folder is no run, if a file is damaged, or if no run has such an
    evaluation.
    """
    if sort not in SORTS:
        raise UserError(
            f"--sort: expected {', '.join(SORTS)}, got {sort!r}{did_you_mean(sort, SORTS)}"
        )
    rows, missing = [], []
    for run in dict.fromkeys(str(run) for run in runs):
        if run.endswith(".json"):
            rows.append(_read_file(pathlib.Path(run)))
            continue
        folder, checkpoint = workdirs.split_checkpoint(run, "")
        record = records.read_record(folder)
        step = finding.choose_step(folder, checkpoint).step if checkpoint else None
        if file := _find_evaluation(folder, split, step, protocol):
            rows.append(_read_row(record, file, run))
        else:
            flags = [f"--workdir={run}"] + ([f"--split={split}"] if split != "test" else [])
            missing.append((run, f"flax-cnns evaluate {' '.join(flags)}"))
    if not rows:
        raise UserError(_explain_nothing(runs, split, protocol))
    return EvaluationTable(sorted(rows, key=SORTS[sort]), missing, split, protocol)


def _list_evaluations(folder: pathlib.Path, split: str) -> dict[tuple[int, str], pathlib.Path]:
    """Returns {(step, protocol): file} of a run's evaluations of a split."""
    pattern = re.compile(rf"evaluation_{re.escape(split)}_(\d+)(?:_(.+))?\.json")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob("evaluation_*.json")]
    return {(int(match[1]), match[2] or ""): path for match, path in matches if match}


def _find_evaluation(
    folder: pathlib.Path, split: str, step: int | None, protocol: str
) -> pathlib.Path | None:
    known = _list_evaluations(folder, split)
    fitting = {at: path for (at, how), path in known.items() if how == protocol}
    if step is not None:
        return fitting.get(step)
    return fitting[max(fitting)] if fitting else None


def _explain_nothing(runs: Sequence[str | os.PathLike], split: str, protocol: str) -> str:
    first = os.fspath(runs[0])
    folders = [workdirs.split_checkpoint(run, "")[0] for run in runs]
    known = {how for folder in folders for _, how in _list_evaluations(folder, split)}
    if protocol and known - {""}:
        near = did_you_mean(protocol, sorted(known - {""}))
        return f"--protocol: no run has evaluation_{split}_STEP_{protocol}.json{near}"
    what = f"evaluation_{split}_STEP{protocol and '_'}{protocol}.json"
    return (
        f"none of these runs has {what}; first run `flax-cnns evaluate --workdir={first}"
        f" --split={split}`" + (" with the flags of that protocol" if protocol else "")
    )


def _read_file(file: pathlib.Path) -> TableRow:
    """Reads an evaluation's file that was named: of a run, or of published weights."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; expected what `evaluate` wrote, or a run")
    if (file.parent / "config.json").is_file():
        return _read_row(records.read_record(file.parent), file, str(file))
    found = workdirs.read_json(file)
    name = found.get("model")
    if name not in registry.list_models():
        raise UserError(f"{file} is not in a run's directory, and names no network of flax_cnns")
    height, width, channels = registry.create_model(name).input_size
    counted = cost(registry.create_model(name), (1, height, width, channels))
    pixels = _format_size(height, width)
    return _make_row(file, found, str(file), name, "", pixels, (counted.params, counted.macs))


def _read_row(record: records.RunRecord, file: pathlib.Path, run: str) -> TableRow:
    facts = record.workdir / "dataset.json"
    data = workdirs.read_json(facts) if facts.is_file() else {}
    summary = record.workdir / "summary.json"
    known = workdirs.read_json(summary) if summary.is_file() else {}
    size = records.count_params_and_macs(record) or (known.get("params"), None)
    height, width, *_ = data.get("image_shape", (0, 0))
    return _make_row(
        file,
        workdirs.read_json(file),
        run,
        record.config.model.name,
        data.get("name", record.config.data.name),
        _format_size(height, width),
        size,
    )


def _format_size(height: int, width: int) -> str:
    return "-" if not height else str(height) if height == width else f"{height}x{width}"


def _make_row(
    file: pathlib.Path,
    found: dict[str, Any],
    run: str,
    model: str,
    data: str,
    pixels: str,
    size: tuple[int | None, int | None],
) -> TableRow:
    """Returns the row of an evaluation's content. Raises UserError if keys are missing."""
    names = [*FRACTION_METRICS, "loss"]
    values = {name: found[name] for name in names if isinstance(found.get(name), int | float)}
    try:
        # Published weights have no step.
        examples, step = int(found["examples"]), int(found.get("step", 0))
        given = found.get("intervals", {})
        intervals = {name: tuple(given[name]) for name in values if given.get(name)}
        changed = found.get("protocol", {})
        if str(changed.get("size", pixels)) != pixels:  # MACs were counted at another size
            pixels, size = str(changed["size"]), (size[0], None)
        data = str(changed.get("set", data))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file} is not as `evaluate` writes it; evaluate the run again") from None
    for name in _PROPORTIONS:
        if name in values and name not in intervals:
            intervals[name] = wilson_interval(round(values[name] * examples), examples)
    return TableRow(run, model, data, step, pixels, *size, examples, values, intervals)


def _main_metric(row: TableRow) -> str:
    return "accuracy" if "accuracy" in row.metrics else "label_accuracy"


# ---------------------------------------------------------------------------- formats


def _list_metrics(table: EvaluationTable) -> list[str]:
    return [name for name in FRACTION_METRICS if any(name in row.metrics for row in table.rows)]


def _make_cells(table: EvaluationTable) -> tuple[list[str], list[list[str]]]:
    """Returns (headings, cells of each row) of the printed table and of the Markdown."""
    metrics = _list_metrics(table)
    several = len({row.data for row in table.rows}) > 1
    head = ["model", "run", *(["data"] if several else []), "size", "parameters", "MACs"]
    head += [f"{TITLES.get(name, name.replace('_', ' '))}, %" for name in metrics] + ["images"]
    rows = []
    for row in table.rows:
        cells = [row.model, row.run, *([row.data] if several else []), row.size]
        cells += ["-" if number is None else f"{number:,}" for number in (row.params, row.macs)]
        for name in metrics:
            value = row.metrics.get(name)
            cell = "-" if value is None else tables.describe_value(name, value, row.intervals)
            cells.append(cell.replace("%", ""))
        rows.append([*cells, f"{row.examples:,}"])
    return head, rows


def make_rich_table(table: EvaluationTable) -> Table:
    """Returns the table that `tabulate` prints."""
    head, rows = _make_cells(table)
    what = f"{table.split}, {table.protocol}" if table.protocol else table.split
    printed = Table(title=f"{what}: 95 % intervals over images")
    for name in head:
        left = name in ("model", "run", "data")
        printed.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in rows:
        printed.add_row(*row)
    return printed


def format_markdown(table: EvaluationTable) -> str:
    """Returns the table in Markdown, with a line that explains the brackets."""
    head, rows = _make_cells(table)
    left = ("model", "run", "data")
    lines = [
        _join(head),
        "|" + "|".join("---" if name in left else "---:" for name in head) + "|",
        *map(_join, rows),
        "",
        f"Split {table.split}{', ' if table.protocol else ''}{table.protocol}. Brackets: 95 %"
        " intervals over the images of the split, not over seeds. MACs: of one image at the size"
        " of the training.",
    ]
    return escape_unprintable("\n".join(lines)) + "\n"


def _join(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def format_csv(table: EvaluationTable) -> str:
    """Returns the table as CSV: accuracies in 0..1 with NAME_low and NAME_high, unknown values
    empty."""
    metrics = [*_list_metrics(table), "loss"]
    names = ["model", "run", "data", "split", "protocol", "step", "size", "parameters", "macs"]
    names += ["examples", *(f"{name}{end}" for name in metrics for end in ("", "_low", "_high"))]
    text = io.StringIO()
    out = csv.DictWriter(text, names, lineterminator="\n")
    out.writeheader()
    for row in table.rows:
        line: dict[str, Any] = dict(
            model=row.model,
            run=row.run,
            data=row.data,
            split=table.split,
            protocol=table.protocol,
            step=row.step,
            size=row.size,
            parameters=row.params,
            macs=row.macs,
            examples=row.examples,
        )
        for name in metrics:
            line[name] = row.metrics.get(name)
            line |= dict(zip((f"{name}_low", f"{name}_high"), row.intervals.get(name, ())))
        out.writerow({key: "" if value is None else value for key, value in line.items()})
    return escape_unprintable(text.getvalue())


def format_for(path: str | os.PathLike, table: EvaluationTable) -> str:
    """Returns the text of a file by its suffix, .md or .csv. Raises UserError for another one."""
    formats = {".md": format_markdown, ".csv": format_csv}
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in formats:
        raise UserError(f"--out: expected a file *.md or *.csv, got {os.fspath(path)!r}")
    return formats[suffix](table)
