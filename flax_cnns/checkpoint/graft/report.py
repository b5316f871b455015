"""What grafting did, leaf by leaf, and as a table with a row for each part of the network."""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from flax_cnns.checkpoint.finding import parse_step
from flax_cnns.names import make_console

COLLECTIONS = ("params", "batch_stats")
MAX_ROWS = 40  # of a table; the rest is in graft.json


@dataclasses.dataclass(frozen=True)
class GraftReport:
    """What became of every leaf, by path. `print(report)` gives the table, `report.summary` the
    line below it."""

    source: str  # as it was asked for
    folder: str  # of the checkpoint's arrays; "" for other sources
    chosen: str  # why this checkpoint of a run: best, latest, ...; "" for other sources
    grafted: dict[str, str]  # path in the new network -> path in the source
    fresh: tuple[str, ...]
    mismatched: dict[str, dict[str, list[int]]]  # fresh ones whose namesake has another shape
    left_behind: tuple[str, ...]  # in the source, and used nowhere
    skipped_below: tuple[str, ...]  # fresh layers that lie below a loaded one
    notes: tuple[str, ...]  # what else one should know
    shapes: dict[str, list[int]]  # of the new network's leaves, as images pass them
    adapted: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> what was done to it

    @property
    def summary(self) -> str:
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
                f"{join_names(self.skipped_below)} fresh, with loaded layers above: it makes little"
                " sense to load a layer when a layer below was skipped"
            )
        return "\n".join([title, *lines, self.summary, *(f"note: {note}" for note in notes)])

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, to be kept with the run."""
        found = dataclasses.asdict(self)
        del found["shapes"]  # the network says them
        return found

    def _table(self) -> Table:
        table = Table()
        table.add_column("part")
        table.add_column("leaves", justify="right")
        table.add_column("numbers", justify="right")
        table.add_column("starts from")
        ours = [
            _Leaf(_place(path), math.prod(shape), _place(self.grafted.get(path)))
            for path, shape in self.shapes.items()
        ]
        other = {_place(path): both for path, both in self.mismatched.items()}
        _add_rows(table, _parts(ours), other)
        table.add_section()
        # A part of the source is named as high as all of it was left behind.
        theirs = [_Leaf(_place(path), None, None) for path in self.left_behind]
        theirs += [_Leaf(_place(path), None, "") for path in self.grafted.values()]
        _add_rows(table, (row for row in _parts(theirs) if row[2] is None), {}, "left behind")
        return table


class _Leaf(NamedTuple):
    place: str  # its path without the collection: stem/norm/scale
    size: int | None
    origin: str | None  # the source's place; None: fresh


_Row = tuple[str, list[_Leaf], str | None]


def _parts(leaves: Iterable[_Leaf], depth: int = 1) -> Iterator[_Row]:
    """(part, its leaves, where they start from): parts as large as one origin explains them."""
    parts: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        parts.setdefault("/".join(leaf.place.split("/")[:depth]), []).append(leaf)
    for part, inside in parts.items():
        origins = {_origin_of(part, leaf) for leaf in inside}
        if len(origins) == 1:
            yield part, inside, origins.pop()
        elif all(leaf.place == part for leaf in inside):  # of several collections
            yield from ((part, [leaf], leaf.origin) for leaf in inside)
        else:
            yield from _parts(inside, depth + 1)


def _origin_of(part: str, leaf: _Leaf) -> str | None:
    """What the whole part came from, if this leaf says it all: stem/conv of stem/conv/kernel."""
    below = leaf.place.removeprefix(part)
    if leaf.origin is not None and leaf.origin.endswith(below):
        return leaf.origin.removesuffix(below)
    return leaf.origin


def _add_rows(
    table: Table, rows: Iterable[_Row], mismatched: dict[str, Any], fresh: str = "fresh"
) -> None:
    rows = list(rows)
    for part, leaves, origin in rows[:MAX_ROWS]:
        sizes = [leaf.size for leaf in leaves]
        numbers = "" if None in sizes else f"{sum(sizes):,}"
        text = fresh if origin is None else origin
        if wrong := [mismatched[leaf.place] for leaf in leaves if leaf.place in mismatched]:
            here, there = wrong[-1]["here"], wrong[-1]["there"]
            text += f": {here} here, {there} there"
        table.add_row(*map(Text, (part, str(len(leaves)), numbers, text)))
    if hidden := rows[MAX_ROWS:]:
        table.add_row("…", str(sum(len(row[1]) for row in hidden)), "", f"{len(hidden)} more parts")


def _place(path: str | None) -> str | None:
    return None if path is None else _split(path)[1]


def split_layer(path: str) -> tuple[str, str]:
    """`("params", "ema/stem/norm")` of "ema/params/stem/norm/scale"; ("", ...) without a
    collection.
    """
    collection, place = _split(path)
    return collection, place.rpartition("/")[0]


def _split(path: str) -> tuple[str, str]:
    names = path.split("/")
    collection = next((name for name in names[:2] if name in COLLECTIONS), "")
    if collection:
        names.remove(collection)
    return collection, "/".join(names)


def sort_by_depth(paths: Iterable[str], order: Sequence[str]) -> list[str]:
    """The paths as images pass their layers: by `order`, then by their names."""
    depth = make_depth_key(order)
    return sorted(paths, key=lambda path: depth(split_layer(path)[1]))


def make_depth_key(order: Sequence[str]) -> Any:
    places = {layer: place for place, layer in enumerate(order)}
    return lambda layer: (places.get(layer, len(places)), network_order(layer))


def find_left_behind(used: Collection[str], stored: Collection[str]) -> tuple[str, ...]:
    """The weights that nothing took: the averaged ones count only where some of them were taken."""
    averaged = {path.startswith("ema/") for path in used}

    def counts(path: str) -> bool:
        inner = path.removeprefix("ema/")
        weights = inner.split("/")[0] in COLLECTIONS or not any(
            p.startswith("params/") for p in stored
        )
        return weights and path.startswith("ema/") in averaged

    return tuple(path for path in stored if counts(path) and path not in used)


def find_skipped_below(
    chosen: Collection[str], wanted: Collection[str], order: Sequence[str]
) -> tuple[str, ...]:
    """The fresh layers that lie below a grafted one, the lowest first. Auxiliary heads stand beside
    the way of the images, and count as neither."""
    depth = make_depth_key(order)
    layers = {path: split_layer(path)[1] for path in wanted}
    layers = {path: layer for path, layer in layers.items() if not layer.startswith("aux")}
    highest = max((depth(layers[path]) for path in chosen if path in layers), default=())
    # The network's own leaves, such as position embeddings, lie in no layer.
    fresh = {
        layer or path.rpartition("/")[2]: depth(layer)
        for path, layer in layers.items()
        if path not in chosen and depth(layer) < highest
    }
    return tuple(sorted(fresh, key=fresh.get))


def network_order(path: str) -> tuple:
    """Sorts paths as images pass them, by our names: the stem, then by number, then the head.

    JAX sorts the names of every tree that it touches, so the order of creation is not to be had.
    """

    def rank(name: str) -> tuple:
        numbers = [int(n) for n in re.findall(r"\d+", name)] or [1 << 30]
        place = 0 if name.startswith("stem") else 2 if name.startswith("head") else 1
        return place, numbers, name

    return tuple(rank(name) for name in path.split("/"))


def _tops(paths: Collection[str]) -> list[str]:
    """The first names of the layers, each once; of a leaf in no layer, its own name."""
    layers = {path: split_layer(path)[1].removeprefix("ema/").removesuffix("ema") for path in paths}
    return list(
        dict.fromkeys(
            f"{layer.split('/')[0]}/…" if layer else path.rpartition("/")[2]
            for path, layer in layers.items()
        )
    )


def join_names(words: Any, most: int = 6) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f", … ({len(words)} in all)" if len(words) > most else "")
