"""Prints a checkpoint's tree as a table. Only the metadata are read, unless arrays are verified."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table
from rich.text import Text

from flax_cnns.checkpoint import finding, reading
from flax_cnns.checkpoint.graft.report import network_order
from flax_cnns.checkpoint.graft.sources import GraftSource, open_source
from flax_cnns.errors import UserError
from flax_cnns.names import make_console
from flax_cnns.tree import find_nearest


def print_listing(
    source: str | os.PathLike,
    *,
    depth: int = 0,
    pattern: str = "",
    verify: bool = False,
    console: Console | None = None,
) -> None:
    """Prints the tree of `source` (any source of `graft`) with shapes, dtypes and sizes.

    `depth` > 0 shows so many levels and sums up what lies deeper; 0 shows everything. `pattern`
    selects the leaves whose whole path the regex matches, as in a rule. `verify` reads the selected
    leaves and compares their CRC32s. Raises `UserError` if the source is missing or damaged, or
    `pattern` matches nothing.
    """
    if depth < 0:
        raise UserError(f"--depth: expected 0 (everything) or more, got {depth}")
    console = console or make_console(width=None if sys.stdout.isatty() else 160)
    opened = open_source(source)
    leaves = _matching(opened, pattern)
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    for line in _describe(opened):
        say(line)
    console.print(_table(leaves, depth))
    of_all = f" of {len(opened.leaves)}" if len(leaves) < len(opened.leaves) else ""
    total = f"{len(leaves)}{of_all} leaves, {_numbers(leaves):,} numbers, {_size(leaves)} in memory"
    if opened.folder is not None:
        total += f", {decimal(reading.count_bytes_on_disk(opened.folder))} on disk in all"
    say(total)
    if opened.folder is None:
        return
    if verify:
        _verify(opened, leaves, console)
    if opened.has_checksums:
        say("CRC32s: compared, all equal" if verify else "CRC32s: yes (--verify compares them)")
    else:
        say("CRC32s: none, so a flipped bit would not be noticed" + "; all were read" * verify)


def _matching(opened: GraftSource, pattern: str) -> dict[str, Any]:
    """The leaves that `pattern` matches; "" matches all. Raises `UserError` if none matches."""
    try:
        regex = re.compile(pattern or ".*")
    except re.error as error:
        raise UserError(f"--filter: {pattern!r} is not a regular expression: {error}") from None
    leaves = {path: leaf for path, leaf in opened.leaves.items() if regex.fullmatch(path)}
    if not leaves:
        raise UserError(
            f"--filter: {pattern!r} matches no whole path in {opened.name}; the nearest path is"
            f" {find_nearest(pattern, opened.leaves)!r}"
        )
    return leaves


def _describe(opened: GraftSource) -> Iterator[str]:
    """Lines on where the source lies, on its step and on the other steps of the run."""
    yield opened.name if opened.folder is None else str(opened.folder)
    yield from (note for note in (opened.preprocessing_note, *opened.notes) if note)
    if opened.folder is None:
        return
    step, run = finding.parse_step(opened.folder.parent.name), opened.folder.parent.parent
    if step is None or step not in (known := finding.all_steps(run)):
        return
    try:
        metrics = finding.read_metrics(run, step)
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name != "score"]
        best = f"best {finding.best_step(run)}"
    except finding.DamagedError as error:
        shown, best = [], f"best unknown ({error})"
    why = f" ({opened.chosen})" if opened.chosen else ""
    yield ", ".join([f"step {step}{why}", *shown])
    if len(known) > 1:
        yield f"steps of the run: {', '.join(map(str, known))}; {best}"


def _table(leaves: Mapping[str, Any], depth: int) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("path", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("numbers", no_wrap=True, justify="right")
    table.add_column("size", no_wrap=True, justify="right")
    inside: dict[tuple[str, ...], dict[str, Any]] = {}  # row -> its leaves, in the order of rows
    for path in sorted(leaves, key=network_order):
        names = tuple(path.split("/"))
        for level in range(1, min(len(names), depth or len(names)) + 1):
            inside.setdefault(names[:level], {})[path] = leaves[path]
    for names, below in inside.items():
        leaf = below.get("/".join(names))
        table.add_row(
            Text("  " * (len(names) - 1) + names[-1] + ("/" if leaf is None else "")),
            Text("" if leaf is None else str(list(leaf.shape))),
            Text("" if leaf is None else leaf.dtype.name),
            Text(f"{_numbers(below):,}"),
            Text(_size(below)),
        )
    return table


def _numbers(leaves: Mapping[str, Any]) -> int:
    """How many numbers the leaves have together."""
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _size(leaves: Mapping[str, Any]) -> str:
    return decimal(reading.count_bytes({path: (x.shape, x.dtype) for path, x in leaves.items()}))


def _verify(opened: GraftSource, leaves: Mapping[str, Any], console: Console) -> None:
    sizes = {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for group in track(
        list(reading.split_into_portions(sizes)),
        "verifying",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        opened.read(group)
