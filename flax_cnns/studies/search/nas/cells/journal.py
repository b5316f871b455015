"""A file of JSON lines to which a process that may be killed at any time appends results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flax_cnns import files


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a line, and returns when it is on the disk."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads all rows. Cuts off a last line that a killed process did not finish."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        files.write_text(path, complete)
    return [json.loads(line) for line in complete.splitlines()]
