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
print(report)  # a table, and as its last line: grafted 265, fresh 2, left behind 2: head/…
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.checkpoint.graft.report import (
    COLLECTIONS,
    GraftReport,
    find_left_behind,
    find_skipped_below,
    join_names,
    make_depth_key,
    sort_by_depth,
    split_layer,
)
from flax_cnns.checkpoint.graft.sources import GraftSource, open_source
from flax_cnns.checkpoint.manifest import place_like, shape_and_dtype
from flax_cnns.errors import UserError
from flax_cnns.types import PyTree
from flax_cnns.weights import adapt

FRESH = None  # a rule that keeps the new network's own initialization


def graft(
    source: str | os.PathLike | PyTree,
    target: PyTree,
    rules: pytree.Rules,
    order: Sequence[str] = (),
    *,
    adapt_stem: bool = False,
    resize_positions: bool = False,
    averaged: bool = False,
) -> tuple[PyTree, GraftReport]:
    r"""`(variables, report)`: the target with the leaves that the rules take from the source.

    `source`: RUN (see `finding.choose_step`), RUN@best, RUN@latest, RUN@1200, the path of any Orbax
    checkpoint, LIBRARY:MODEL or LIBRARY:MODEL=FILE (torchvision:resnet50,
    timm:resnet50d=/path/file.safetensors: as `load_weights` has them), or a tree of arrays.
    `target`: `{"params": ..., "batch_stats": ...}`; its dtypes and shardings are kept. `rules`:
    pairs (regex over the target's paths, path in the source with \1 for groups, or FRESH); the
    first that matches a whole path decides. In a run's checkpoint the averaged weights are a tree
    of their own: `(r"(.*)", r"ema/\1")`. `order`: the layers as images pass them, `[layer.path for
    layer in analysis.cost.cost(model).layers]`, by which the report tells what lies below what;
    without it the names' numbers have to do.

    Three options fit weights to the network, and the report says what they did. `adapt_stem` sums
    the kernels that see images (to 1 channel) or repeats them (from 1 or 3). `resize_positions`
    resizes a ViT's position embeddings bicubically. `averaged` takes the averaged weights: of a
    run, whose rules then need no "ema/", or of a training script's file. `weights.adapt` has the
    details.

    Of a checkpoint only the leaves that are used are read. Raises `UserError` where a leaf is
    decided by no rule, a rule decides nothing or names what the source lacks, shapes differ
    (nothing else is padded or cut), a layer's params and batch_stats are parted, nothing at all is
    grafted, there are no averaged weights, or the source is damaged or has numbers that are not
    finite.
    """
    wanted = pytree.flatten(target)
    decided = pytree.decide(rules, wanted, what="graft")  # before anything is fetched or read
    options = GraftOptions(adapt_stem, resize_positions, averaged)
    found = open_source(source, averaged=averaged)
    chosen, plans = _plan(decided, wanted, found, options, order)
    arrays = found.read(set(chosen.values()))
    made = {
        path: plans[path].make(arrays[there]) if path in plans else arrays[there]
        for path, there in chosen.items()
    }
    _check_finite(chosen, wanted, made, found)
    leaves = [
        place_like(made[path], like) if path in made else like for path, like in wanted.items()
    ]
    report = _report(chosen, plans, wanted, found, order)
    return jax.tree.unflatten(jax.tree.structure(target), leaves), report


class GraftOptions(NamedTuple):
    """What `graft` may do beyond copying; the fields of `config.graft` of these names."""

    adapt_stem: bool = False
    resize_positions: bool = False
    averaged: bool = False


def read_options(config: Any) -> GraftOptions:
    """The options that `config.graft` sets."""
    return GraftOptions(*(config[name] for name in GraftOptions._fields))


def graft_from_config(
    config: Any, target: PyTree, order: Sequence[str]
) -> tuple[PyTree, GraftReport]:
    """Runs `graft` with the fields of `config.graft`."""
    options = read_options(config)._asdict()
    return graft(config.source, target, config.rules, order, **options)


