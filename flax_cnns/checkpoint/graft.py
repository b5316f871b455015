r"""Surgical loading: rules name, for each leaf of a network, the leaf that it starts from.

variables, report = graft(
    "runs/imagenet_resnet50",
    variables,  # {"params": ..., "batch_stats": ...}: fresh; gives shapes, dtypes and shardings
    [
        (r"params/head/.*", FRESH),  # other classes
        (r"(.*)/stem/conv_rgb/(.*)", r"\1/stem/conv/\2"),  # renamed since
        (r"(.*)", r"\1"),
    ],
)
print(report)  # grafted 265, fresh 2, left behind 2: head/…
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_cnns import pytree
from flax_cnns.checkpoint import manager
from flax_cnns.checkpoint.manifest import place, shape_and_dtype, to_host
from flax_cnns.errors import UserError
from flax_cnns.types import PyTree

FRESH = None  # a rule that keeps the new network's own initialisation

COLLECTIONS = ("params", "batch_stats")


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every leaf, by path."""

    source: str
    grafted: dict[str, str]  # path in the new network -> path in the source
    fresh: tuple[str, ...]
    left_behind: tuple[str, ...]  # in the source, and used nowhere
    skipped_below: tuple[str, ...]  # fresh layers that lie below a loaded one

    def __str__(self) -> str:
        text = f"grafted {len(self.grafted)}, fresh {len(self.fresh)}"
        text += f", left behind {len(self.left_behind)}"
        if self.left_behind:
            text += f": {_shorten(f'{top}/…' for top in _tops(self.left_behind))}"
        if self.skipped_below:
            text += (
                f"\nnote: {_shorten(self.skipped_below)} fresh, with loaded layers above: it makes"
                " little sense to load a layer when a layer below was skipped"
            )
        return text

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, to be kept with the run."""
        return dataclasses.asdict(self)


def graft(
    source: str | os.PathLike | PyTree,
    target: PyTree,
    rules: pytree.Rules,
    order: Sequence[str] = (),
) -> tuple[PyTree, Report]:
    r"""`(variables, report)`: the target with the leaves that the rules take from the source.

    `source`: RUN, RUN@best (what RUN alone means), RUN@latest, RUN@1200, the path of any Orbax
    checkpoint, or a tree of arrays. `target`: `{"params": ..., "batch_stats": ...}`; its dtypes and
    shardings are kept. `rules`: pairs (regex over the target's paths, path in the source with \1
    for groups, or FRESH); the first that matches a whole path decides. In a run's checkpoint the
    averaged weights are a tree of their own: `(r"(.*)", r"ema/\1")`. `order`: the layers as images
    pass them, `[layer.path for layer in analysis.cost.cost(model).layers]`, by which the report
    tells what lies below what; without it the names' numbers have to do.

    Only the leaves that are used are read. Raises `UserError` where a leaf is decided by no rule, a
    rule decides nothing or names what the source lacks, shapes differ (nothing is padded or cut), a
    layer's params and batch_stats are parted, nothing at all is grafted, or the source is damaged.
    """
    wanted = pytree.flatten(target)
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the given tree"
    stored: Mapping[str, Any]
    if isinstance(source, str | os.PathLike):
        folder = manager.resolve(source)
        stored = {k: jax.ShapeDtypeStruct(*v) for k, v in manager.read_metadata(folder).items()}
    else:
        stored = pytree.flatten(source)
    chosen = _choose(rules, wanted, stored, name)
    _check_shapes(chosen, wanted, stored, name)
    _check_not_parted(chosen, wanted)
    if not chosen:
        raise UserError(
            f"graft: the rules leave all {len(wanted)} leaves fresh; let one name a path in {name},"
            " or set no source"
        )
    if isinstance(source, str | os.PathLike):
        arrays = manager.read_leaves(folder, set(chosen.values()))
    else:
        arrays = {path: to_host(stored[path]) for path in set(chosen.values())}
    leaves = [
        place(arrays[chosen[path]], like) if path in chosen else like
        for path, like in wanted.items()
    ]
    report = Report(
        source=name,
        grafted=chosen,
        fresh=tuple(path for path in wanted if path not in chosen),
        left_behind=_left_behind(set(chosen.values()), stored),
        skipped_below=_skipped_below(chosen, wanted, order),
    )
    return jax.tree.unflatten(jax.tree.structure(target), leaves), report


def _choose(
    rules: pytree.Rules, wanted: Collection[str], stored: Collection[str], name: str
) -> dict[str, str]:
    """`{path in the target: path in the source}`, without the fresh ones."""
    chosen, missing = {}, []
    for path, (index, template, match) in pytree.decide(rules, wanted, what="graft").items():
        if template is FRESH:
            continue
        try:
            chosen[path] = match.expand(template)
        except (re.error, TypeError, IndexError) as error:
            raise UserError(
                f"graft: rule {index + 1} gives {template!r}, which is no path for"
                f" {match.re.pattern!r}: {error}"
            ) from None
        if chosen[path] not in stored:
            missing.append((path, chosen[path], match.re.pattern))
    if missing:
        path, there, pattern = missing[0]
        more = f" ({len(missing)} such paths)" if len(missing) > 1 else ""
        near = pytree.nearest(there, stored)
        raise UserError(
            f"graft: the rule {pattern!r} takes {path} from {there!r}, which {name} lacks{more};"
            f" the nearest there is {near!r}; name it, or make the layer fresh"
        )
    return chosen


def _check_shapes(
    chosen: Mapping[str, str], wanted: Mapping[str, Any], stored: Mapping[str, Any], name: str
) -> None:
    problems = []
    for path, there in chosen.items():
        (shape, dtype), (came, came_dtype) = map(shape_and_dtype, (wanted[path], stored[there]))
        origin = "" if there == path else f" ({there})"
        if shape != came:
            problems.append(f"{path} is {list(shape)} here and {list(came)} there{origin}")
        elif dtype != came_dtype and not all(
            jnp.issubdtype(d, jnp.floating) for d in (dtype, came_dtype)
        ):
            problems.append(f"{path} is {dtype} here and {came_dtype} there{origin}")
    if problems:
        layer = "/".join(problems[0].split(" ")[0].split("/")[:-1])
        raise UserError(
            f"graft: {_shorten(problems, 3)} in {name}; nothing is padded or cut: make such layers"
            f" fresh with a rule before the others, ({layer + '/.*'!r}, None)"
        )


def _check_not_parted(chosen: Mapping[str, str], wanted: Collection[str]) -> None:
    """A layer's batch_stats mean nothing beside other weights than those that made them."""
    # {layer: {collection: the source layers of its leaves; None: fresh; "": a source without our
    # collections, where the names say nothing about what belongs together}}
    origins: dict[str, dict[str, set[str | None]]] = {}
    for path in wanted:
        collection, layer = _layer(path)
        known, there = _layer(chosen[path]) if path in chosen else ("", None)
        origin = there if known or there is None else ""
        origins.setdefault(layer, {}).setdefault(collection, set()).add(origin)
    for layer, collections in origins.items():
        params, stats = (collections.get(name) for name in COLLECTIONS)
        if not params or not stats or params == stats:
            continue
        if "" in params | stats and {o is None for o in params} == {o is None for o in stats}:
            continue
        raise UserError(
            f"graft: params and batch_stats of the layer {layer} are parted: params come from"
            f" {_name_origins(params)}, batch_stats from {_name_origins(stats)};"
            f" let one rule decide both: {f'(params|batch_stats)/{layer}/.*'!r}"
        )


