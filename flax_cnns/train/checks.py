"""Checks of functions that a user wrote: their arguments and their results."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree


def describe(value: Any) -> str:
    """Describes a function's result in a few words: "float32 [8 7]", "(float32 [], int32 [])"."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, list(value)[:4])) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value[:4]))})"
    if is_array(value):
        return f"{_dtype(value)} [{' '.join(map(str, jnp.shape(value)))}]"
    return f"an object of the class {type(value).__name__}"


def is_array(value: Any) -> bool:
    """Whether JAX can compute with `value`: an array, a tracer, or a number."""
    return isinstance(value, (int, float, bool, jax.Array)) or (
        hasattr(value, "dtype") and hasattr(value, "shape")
    )


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)


def is_float_array(value: Any, shape: Sequence[int]) -> bool:
    """Whether `value` is a floating-point array of this shape."""
    if not is_array(value) or jnp.shape(value) != tuple(shape):
        return False
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def name_of(function: Any) -> str:
    """Returns the name of a function, of the function in a partial, or of an object's class."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def check_arguments(
    what: str, function: Callable, arguments: Sequence[str], fields: Mapping[str, Any] = {}
) -> None:
    """Checks that `function` accepts these positional `arguments`, and `fields` by keyword.

    Raises `UserError` if it does not.
    """
    if not callable(function):
        raise UserError(f"{what}: expected a function, got {describe(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a compiled function without a signature
        return
    try:
        signature.bind(*arguments, **fields)
    except TypeError:
        given = ", ".join([*arguments, *(f"{name}=" for name in fields)])
        raise UserError(
            f"{what}: it is called with ({given}) but takes ({', '.join(signature.parameters)})"
        ) from None


@contextlib.contextmanager
def explain_errors(what: str, arguments: str) -> Iterator[None]:
    """Adds a note to an error of the user's function: the arguments it was called with."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"{what} is called with {arguments}, while JAX traces it")
        raise


def check_like(what: str, result: Any, expected: Array) -> Array:
    """Returns `result`. Raises `UserError` unless it has the shape and dtype of `expected`."""
    same = is_array(result) and jnp.shape(result) == jnp.shape(expected)
    if not same or _dtype(result) != _dtype(expected):
        raise UserError(f"{what}: expected {describe(expected)}, got {describe(result)}")
    return jnp.asarray(result)


def restack(named: PyTree, stacked: PyTree) -> PyTree:
    """Inverts `tree.unstack_blocks`: returns the leaves of `named` in the structure of
    `stacked`."""
    flat = pytree.flatten(named)

    def restack_leaf(path: str, leaf: Array) -> Array:
        blocks = [flat[name] for name in pytree.expand_stack(path)]
        return blocks[0] if len(blocks) == 1 else jnp.stack(blocks).reshape(leaf.shape)

    leaves = [restack_leaf(path, leaf) for path, leaf in pytree.flatten(stacked).items()]
    return jax.tree.unflatten(jax.tree.structure(stacked), leaves)


def check_tree_like(what: str, result: Any, expected: PyTree) -> PyTree:
    """Returns the leaves of `result` in the structure of `expected`.

    Raises `UserError` if paths, shapes or dtypes differ.
    """
    leaves, flat = pytree.flatten(result), pytree.flatten(expected)
    if differing := sorted(leaves.keys() ^ flat.keys()):
        verb = "lacks" if differing[0] in flat else "has an extra"
        raise UserError(
            f"{what}: expected a tree like its argument; the tree it returned {verb}"
            f" {differing[0]!r}"
        )
    checked = [check_like(f"{what}: {path}", leaves[path], leaf) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(expected), checked)