def check_graft(
    source: GraftSource,
    target: PyTree,
    rules: pytree.Rules,
    options: GraftOptions = GraftOptions(),  # noqa: B008
) -> None:
    """Raises the `UserError` that `graft` would, as far as it can be told without an array."""
    wanted = pytree.flatten(target)
    _plan(pytree.decide(rules, wanted, what="graft"), wanted, source, options)


def _plan(
    decided: Mapping[str, tuple[int, Any, re.Match]],
    wanted: Mapping[str, Any],
    found: GraftSource,
    options: GraftOptions,
    order: Sequence[str] = (),
) -> tuple[dict[str, str], dict[str, adapt.Plan]]:
    """(`{path in the target: path in the source}` without the fresh ones, `{path in the target: how
    it is adapted}`)."""
    chosen = _choose(decided, found, options.averaged)
    plans = _adapted(chosen, wanted, found, options, order)
    _check_shapes({p: there for p, there in chosen.items() if p not in plans}, wanted, found)
    _check_not_parted(chosen, wanted)
    if not chosen:
        raise UserError(
            f"graft: the rules leave all {len(wanted)} leaves fresh; let one name a path in"
            f" {found.name}, or set no source"
        )
    return chosen, plans


def _adapted(
    chosen: Mapping[str, str],
    wanted: Mapping[str, Any],
    source: GraftSource,
    options: GraftOptions,
    order: Sequence[str],
) -> dict[str, adapt.Plan]:
    """The plans of the leaves that options fit. Raises `UserError` if an option that is off
    would."""
    depth = make_depth_key(order)
    lowest = min(
        (depth(split_layer(path)[1]) for path in wanted if _is_kernel(wanted[path])), default=()
    )
    plans = {}
    for path, there in chosen.items():
        (here, _), (came, _) = map(shape_and_dtype, (wanted[path], source.leaves[there]))
        found = adapt.plan(
            path,
            tuple(here),
            tuple(came),
            stem=options.adapt_stem,
            positions=options.resize_positions,
            first=depth(split_layer(path)[1]) == lowest,
        )
        if found is None:
            continue
        if found.make is None:
            raise UserError(
                f"graft: {path} is {list(here)} here and {list(came)} there in {source.name};"
                f" {'graft.' if '=True' in found.text else ''}{found.text}; or make it fresh with a"
                f" rule before the others, ({_fresh_pattern(path)!r}, None)"
            )
        plans[path] = found
    return plans


def _is_kernel(leaf: Any) -> bool:
    return len(leaf.shape) == 4


def _fresh_pattern(path: str) -> str:
    """A regex for the layer of a leaf; for the leaf itself if it lies in no layer."""
    collection, layer = split_layer(path)
    return f"{path.rpartition('/')[0]}/.*" if layer or not collection else re.escape(path)


def _report(
    chosen: dict[str, str],
    plans: Mapping[str, adapt.Plan],
    wanted: Mapping[str, Any],
    source: GraftSource,
    order: Sequence[str],
) -> GraftReport:
    shapes = {path: list(wanted[path].shape) for path in sort_by_depth(wanted, order)}
    there = {path: list(leaf.shape) for path, leaf in source.leaves.items()}
    fresh = tuple(path for path in wanted if path not in chosen)
    notes = [source.preprocessing_note] if source.preprocessing_note else []
    notes += source.notes
    notes += [f"{path}: {plan.text}" for path, plan in plans.items()]
    if not source.has_checksums:
        notes.append("the source has no checksums: a flipped bit in it would not be noticed")
    averaged = any(path.startswith("ema/") for path in source.leaves)
    if averaged and not any(path.startswith("ema/") for path in chosen.values()):
        notes.append("the source has averaged weights too, which a rule takes from r'ema/\\1'")
    return GraftReport(
        source=source.name,
        folder="" if source.folder is None else str(source.folder),
        chosen=source.chosen,
        grafted=chosen,
        fresh=fresh,
        mismatched={
            path: {"here": shapes[path], "there": there[path]}
            for path in fresh
            if path in there and there[path] != shapes[path]
        },
        left_behind=find_left_behind(set(chosen.values()), source.leaves),
        skipped_below=find_skipped_below(chosen, wanted, order),
        notes=tuple(notes),
        shapes=shapes,
        adapted={path: plan.text for path, plan in plans.items()},
    )


