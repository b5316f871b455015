"""Converts pytrees to and from flat dicts `{"params/stage1/block2/conv1/kernel": leaf}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flax_cnns.types import PyTree


def flatten(tree: PyTree) -> dict[str, Any]:
    """Flattens any pytree in its own order: `{"a": {"b": 1}}` -> `{"a/b": 1}`. Drops `None`
    leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `flatten` for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def partition(tree: PyTree, keep: PyTree) -> tuple[dict, dict]:
    """Splits nested dicts by a tree of bools into `(kept, rest)`."""
    flat, is_kept = flatten(tree), flatten(keep)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if is_kept[path]}),
        unflatten({path: leaf for path, leaf in flat.items() if not is_kept[path]}),
    )


def merge(*trees: PyTree) -> dict:
    """Inverts `partition`. Paths are sorted, as JAX sorts the keys of dicts."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat.update(flatten(tree))
    return unflatten(dict(sorted(flat.items())))


def count(tree: PyTree) -> int:
    """Returns the total number of elements of the leaves, arrays or `jax.ShapeDtypeStruct`s."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
