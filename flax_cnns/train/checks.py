"""What the checks of a user's own functions share: their arguments, and the words for what came."""

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
    """What a function returned, in a few words: "float32 [8 7]", "(float32 [], int32 [])"."""
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
    """Whether JAX computes with it: an array, a tracer, or a number."""
    return isinstance(value, (int, float, bool, jax.Array)) or (
        hasattr(value, "dtype") and hasattr(value, "shape")
    )


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)


def is_float_array(value: Any, shape: Sequence[int]) -> bool:
    """Whether it is a floating-point array of that shape."""
    if not is_array(value) or jnp.shape(value) != tuple(shape):
        return False
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def name_of(function: Any) -> str:
    """A function's name, a partial's or an object's too."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def check_arguments(
    what: str, function: Callable, arguments: Sequence[str], fields: Mapping[str, Any] = {}
) -> None:
    """Raises `UserError` unless the function can be called with so many positional arguments, and
    with `fields` by name."""
    if not callable(function):
        raise UserError(f"{what}: expected a function, came {describe(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a compiled function that does not say
        return
    try:
        signature.bind(*arguments, **fields)
    except TypeError:
        given = ", ".join([*arguments, *(f"{name}=" for name in fields)])
        raise UserError(
            f"{what}: it is called with ({given}), and takes ({', '.join(signature.parameters)})"
        ) from None


@contextlib.contextmanager
def explain_errors(what: str, arguments: str) -> Iterator[None]:
    """Adds to an error of the user's function what it was called with; its traceback says where."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"{what} is called with {arguments}, while JAX traces it")
        raise


def check_like(what: str, found: Any, expected: Array) -> Array:
    """`found`. Raises `UserError` if its shape or dtype is not that of `expected`."""
    same = is_array(found) and jnp.shape(found) == jnp.shape(expected)
    if not same or _dtype(found) != _dtype(expected):
        raise UserError(f"{what}: expected {describe(expected)}, came {describe(found)}")
    return jnp.asarray(found)


def restack(named: PyTree, stacked: PyTree) -> PyTree:
    """The inverse of `tree.unstack_blocks`: the leaves of `named` in the form of `stacked`."""
    flat = pytree.flatten(named)

    def one(path: str, leaf: Array) -> Array:
        parts = [flat[name] for name in pytree.expand_stack(path)]
        return parts[0] if len(parts) == 1 else jnp.stack(parts).reshape(leaf.shape)

    leaves = [one(path, leaf) for path, leaf in pytree.flatten(stacked).items()]
    return jax.tree.unflatten(jax.tree.structure(stacked), leaves)


def check_tree_like(what: str, found: Any, expected: PyTree) -> PyTree:
    """`found`, of the structure of `expected`. Raises `UserError` if it has other leaves."""
    leaves, flat = pytree.flatten(found), pytree.flatten(expected)
    if differing := sorted(leaves.keys() ^ flat.keys()):
        verb = "lacks" if differing[0] in flat else "has also"
        raise UserError(
            f"{what}: expected the tree that it was given; what came {verb} {differing[0]!r}"
        )
    found = [check_like(f"{what}: {path}", leaves[path], leaf) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(expected), found)
