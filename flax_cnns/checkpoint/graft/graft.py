r"""Grafting: rules say, for each leaf of a network, which leaf of a source it starts from.

variables, report = graft(
    "runs/imagenet_resnet50",
    variables,  # {"params": ..., "batch_stats": ...}: fresh; gives shapes, dtypes and shardings
    [
        (r"params/head/.*", FRESH),  # other classes
        (r"(.*)/stem/conv_rgb/(.*)", r"\1/stem/conv/\2"),  # a renamed layer
        (r"(.*)", r"\1"),
    ],
)
print(report)  # a table, and below it: grafted 265, fresh 2, left behind 2: head/…
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

FRESH = None  # value of a rule that keeps the initialization of the new network


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
    r"""Returns `(variables, report)`: the target with the leaves that rules take from the source.

    `source`: RUN (see `finding.choose_step`), RUN@best, RUN@latest, RUN@1200, the path of any Orbax
    checkpoint, LIBRARY:MODEL or LIBRARY:MODEL=FILE (torchvision:resnet50,
    timm:resnet50d=/path/file.safetensors; see `load_weights`), or a tree of arrays.

    `target`: `{"params": ..., "batch_stats": ...}`; its dtypes and shardings are kept.

    `rules`: pairs (regex, value). The regex matches a whole path of the target, and the first rule
    that matches decides. The value is a path in the source, with \1 for groups of the regex, or
    FRESH. In a run's checkpoint the averaged weights are a separate tree: `(r"(.*)", r"ema/\1")`.

    `order`: the layers in the order in which images pass them, `[layer.path for layer in
    analysis.cost.cost(model).layers]`. The report needs the order to say which layer lies below
    which. Without `order` it goes by the numbers in the names.

    Three options change what is copied, and the report says what they did (details in
    `weights.adapt`). `adapt_stem` fits the kernels that see images to another number of channels:
    to 1 channel by a sum, from 1 or 3 channels by repetition. `resize_positions` resizes the
    position embeddings of a ViT bicubically. `averaged` takes the averaged weights, from a run
    (rules then need no "ema/") or from a training script's file.

    Only the leaves that are used are read from a checkpoint.

    Raises `UserError` if

    - no rule decides a leaf, or a rule decides no leaf;
    - a rule takes a leaf that the source lacks, or whose shape differs (only the options above
      change shapes);
    - the params and batch_stats of a layer come from different layers;
    - all leaves stay fresh;
    - the source is damaged, lacks averaged weights, or has numbers that are not finite.
    """
    wanted = pytree.flatten(target)
    decided = pytree.decide(rules, wanted, what="graft")  # before anything is fetched or read
    options = GraftOptions(adapt_stem, resize_positions, averaged)
    opened = open_source(source, averaged=averaged)
    chosen, plans = _plan(decided, wanted, opened, options, order)
    stored = opened.read(set(chosen.values()))
    arrays = {}
    for path, there in chosen.items():
        adapt_leaf = plans[path].adapt if path in plans else None
        arrays[path] = adapt_leaf(stored[there]) if adapt_leaf else stored[there]
    _check_finite(chosen, wanted, arrays, opened)
    leaves = [
        place_like(arrays[path], like) if path in arrays else like for path, like in wanted.items()
    ]
    report = _report(chosen, plans, wanted, opened, order)
    return jax.tree.unflatten(jax.tree.structure(target), leaves), report


class GraftOptions(NamedTuple):
    """What `graft` may do besides copying; each is the field of this name in `config.graft`."""

    adapt_stem: bool = False
    resize_positions: bool = False
    averaged: bool = False


def read_options(config: Any) -> GraftOptions:
    """The options in `config`, which is `config.graft` of a run."""
    return GraftOptions(*(config[name] for name in GraftOptions._fields))


def graft_from_config(
    config: Any, target: PyTree, order: Sequence[str]
) -> tuple[PyTree, GraftReport]:
    """Calls `graft` with the fields of `config`, which is `config.graft` of a run."""
    options = read_options(config)._asdict()
    return graft(config.source, target, config.rules, order, **options)


def check_graft(
    source: GraftSource,
    target: PyTree,
    rules: pytree.Rules,
    options: GraftOptions = GraftOptions(),  # noqa: B008
) -> None:
    """Raises the `UserError` that `graft` would raise, if it can be found without any array."""
    wanted = pytree.flatten(target)
    _plan(pytree.decide(rules, wanted, what="graft"), wanted, source, options)


def _plan(
    decided: Mapping[str, tuple[int, Any, re.Match]],
    wanted: Mapping[str, Any],
    source: GraftSource,
    options: GraftOptions,
    order: Sequence[str] = (),
) -> tuple[dict[str, str], dict[str, adapt.AdaptPlan]]:
    """Returns (sources, plans) of the leaves that are not fresh, by path in the target.

    `sources` has paths in the source, `plans` says how leaves are adapted.
    """
    chosen = _choose(decided, source, options.averaged)
    plans = _plan_adaptations(chosen, wanted, source, options, order)
    _check_shapes({p: there for p, there in chosen.items() if p not in plans}, wanted, source)
    _check_not_parted(chosen, wanted)
    if not chosen:
        raise UserError(
            f"graft: the rules leave all {len(wanted)} leaves fresh; let a rule name a path in"
            f" {source.name}, or set no source"
        )
    return chosen, plans


def _plan_adaptations(
    chosen: Mapping[str, str],
    wanted: Mapping[str, Any],
    source: GraftSource,
    options: GraftOptions,
    order: Sequence[str],
) -> dict[str, adapt.AdaptPlan]:
    """The plans of the leaves that must be adapted, by path in the target.

    Raises `UserError` for a leaf that cannot be adapted, or only by an option that is off.
    """
    depth = make_depth_key(order)
    lowest = min(
        (depth(split_layer(path)[1]) for path in wanted if _is_kernel(wanted[path])), default=()
    )
    plans = {}
    for path, there in chosen.items():
        (here, _), (came, _) = map(shape_and_dtype, (wanted[path], source.leaves[there]))
        plan = adapt.make_plan(
            path,
            tuple(here),
            tuple(came),
            stem=options.adapt_stem,
            positions=options.resize_positions,
            first=depth(split_layer(path)[1]) == lowest,
        )
        if plan is None:
            continue
        if plan.adapt is None:
            option = "graft." if "=True" in plan.description else ""
            raise UserError(
                f"graft: {source.name} does not fit: {path} is {list(here)} in the network and"
                f" {list(came)} in the source; {option}{plan.description};"
                f" or leave the layer fresh: put the rule ({_fresh_pattern(path)!r}, None) first"
            )
        plans[path] = plan
    return plans


def _is_kernel(leaf: Any) -> bool:
    return len(leaf.shape) == 4


def _fresh_pattern(path: str) -> str:
    """A regex for the leaf's layer, or for the leaf itself if it belongs to no layer."""
    collection, layer = split_layer(path)
    return f"{path.rpartition('/')[0]}/.*" if layer or not collection else re.escape(path)


