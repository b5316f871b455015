"""Stacks the parameters of equal blocks, for networks that scan over their blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.types import PyTree

_STACK = re.compile(r"(\w+?)(\d+)-(\d+)")


def expand_stack(path: str) -> list[str]:
    """Returns the paths of the blocks in a stacked leaf, in order: `"stage1/block2-4/kernel"` ->
    `["stage1/block2/kernel", "stage1/block3/kernel", "stage1/block4/kernel"]`. Returns `[path]` for
    any other path."""

    def expand(part: str) -> list[str]:
        if not (match := _STACK.fullmatch(part)) or int(match[2]) > int(match[3]):
            return [part]
        return [f"{match[1]}{i}" for i in range(int(match[2]), int(match[3]) + 1)]

    return ["/".join(parts) for parts in itertools.product(*map(expand, path.split("/")))]


def stack_blocks(tree: PyTree) -> PyTree:
    """Stacks `block2` ... `blockN` of every stage as `block2-N`, along a new first axis of N - 1.

    Only stages with at least two such blocks are stacked, and only if the blocks are equal in
    names, shapes and dtypes. `block1`, which may have a stride, and blocks that are already stacked
    stay as they are. `tree` is any pytree (a whole `TrainState` or optimizer state) of arrays or
    `ShapeDtypeStruct`s. NumPy arrays stay NumPy arrays.
    """
    return _over_dicts(_stack, tree)


def unstack_blocks(tree: PyTree) -> PyTree:
    """Inverts `stack_blocks` bit-exactly; names such as `block2-4` mark the stacks. NumPy leaves
    are returned as views."""
    return _over_dicts(_unstack, tree)


def _over_dicts(convert: Any, tree: PyTree) -> PyTree:
    """Converts the outermost dicts of a pytree, such as a NamedTuple of dicts."""
    is_dict = lambda node: isinstance(node, dict)  # noqa: E731
    return jax.tree.map(lambda x: convert(x) if is_dict(x) else x, tree, is_leaf=is_dict)


def _stack(node: dict[str, Any]) -> dict[str, Any]:
    last = next(i for i in itertools.count(1) if f"block{i + 1}" not in node)
    repeats = [f"block{i}" for i in range(2, last + 1)]
    if len(repeats) < 2 or any(_form(node[name]) != _form(node["block2"]) for name in repeats):
        return {name: stack_blocks(child) for name, child in node.items()}
    stacked = jax.tree.map(lambda *leaves: _join(leaves), *(node[name] for name in repeats))
    rest = {name: stack_blocks(child) for name, child in node.items() if name not in repeats}
    return rest | {f"block2-{last}": stacked}


def _form(tree: PyTree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _unstack(node: dict[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, child in node.items():
        for i, member in enumerate(names := expand_stack(name)):
            block = jax.tree.map(lambda x, i=i: _take(x, i), child) if len(names) > 1 else child
            named[member] = unstack_blocks(block)
    return named


def _join(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return _shape_like(first, (len(leaves), *first.shape))
    return (np if isinstance(first, np.ndarray) else jnp).stack(leaves)


def _take(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _shape_like(leaf, leaf.shape[1:])
    return leaf[i, ...]  # with "...", NumPy returns a view, not a scalar, if leaf is [blocks]


def _shape_like(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
