"""A checkpoint's tree as a table, from its metadata alone; its arrays only to be verified."""

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
    """Prints the tree of `source` (whatever `graft` starts from) with shapes, dtypes, sizes.

    `depth` > 0: what lies deeper is summed up; 0: everything. `pattern`: only the leaves whose
    whole path this regex matches, as a rule would. With `verify` these are read and their CRC32s
    compared. Raises `UserError` where the source is not there or damaged, or `pattern` matches
    nothing.
    """
    if depth < 0:
        raise UserError(f"--depth: expected 0 (everything) or more, got {depth}")
    console = console or make_console(width=None if sys.stdout.isatty() else 160)
    found = open_source(source)
    leaves = _matching(found, pattern)
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    for line in _about(found):
        say(line)
    console.print(_table(leaves, depth))
    of_all = f" of {len(found.leaves)}" if len(leaves) < len(found.leaves) else ""
    total = f"{len(leaves)}{of_all} leaves, {_numbers(leaves):,} numbers, {_size(leaves)} in memory"
    if found.folder is not None:
        total += f", {decimal(reading.count_bytes_on_disk(found.folder))} on disk in all"
    say(total)
    if found.folder is None:
        return
    if verify:
        _verify(found, leaves, console)
    if found.has_checksums:
        say("read, and equal to their CRC32s" if verify else "CRC32s: yes (--verify compares them)")
    else:
        say(f"{'read; ' if verify else ''}CRC32s: none, a flipped bit would not be noticed")


def _matching(found: GraftSource, pattern: str) -> dict[str, Any]:
    try:
        chosen = re.compile(pattern or ".*")
    except re.error as error:
        raise UserError(f"--filter: {pattern!r} is no regular expression: {error}") from None
    leaves = {path: leaf for path, leaf in found.leaves.items() if chosen.fullmatch(path)}
    if not leaves:
        raise UserError(
            f"--filter: {pattern!r} matches no whole path in {found.name}; the nearest is"
            f" {find_nearest(pattern, found.leaves)!r}"
        )
    return leaves


def _about(found: GraftSource) -> Iterator[str]:
    """Where it lies, and what is known of its step and its neighbors."""
    yield found.name if found.folder is None else str(found.folder)
    yield from (note for note in (found.preprocessing_note, *found.notes) if note)
    if found.folder is None:
        return
    step, run = finding.parse_step(found.folder.parent.name), found.folder.parent.parent
    if step is None or step not in (known := finding.all_steps(run)):
        return
    try:
        metrics = finding.read_metrics(run, step)
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name != "score"]
        best = f"best {finding.best_step(run)}"
    except finding.DamagedError as error:
        shown, best = [], f"the best is unknown ({error})"
    why = f" ({found.chosen})" if found.chosen else ""
    yield ", ".join([f"step {step}{why}", *shown])
    if len(known) > 1:
        yield f"steps there: {', '.join(map(str, known))}; {best}"


def _table(leaves: Mapping[str, Any], depth: int) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("path", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("numbers", no_wrap=True, justify="right")
    table.add_column("size", no_wrap=True, justify="right")
    inside: dict[tuple[str, ...], dict[str, Any]] = {}  # in the order of the rows
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
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _size(leaves: Mapping[str, Any]) -> str:
    return decimal(reading.count_bytes({path: (x.shape, x.dtype) for path, x in leaves.items()}))


def _verify(found: GraftSource, leaves: Mapping[str, Any], console: Console) -> None:
    sizes = {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for group in track(
        list(reading.split_into_portions(sizes)),
        "verifying",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        found.read(group)
