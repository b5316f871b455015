"""CSV files with one row for each network and accelerator, to which commands add rows."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Sequence

from flax_cnns import files
from flax_cnns.errors import UserError

TargetRow = dict[str, str]  # by column; the column "topology" names the accelerator


def read_rows(path: str, columns: Sequence[str], name: str) -> dict[tuple[str, str], TargetRow]:
    """Returns {(value of the column `name`, topology): row} of a table; {} if there is no file.

    Raises UserError for a file with other columns.
    """
    file = pathlib.Path(path)
    if not file.exists():
        return {}
    reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise UserError(f"--table: {path} is not a table of this command; name another file")
    return {(row[name], row["topology"]): row for row in reader}


def add_row(path: str, columns: Sequence[str], name: str, row: TargetRow) -> None:
    """Adds a row to a table, or replaces the row of the same name and topology.

    The file is read again, because another command may have added rows to it. Rows are ordered by
    topology.
    """
    rows = read_rows(path, columns, name)
    rows[row[name], row["topology"]] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows.values(), key=lambda row: row["topology"]))
    files.write_text(path, text.getvalue())
