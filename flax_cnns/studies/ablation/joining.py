"""Joins pieces of one ablation: a report from several report.csv, without their runs.

A long ablation may run in pieces, each in a folder of its own with some of the rows and with the
baseline. Its report.csv has the metric of every cell, so the report of all rows needs nothing else.
Each row is compared with the baseline of its own piece, paired by seed. Holm's correction spans the
rows of all pieces.
"""

from __future__ import annotations

import csv
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flax_cnns.analysis import statistics
from flax_cnns.analysis.power import check_difference
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.files import check_regular_file, write_text
from flax_cnns.names import escape_unprintable
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.ablation import pictures, plan, tables
from flax_cnns.studies.ablation.summaries import (
    RowMeasurements,
    RowSummary,
    correct_p_values,
    summarize_rows,
)


class Piece(NamedTuple):
    """The rows of one report.csv, the baseline first."""

    name: str  # the file, as it was given
    rows: list[RowMeasurements]


def join(
    files: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    interval: str = "t",
    metric: str = "accuracy",
    margin: float | None = None,
    power: float | None = None,
) -> list[pathlib.Path]:
    """Writes report.md, report.csv and forest.png of all rows of some report.csv into `folder`.

    `interval`, `metric`, `margin`, `power`: see `report.write`. A report.csv that was joined counts
    as the pieces that it was made from. Returns the paths. Raises UserError if a file is no
    report.csv of this metric, if the pieces are not of one ablation, or if `folder` is an ablation,
    whose own report would be replaced.
    """
    statistics.check_method(interval)
    if power is not None:
        check_difference(power)
    folder, name = pathlib.Path(folder), metric.removeprefix("test/")
    workdirs.check_location(folder)
    if (folder / "ablation.json").is_file():
        raise UserError(
            f"{folder} is an ablation, and its own report would be replaced; use another --workdir"
        )
    pieces = [piece for file in files for piece in read_pieces(file, name)]
    check_pieces(pieces)
    form = make_metric(name, [v for piece in pieces for r in piece.rows for v in r.values.values()])
    summaries = correct_p_values(
        [
            summary
            for piece in pieces
            for summary in summarize_rows(
                piece.rows, piece.rows[0].name, interval, form, margin, power
            )
        ]
    )
    paths = [folder / name for name in ("report.md", "report.csv", "forest.png")]
    with plan.lock_folder(folder):
        pictures.draw_differences(summaries, form, paths[2])
        write_text(paths[1], escape_unprintable(tables.format_csv(summaries, form, power)))
        markdown = _format_markdown(summaries, pieces, interval, form, folder, power)
        write_text(paths[0], escape_unprintable(markdown))
    return paths


def read_pieces(file: str | os.PathLike, metric: str) -> list[Piece]:
    """Reads the metric of all rows from a report.csv. Raises UserError if it has none."""
    path, column = pathlib.Path(file), tables.name_column(metric)
    check_regular_file(path)
    try:
        with path.open(newline="", encoding="utf-8") as text:
            reader = csv.DictReader(text)
            lines, columns = list(reader), list(reader.fieldnames or ())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file: {error}") from None
    if missing := [name for name in ("row", "seeds", *tables.STATUSES) if name not in columns]:
        raise UserError(
            f"{path}: expected the report.csv of an ablation; it has no column {missing[0]!r}"
        )
    known = [match[1] for name in columns if (match := re.fullmatch(r"(.+)_seed0", name))]
    if column not in known:
        known = [name.removeprefix("test_") for name in known]
        near = did_you_mean(metric, known)
        raise UserError(f"--metric: {path} has no seeds of {metric!r}{near}")
    pieces: dict[str, Piece] = {}
    for number, line in enumerate(lines, 2):
        name = line.get("piece") or path.as_posix()
        try:
            row = _read_row(line, column, metric)._replace(piece=name)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number} is damaged: {error}") from None
        pieces.setdefault(name, Piece(name, [])).rows.append(row)
    if not pieces:
        raise UserError(f"{path} has no rows")
    return list(pieces.values())