def _choose(
    decided: Mapping[str, tuple[int, Any, re.Match]], source: GraftSource, averaged: bool
) -> dict[str, str]:
    chosen, missing = {}, []
    prefix = "ema/" if averaged and not source.is_averaged else ""
    if prefix and not any(path.startswith(prefix) for path in source.leaves):
        raise UserError(
            f"graft: averaged=True, but {source.name} has no averaged weights; set averaged=False"
        )
    for path, (index, template, match) in decided.items():
        if template is FRESH:
            continue
        try:
            chosen[path] = match.expand(template)
        except (re.error, TypeError, IndexError) as error:
            raise UserError(
                f"graft: rule {index + 1} gives {template!r}, which is no path for"
                f" {match.re.pattern!r}: {error}"
            ) from None
        if prefix and not chosen[path].startswith(prefix):
            chosen[path] = prefix + chosen[path]
        if chosen[path] not in source.leaves:
            missing.append((path, chosen[path], match.re.pattern))
    if missing:
        path, there, pattern = missing[0]
        more = f" ({len(missing)} such paths)" if len(missing) > 1 else ""
        near = pytree.find_nearest(there, source.leaves)
        raise UserError(
            f"graft: the rule {pattern!r} takes {path} from {there!r}, which {source.name}"
            f" lacks{more}; the nearest there is {near!r}; name it, or make the layer fresh"
        )
    return chosen


def _check_shapes(
    chosen: Mapping[str, str], wanted: Mapping[str, Any], source: GraftSource
) -> None:
    problems = []
    for path, there in chosen.items():
        (shape, dtype), (came, came_dtype) = map(
            shape_and_dtype, (wanted[path], source.leaves[there])
        )
        origin = "" if there == path else f" ({there})"
        if shape != came:
            problems.append(f"{path} is {list(shape)} here and {list(came)} there{origin}")
        elif dtype != came_dtype and not all(
            jnp.issubdtype(d, jnp.floating) for d in (dtype, came_dtype)
        ):
            problems.append(f"{path} is {dtype} here and {came_dtype} there{origin}")
    if problems:
        pattern = _fresh_pattern(problems[0].split(" ")[0])
        raise UserError(
            f"graft: {join_names(problems, 3)} in {source.name}; nothing is padded or cut:"
            f" make such layers fresh with a rule before the others, ({pattern!r}, None)"
        )


def _check_finite(
    chosen: Mapping[str, str],
    wanted: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    source: GraftSource,
) -> None:
    """`arrays` are by paths in the target. In its dtypes large numbers may overflow."""
    for path, there in chosen.items():
        dtype = shape_and_dtype(wanted[path])[1]
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(arrays[path], dtype)).all()
        if not finite:
            raise UserError(
                f"graft: {there} of {source.name} has numbers that are not finite as {dtype}:"
                " take another checkpoint, or make the layer fresh"
            )


def _check_not_parted(chosen: Mapping[str, str], wanted: Collection[str]) -> None:
    """A layer's batch_stats mean nothing beside other weights than those that made them."""
    # {layer: {collection: the source layers of its leaves; None: fresh; "": a source without our
    # collections, where the names say nothing about what belongs together}}
    origins: dict[str, dict[str, set[str | None]]] = {}
    for path in wanted:
        collection, layer = split_layer(path)
        known, there = split_layer(chosen[path]) if path in chosen else ("", None)
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
