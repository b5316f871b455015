"""The chart of accuracy against operations, from a CSV of networks."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping

from flax_cnns.analysis.cost import cost
from flax_cnns.analysis.plots.accuracy_chart import ChartPoint, draw_accuracy_chart
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models import registry

REQUIRED = ("network", "accuracy")
OPTIONAL = ("family", "macs", "params", "size", "label", "source")


def draw_chart(path: str | os.PathLike, png: str | os.PathLike, title: str = "") -> None:
    """Draws the networks of a CSV (`read_networks`). Raises UserError."""
    draw_accuracy_chart(read_networks(path), png, title)


def read_networks(path: str | os.PathLike) -> list[ChartPoint]:
    """Reads a CSV with the columns `network` and `accuracy` (percent), one network a line.

    Further columns may be `family`, `label` (what the chart shows), `macs` and `params` (numbers),
    `size` (the side of the images in pixels) and `source`, which is not read. A registered network
    needs no `macs` and `params`: they are counted, at its own image size or at `size`. Raises
    UserError for a missing or unknown column, an unknown network without these numbers, and a value
    that is not a number.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            columns, lines = [*(reader.fieldnames or ())], list(reader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV: {error}") from None
    known = (*REQUIRED, *OPTIONAL)
    for column in columns:
        if column not in known:
            near = did_you_mean(column, known)
            raise UserError(f"{path}: unknown column {column!r}{near}; known: {', '.join(known)}")
    if missing := [column for column in REQUIRED if column not in columns]:
        raise UserError(f"{path}: expected the column {missing[0]!r} in the first line")
    if not lines:
        raise UserError(f"{path}: expected at least one network, got none")
    return [_read(f"{path}, line {i}", line) for i, line in enumerate(lines, 2)]


def _read(where: str, line: Mapping[str, str]) -> ChartPoint:
    name = line["network"].strip()
    if "" in line:
        raise UserError(f"{where}: {name} has more values than the first line has columns")
    accuracy = _read_number(where, "accuracy", line["accuracy"])
    if accuracy > 100:
        raise UserError(f"{where}: accuracy: expected percent (0 to 100), got {line['accuracy']}")
    given = {
        column: _read_number(where, column, line[column])
        for column in ("macs", "params", "size")
        if line.get(column)
    }
    if len(given.keys() & {"macs", "params"}) < 2:
        print(f"counting the operations of {name}", flush=True)
        try:
            model = registry.create_model(name)
        except UserError as error:
            raise UserError(
                f"{where}: {error}; a network of another library needs macs and params"
            ) from None
        height, width, channels = model.input_size
        if "size" in given:
            height = width = int(given["size"])
        counted = cost(model, (1, height, width, channels))
        given = dict(macs=counted.macs, params=counted.params) | given
    label = line.get("label") or name
    return ChartPoint(label, accuracy, given["macs"], given["params"], line.get("family") or "")


def _read_number(where: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value < float("inf"):
        raise UserError(f"{where}: {column}: expected a number above 0, got {text!r}")
    return value