def _read_row(line: Mapping[str, str], column: str, metric: str) -> RowMeasurements:
    seeds = int(line["seeds"])
    values = {
        seed: float(text)
        for seed in range(seeds)
        if (text := line.get(f"{column}_seed{seed}", "")) != ""
    }
    for value in values.values():
        if not math.isfinite(value):
            raise ValueError(f"expected finite values of {metric}, got {value}")
        if Metric(metric).is_fraction and not 0 <= value <= 1:
            raise ValueError(f"expected {metric} from 0 to 1, got {value:g}")
    without = {status: int(line[status]) for status in tables.STATUSES if line[status] != "0"}
    if rest := seeds - len(values) - sum(without.values()):
        without[f"without {metric}"] = rest
    parameters, macs = line.get("parameters"), line.get("macs")
    return RowMeasurements(
        name=line["row"],
        values=values,
        seeds=seeds,
        without_result=without,
        gap=_read_number(line.get("gap")),
        size=(int(parameters), int(macs) if macs else None) if parameters else None,
        seconds_per_step=_read_number(line.get("seconds_per_step")),
        seconds=_read_number(line.get("seconds")),
    )


def _read_number(text: str | None) -> float | None:
    return float(text) if text else None


def check_pieces(pieces: Sequence[Piece]) -> None:
    """Raises UserError unless the pieces have one baseline and no other row twice."""
    first, owners = pieces[0].rows[0], dict[str, str]()
    for number, piece in enumerate(pieces):
        baseline = piece.rows[0]
        if piece.name in [other.name for other in pieces[:number]]:
            raise UserError(f"{piece.name} is given twice")
        if baseline.name != first.name:
            raise UserError(
                f"{pieces[0].name} and {piece.name} are not pieces of one ablation: the baseline"
                f" (the first row) is {first.name} there, {baseline.name} here"
            )
        if baseline.size and first.size and baseline.size != first.size:
            raise UserError(
                f"{pieces[0].name} and {piece.name} are not pieces of one ablation: the baseline's"
                f" network has {first.size[0]:,} parameters there, {baseline.size[0]:,} here"
            )
        for row in piece.rows[1:]:
            if row.name in owners or row.name == first.name:
                other = owners.get(row.name, pieces[0].name)
                raise UserError(
                    f"row {row.name} is in {other} and in {piece.name}: a row may be in one piece"
                    " only; remove it from the other one"
                )
            owners[row.name] = piece.name


def _format_markdown(
    summaries: Sequence[RowSummary],
    pieces: Sequence[Piece],
    method: str,
    metric: Metric,
    folder: pathlib.Path,
    power: float | None,
) -> str:
    rows, count = len(summaries) - len(pieces), len(pieces)
    where = f" in {count} pieces, each with its own" if count > 1 else "; the"
    baseline = f"{'' if count > 1 else ' is'} `{pieces[0].rows[0].name}`"
    lines = [
        f"# Ablation: {folder.resolve().name}",
        "",
        f"{rows} rows × {tables.describe_seeds(summaries)} seeds{where} baseline{baseline}.",
        "",
        *tables.format_table(summaries, metric, power),
        "",
        *tables.make_reading_notes(summaries, method, metric, power),
        "",
        "Each row is compared with the baseline of its own piece. p Holm is corrected for the rows"
        " of all pieces. The pieces:",
        "",
        *(
            f"{i}. `{piece.name}`{describe_shared_baseline(piece, pieces[: i - 1])}"
            for i, piece in enumerate(pieces, 1)
        ),
        *tables.make_warnings(summaries, metric),
        "",
        "![differences from the baseline](forest.png)",
    ]
    return "\n".join(lines) + "\n"


def describe_shared_baseline(piece: Piece, earlier: Sequence[Piece]) -> str:
    """Says if the baseline has the values of an earlier piece's baseline; "" if it has others."""
    ours = piece.rows[0].values
    for number, other in enumerate(earlier, 1):
        theirs = other.rows[0].values
        if (seeds := ours.keys() & theirs.keys()) and all(ours[s] == theirs[s] for s in seeds):
            return f"; its baseline has the values of piece {number}, so chance errors are shared"
    return ""
