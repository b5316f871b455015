"""Functions of a network that are traced once for each network and shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError

from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree

_Result = TypeVar("_Result")


class _Held:
    """A network as a key: equal networks are equal keys. A network that cannot be hashed, such as
    one with a list as a field, is equal to itself alone."""

    def __init__(self, model: nn.Module):
        self.model = model
        try:
            self.hash, self.by_value = hash(model), True
        except TypeError:
            self.hash, self.by_value = id(model), False

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held):
            return NotImplemented
        if self.model is other.model:
            return True
        return self.by_value and other.by_value and self.model == other.model


def jit(*static: str) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Decorates a function whose first argument, `model`, is a network.

    It is `jax.jit`, to which the network and the arguments named in `static` are static. Fields of
    the network need not be hashable.
    """

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        @functools.wraps(function)
        def inner(model: _Held, *args: Any, **kwargs: Any) -> _Result:
            return function(model.model, *args, **kwargs)

        compiled = jax.jit(inner, static_argnames=("model", *static))

        @functools.wraps(function)
        def call(model: nn.Module, *args: Any, **kwargs: Any) -> _Result:
            return compiled(_Held(model), *args, **kwargs)

        return call

    return decorate


def once_per_shape(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Decorates a function of (network, variables, images) that needs shapes only. It is called
    with `jax.ShapeDtypeStruct`s, and once for each network and shape. Images of another size or of
    other channels than the network takes raise `UserError`."""

    @functools.lru_cache(maxsize=128)
    def compute(held: _Held, structure: Any, leaves: tuple) -> _Result:
        shapes = [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]
        variables, images = jax.tree.unflatten(structure, shapes)
        try:
            return function(held.model, variables, images)
        except ScopeParamShapeError as error:
            reason = str(error).partition(" (https")[0]
            raise UserError(
                f"{type(held.model).__name__} cannot take images {list(images.shape)}: {reason}"
            ) from None

    @functools.wraps(function)
    def call(model: nn.Module, variables: PyTree, images: Array | jax.ShapeDtypeStruct) -> _Result:
        leaves, structure = jax.tree.flatten((variables, images))
        return compute(_Held(model), structure, tuple(map(_get_form, leaves)))

    return call


def _get_form(leaf: Any) -> tuple:
    return jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


@once_per_shape
def get_logits_shape(model: nn.Module, variables: PyTree, images: Any) -> tuple[int, ...]:
    """Returns the shape of the network's output."""
    forward = functools.partial(model.apply, train=False)
    return jax.eval_shape(forward, variables, images).shape