def _name_origins(origins: Collection[str | None]) -> str:
    names = {None: "nowhere (fresh)", "": "elsewhere"}
    return " and ".join(sorted(names.get(origin, origin) for origin in origins))


def _layer(path: str) -> tuple[str, str]:
    """`("params", "ema/stem/norm")` of "ema/params/stem/norm/scale"; ("", ...) without a
    collection.
    """
    names = path.split("/")[:-1]
    for collection in COLLECTIONS:
        if collection in names[:2]:
            names.remove(collection)
            return collection, "/".join(names)
    return "", "/".join(names)


def _left_behind(used: Collection[str], stored: Collection[str]) -> tuple[str, ...]:
    """The weights that nothing took: the averaged ones count only where some of them were taken."""
    averaged = {path.startswith("ema/") for path in used}

    def counts(path: str) -> bool:
        inner = path.removeprefix("ema/")
        weights = inner.split("/")[0] in COLLECTIONS or not any(
            p.startswith("params/") for p in stored
        )
        return weights and path.startswith("ema/") in averaged

    return tuple(path for path in stored if counts(path) and path not in used)


def _skipped_below(
    chosen: Collection[str], wanted: Collection[str], order: Sequence[str]
) -> tuple[str, ...]:
    """The fresh layers that lie below a grafted one, the lowest first. Auxiliary heads stand beside
    the way of the images, and count as neither."""
    places = {layer: place for place, layer in enumerate(order)}

    def depth(layer: str) -> tuple:
        return places.get(layer, len(places)), _depth(layer)

    layers = {path: _layer(path)[1] for path in wanted}
    layers = {path: layer for path, layer in layers.items() if not layer.startswith("aux")}
    highest = max((depth(layers[path]) for path in chosen if path in layers), default=())
    fresh = {layer for path, layer in layers.items() if path not in chosen}
    return tuple(sorted((layer for layer in fresh if depth(layer) < highest), key=depth))


def _depth(layer: str) -> tuple:
    """Sorts layers as images pass them, by our names: the stem, then by number, then the head.

    JAX sorts the names of every tree that it touches, so the order of creation is not to be had.
    """

    def rank(name: str) -> tuple:
        numbers = [int(n) for n in re.findall(r"\d+", name)] or [1 << 30]
        place = 0 if name.startswith("stem") else 2 if name.startswith("head") else 1
        return place, numbers, name

    return tuple(rank(name) for name in layer.split("/"))


def _tops(paths: Collection[str]) -> list[str]:
    """The first names of the layers, each once."""
    return list(dict.fromkeys(_layer(path)[1].removeprefix("ema/").split("/")[0] for path in paths))


def _shorten(words: Any, most: int = 6) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f", … ({len(words)} in all)" if len(words) > most else "")
