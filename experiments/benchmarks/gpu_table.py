"""The CSV table of `gpu`: rows that are added as they are measured, so that a kill loses one case.

A case is one measurement, such as one network; its rows are written at once. Its last row has the
measure "seconds", the time of the case. Rows of a case without that row are removed when the table
is opened.
"""

from __future__ import annotations

import csv
import datetime
import fcntl
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flax_cnns.errors import UserError
from flax_cnns.files import write_text

OK, SKIPPED, FAILED = "ok", "skipped", "failed"
END = "seconds"  # the measure of a case's last row


class Measure(NamedTuple):
    """A number of a case. `low` and `high` are the smallest and largest value of the rounds."""

    measure: str
    value: float | int | str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""


class Origin(NamedTuple):
    """What all rows of a table have in common."""

    settings: str
    device: str
    python: str
    jax: str
    jaxlib: str
    flax: str
    optax: str
    torch: str


_CASE = ("part", "case")
COLUMNS = (*_CASE, *Measure._fields, "status", *Origin._fields, "date")
Row = dict[str, str]


class ResultTable:
    """The rows of one CSV file, which one process at a time may write.

    Raises `UserError` if the file holds something else, or rows of another origin: those of another
    device, of another version or with other settings.
    """

    def __init__(self, path: Path, origin: Origin):
        self.path, self.origin = path, origin
        self.rows: list[Row] = read_rows(path) if path.exists() else []
        for row in self.rows:
            for column, value in origin._asdict().items():
                if row[column] != value:
                    raise UserError(
                        f"--out: {path} has rows with {column}={row[column]!r}, and this machine"
                        f" measures with {value!r}; choose another file"
                    )
        whole = {self._key(row) for row in self.rows if row["measure"] == END}
        self.rows = [row for row in self.rows if self._key(row) in whole]
        self._rewrite()

    def is_done(self, part: str, case: str) -> bool:
        """Whether a case was measured, was skipped or failed."""
        return (part, case) in {self._key(row) for row in self.rows}

    def find(self, part: str, case: str, measure: str) -> str | None:
        """Returns a measured value; None if there is none."""
        for row in self.rows:
            if self._key(row) == (part, case) and row["measure"] == measure:
                return row["value"] if row["status"] == OK else None
        return None

    def add(
        self,
        part: str,
        case: str,
        measures: Sequence[Measure],
        *,
        seconds: float,
        status: str = OK,
        note: str = "",
    ) -> None:
        """Adds the rows of a case to the table and to the file."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        end = Measure(END, round(seconds, 1), "s", note=note)
        rows = [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for measure in (*measures, end)
            for row in [
                dict(part=part, case=case, status=status, date=now)
                | measure._asdict()
                | self.origin._asdict()
            ]
        ]
        self.rows += rows
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_format(rows))
            file.flush()
            os.fsync(file.fileno())

    def forget(self, part: str, statuses: Sequence[str]) -> None:
        """Removes the cases of a part with these statuses, so that they are measured again."""
        self.rows = [r for r in self.rows if r["part"] != part or r["status"] not in statuses]
        self._rewrite()

    def drop_changed(self, part: str, notes: Mapping[str, str]) -> None:
        """Removes the cases of a part whose note is not the one in `notes`, by case."""
        ends = [row for row in self.rows if row["part"] == part and row["measure"] == END]
        changed = {
            row["case"]
            for row in ends
            if row["status"] == OK and row["note"] != notes.get(row["case"], row["note"])
        }
        self.rows = [r for r in self.rows if r["part"] != part or r["case"] not in changed]
        self._rewrite()

    def _rewrite(self) -> None:
        write_text(self.path, ",".join(COLUMNS) + "\n" + _format(self.rows))

    @staticmethod
    def _key(row: Row) -> tuple[str, str]:
        return row["part"], row["case"]


def _format(rows: list[Row]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a table, without a last line that was cut off. Raises `UserError` if the
    file is another one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--out: cannot read {path}: {error}") from None
    if not text:
        return []
    lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"--out: {path} is not a table of this benchmark; choose another file")
    return [row for row in reader if None not in row.values() and None not in row]


def lock(path: Path) -> int:
    """Locks a table by the file `path` beside it, until this process ends.

    Raises `UserError` if another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(f"--out: another process writes the table of {path}") from None
    return descriptor