def _report(
    chosen: dict[str, str],
    plans: Mapping[str, adapt.AdaptPlan],
    wanted: Mapping[str, Any],
    source: GraftSource,
    order: Sequence[str],
) -> GraftReport:
    shapes = {path: list(wanted[path].shape) for path in sort_by_depth(wanted, order)}
    there = {path: list(leaf.shape) for path, leaf in source.leaves.items()}
    fresh = tuple(path for path in wanted if path not in chosen)
    notes = [source.preprocessing_note] if source.preprocessing_note else []
    notes += source.notes
    notes += [f"{path}: {plan.description}" for path, plan in plans.items()]
    if not source.has_checksums:
        notes.append("the source has no checksums: a flipped bit would not be noticed")
    averaged = any(path.startswith("ema/") for path in source.leaves)
    if averaged and not any(path.startswith("ema/") for path in chosen.values()):
        notes.append("the source also has averaged weights, which a rule takes by r'ema/\\1'")
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
        adapted={path: plan.description for path, plan in plans.items()},
    )


def _choose(
    decided: Mapping[str, tuple[int, Any, re.Match]], source: GraftSource, averaged: bool
) -> dict[str, str]:
    """`{path in the target: path in the source}` of the leaves that are not fresh."""
    chosen: dict[str, str] = {}
    missing = []
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
                f"graft: rule {index + 1} has the value {template!r}, which does not fit its regex"
                f" {match.re.pattern!r}: {error}; expected a path, with \\1 for a group, or None"
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
            f" lacks{more}; the nearest path is {near!r}; name that path, or leave the layer fresh:"
            f" put the rule ({_fresh_pattern(path)!r}, None) first"
        )
    return chosen


def _check_shapes(
    chosen: Mapping[str, str], wanted: Mapping[str, Any], source: GraftSource
) -> None:
    """Raises `UserError` if a leaf differs from its source in shape, or in the kind of dtype."""
    problems = {}
    for path, there in chosen.items():
        (shape, dtype), (came, came_dtype) = map(
            shape_and_dtype, (wanted[path], source.leaves[there])
        )
        origin = "the source" if there == path else f"the source ({there})"
        if shape != came:
            problems[path] = f"{path} is {list(shape)} in the network and {list(came)} in {origin}"
        elif dtype != came_dtype and not all(
            jnp.issubdtype(d, jnp.floating) for d in (dtype, came_dtype)
        ):
            problems[path] = f"{path} is {dtype} in the network and {came_dtype} in {origin}"
    if problems:
        pattern = _fresh_pattern(next(iter(problems)))
        raise UserError(
            f"graft: {source.name} does not fit: {join_names(problems.values(), 3)}; leave such"
            f" layers fresh: put the rule ({pattern!r}, None) first"
        )


def _check_finite(
    chosen: Mapping[str, str],
    wanted: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    source: GraftSource,
) -> None:
    """Raises `UserError` if an array has NaN or infinity in the dtype of its target.

    `arrays` has paths in the target. Large numbers may overflow in the target's dtype.
    """
    for path, there in chosen.items():
        dtype = shape_and_dtype(wanted[path])[1]
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(arrays[path], dtype)).all()
        if not finite:
            raise UserError(
                f"graft: {there} in {source.name} has numbers that are not finite as {dtype}; take"
                f" another checkpoint, or leave the layer fresh: put the rule"
                f" ({_fresh_pattern(path)!r}, None) first"
            )


def _check_not_parted(chosen: Mapping[str, str], wanted: Collection[str]) -> None:
    """Raises `UserError` if params and batch_stats of a layer come from different layers.

    Batch statistics make sense only with the weights that they were computed with.
    """
    # {layer: {collection: the layers in the source that its leaves come from}}. None: the leaf is
    # fresh. "": the source has no collections, so its names do not say what belongs together.
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
            f"graft: the params and batch_stats of the layer {layer} come from different layers:"
            f" params from {_name_origins(params)}, batch_stats from {_name_origins(stats)};"
            f" let one rule decide both: {f'(params|batch_stats)/{layer}/.*'!r}"
        )


def _name_origins(origins: Collection[str | None]) -> str:
    names: dict[str | None, str] = {None: "the initialization (fresh)", "": "elsewhere"}
    return " and ".join(sorted(names.get(origin, str(origin)) for origin in origins))
