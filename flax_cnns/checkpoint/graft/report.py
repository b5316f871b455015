"""The report of a graft: what became of each leaf, and a table with a row for each part."""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from flax_cnns.checkpoint.finding import parse_step
from flax_cnns.names import make_console

COLLECTIONS = ("params", "batch_stats")
MAX_ROWS = 40  # of a printed table; graft.json has all leaves


@dataclasses.dataclass(frozen=True)
class GraftReport:
    """What became of each leaf, by path.

    `print(report)` prints a table and, below it, `report.summary` and notes.
    """

    source: str  # as the user wrote it
    folder: str  # of the checkpoint's arrays; "" for other sources
    chosen: str  # why this checkpoint of a run was chosen: best, latest, ...; "" for other sources
    grafted: dict[str, str]  # path in the new network -> path in the source
    fresh: tuple[str, ...]
    mismatched: dict[str, dict[str, list[int]]]  # fresh; the source has the path in another shape
    left_behind: tuple[str, ...]  # in the source, and not used
    skipped_below: tuple[str, ...]  # fresh layers below a grafted layer
    notes: tuple[str, ...]  # what else the user should know
    shapes: dict[str, list[int]]  # of all leaves of the new network, in the order of images
    adapted: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> what was done to it

    @property
    def summary(self) -> str:
        """One line: how many leaves were grafted, are fresh and were left behind."""
        text = f"grafted {len(self.grafted)}, fresh {len(self.fresh)}"
        text += f", left behind {len(self.left_behind)}"
        if self.left_behind:
            text += f": {join_names(_tops(self.left_behind))}"
        return text

    def __str__(self) -> str:
        file = io.StringIO()
        make_console(file=file, width=100).print(self._table())
        lines = [line.rstrip() for line in file.getvalue().splitlines()]
        step = parse_step(pathlib.PurePath(self.folder).parent.name)
        title = f"grafted from {self.source}{f', step {step}' if step is not None else ''}"
        title += f" ({self.chosen})" if self.chosen else ""
        notes = list(self.notes)
        if self.skipped_below:
            notes.append(
                f"fresh layers below loaded layers: {join_names(self.skipped_below)}; a loaded"
                " layer makes little sense above a fresh one"
            )
        return "\n".join([title, *lines, self.summary, *(f"note: {note}" for note in notes)])

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON, as a run keeps it in graft.json."""
        fields = dataclasses.asdict(self)
        del fields["shapes"]  # the network has them
        return fields

    def _table(self) -> Table:
        table = Table()
        table.add_column("part")
        table.add_column("leaves", justify="right")
        table.add_column("numbers", justify="right")
        table.add_column("starts from")
        ours = []
        for path, shape in self.shapes.items():
            origin = self.grafted.get(path)
            origin = None if origin is None else _drop_collection(origin)
            ours.append(_Leaf(_drop_collection(path), math.prod(shape), origin))
        mismatched = {_drop_collection(path): both for path, both in self.mismatched.items()}
        _add_rows(table, _parts(ours), mismatched)
        table.add_section()
        # Leaves that were left behind are shown as the largest parts that were left behind whole.
        theirs = [_Leaf(_drop_collection(path), 0, None) for path in self.left_behind]
        theirs += [_Leaf(_drop_collection(path), 0, "") for path in self.grafted.values()]
        left_behind = (row for row in _parts(theirs) if row[2] is None)
        _add_rows(table, left_behind, {}, fresh="left behind", with_numbers=False)
        return table


class _Leaf(NamedTuple):
    place: str  # the path without its collection: stem/norm/scale
    size: int  # 0 in the source, where sizes are not shown
    origin: str | None  # its place in the source; None: fresh


_Row = tuple[str, list[_Leaf], str | None]  # part, its leaves, its origin


def _parts(leaves: Iterable[_Leaf], depth: int = 1) -> Iterator[_Row]:
    """Splits leaves into the largest parts whose leaves all start from one part of the source."""
    parts: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        parts.setdefault("/".join(leaf.place.split("/")[:depth]), []).append(leaf)
    for part, inside in parts.items():
        origins = {_origin_of(part, leaf) for leaf in inside}
        if len(origins) == 1:
            yield part, inside, origins.pop()
        elif all(leaf.place == part for leaf in inside):  # one leaf in several collections
            yield from ((part, [leaf], leaf.origin) for leaf in inside)
        else:
            yield from _parts(inside, depth + 1)


def _origin_of(part: str, leaf: _Leaf) -> str | None:
    """The origin of the whole part if all its leaves are like this one.

    With the part `head`, a leaf `head/kernel` from `fc/kernel` gives `fc`.
    """
    below = leaf.place.removeprefix(part)
    if leaf.origin is not None and leaf.origin.endswith(below):
        return leaf.origin.removesuffix(below)
    return leaf.origin


def _add_rows(
    table: Table,
    rows: Iterable[_Row],
    mismatched: dict[str, dict[str, list[int]]],
    *,
    fresh: str = "fresh",
    with_numbers: bool = True,
) -> None:
    """Adds at most `MAX_ROWS` rows to a table; `fresh` is the text for leaves without origin."""
    rows = list(rows)
    for part, leaves, origin in rows[:MAX_ROWS]:
        numbers = f"{sum(leaf.size for leaf in leaves):,}" if with_numbers else ""
        text = fresh if origin is None else origin
        if wrong := [mismatched[leaf.place] for leaf in leaves if leaf.place in mismatched]:
            here, there = wrong[-1]["here"], wrong[-1]["there"]
            text += f": {here}, the source has {there}"
        table.add_row(*map(Text, (part, str(len(leaves)), numbers, text)))
    if hidden := rows[MAX_ROWS:]:
        table.add_row("…", str(sum(len(row[1]) for row in hidden)), "", f"{len(hidden)} more parts")


def _drop_collection(path: str) -> str:
    """The path without its collection: stem/norm/scale."""
    return _split(path)[1]


def split_layer(path: str) -> tuple[str, str]:
    """Splits a leaf's path into (collection, layer); "" if the path has no collection.

    "ema/params/stem/norm/scale" gives ("params", "ema/stem/norm").
    """
    collection, place = _split(path)
    return collection, place.rpartition("/")[0]


def _split(path: str) -> tuple[str, str]:
    """(collection, the path without it)."""
    names = path.split("/")
    collection = next((name for name in names[:2] if name in COLLECTIONS), "")
    if collection:
        names.remove(collection)
    return collection, "/".join(names)


def sort_by_depth(paths: Iterable[str], order: Sequence[str]) -> list[str]:
    """The paths in the order in which images pass their layers: by `order`, then by name."""
    depth = make_depth_key(order)
    return sorted(paths, key=lambda path: depth(split_layer(path)[1]))


def make_depth_key(order: Sequence[str]) -> Callable[[str], tuple]:
    """A sort key for layers: their place in `order`; layers that it lacks come last, by name."""
    places = {layer: place for place, layer in enumerate(order)}
    return lambda layer: (places.get(layer, len(places)), network_order(layer))


def find_left_behind(used: Collection[str], stored: Collection[str]) -> tuple[str, ...]:
    """The weights in the source that are not used.

    Averaged weights count only if some of them are used, and trained ones likewise. Leaves that are
    not weights (an optimizer's) do not count.
    """
    averaged = {path.startswith("ema/") for path in used}

    def is_counted(path: str) -> bool:
        inner = path.removeprefix("ema/")
        weights = inner.split("/")[0] in COLLECTIONS or not any(
            p.startswith("params/") for p in stored
        )
        return weights and path.startswith("ema/") in averaged

    return tuple(path for path in stored if is_counted(path) and path not in used)


def find_skipped_below(
    chosen: Collection[str], wanted: Collection[str], order: Sequence[str]
) -> tuple[str, ...]:
    """The fresh layers below a grafted layer, the lowest first.

    Auxiliary heads are ignored: images do not pass them on their way to the head.
    """
    depth = make_depth_key(order)
    layers = {path: split_layer(path)[1] for path in wanted}
    layers = {path: layer for path, layer in layers.items() if not layer.startswith("aux")}
    highest = max((depth(layers[path]) for path in chosen if path in layers), default=())
    # Leaves of the network itself, such as position embeddings, belong to no layer.
    fresh = {
        layer or path.rpartition("/")[2]: depth(layer)
        for path, layer in layers.items()
        if path not in chosen and depth(layer) < highest
    }
    return tuple(sorted(fresh, key=lambda layer: fresh[layer]))


def network_order(path: str) -> tuple:
    """A sort key for paths of our networks: first the stem, then by the numbers, last the head.

    It approximates the order in which images pass the layers. The order of creation is not
    available, because JAX sorts the names of each tree that it touches.
    """

    def rank(name: str) -> tuple:
        numbers = [int(n) for n in re.findall(r"\d+", name)] or [1 << 30]
        place = 0 if name.startswith("stem") else 2 if name.startswith("head") else 1
        return place, numbers, name

    return tuple(rank(name) for name in path.split("/"))


def _tops(paths: Collection[str]) -> list[str]:
    """The first name of each layer, without repetition; a leaf of no layer has its own name."""
    layers = {path: split_layer(path)[1].removeprefix("ema/").removesuffix("ema") for path in paths}
    return list(
        dict.fromkeys(
            f"{layer.split('/')[0]}/…" if layer else path.rpartition("/")[2]
            for path, layer in layers.items()
        )
    )


def join_names(names: Iterable[str], most: int = 6) -> str:
    """At most `most` of the names, and how many there are in all."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
