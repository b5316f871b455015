"""Stacks: blocks that are alike as one, for networks that scan over them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.types import PyTree

# ---- stacks: blocks that are alike as one, for networks that scan over them

_STACK = re.compile(r"(\w+?)(\d+)-(\d+)")


def expand_stack(path: str) -> list[str]:
    """What a stacked leaf holds, in order: `"stage1/block2-4/kernel"` -> `["stage1/block2/kernel",
    "stage1/block3/kernel", "stage1/block4/kernel"]`. Any other path -> itself alone."""

    def names(part: str) -> list[str]:
        if not (found := _STACK.fullmatch(part)) or int(found[2]) > int(found[3]):
            return [part]
        return [f"{found[1]}{i}" for i in range(int(found[2]), int(found[3]) + 1)]

    return ["/".join(parts) for parts in itertools.product(*map(names, path.split("/")))]


def stack_blocks(tree: PyTree) -> PyTree:
    """The tree with `block2` ... `blockN` of every stage as one `block2-N`, its
    N - 1 blocks along a new first axis.

    Only where there are two at least, alike in names, shapes and dtypes. `block1`, which may have a
    stride, is left alone, and so is what is stacked already. Takes any pytree (a whole `TrainState`
    or optimizer state) of arrays or `ShapeDtypeStruct`s; NumPy's stay NumPy's.
    """
    return _over_dicts(_stack, tree)


def unstack_blocks(tree: PyTree) -> PyTree:
    """The inverse of `stack_blocks`, to the bit; needs only the names. NumPy's leaves are views."""
    return _over_dicts(_unstack, tree)


def _over_dicts(convert: Any, tree: PyTree) -> PyTree:
    """The outermost dicts of a pytree (a NamedTuple of them, say) converted."""
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
            own = jax.tree.map(lambda x, i=i: _take(x, i), child) if len(names) > 1 else child
            named[member] = unstack_blocks(own)
    return named


def _join(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return _shape_like(first, (len(leaves), *first.shape))
    return (np if isinstance(first, np.ndarray) else jnp).stack(leaves)


def _take(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _shape_like(leaf, leaf.shape[1:])
    return leaf[i, ...]  # a view, and an array even of one number


def _shape_like(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
