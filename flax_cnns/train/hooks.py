"""Regularizers as hooks of the training step, and checks of the hooks that a user wrote.

A user's regularizer is any object that has some of the hooks as methods; `make_regularizer` turns
the object into a `Regularizer`. Its hooks get `params` with every block under its own name, even if
the network scans its blocks.
"""

from __future__ import annotations

import difflib
import inspect
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.train import checks
from flax_cnns.types import Array, PyTree


class Regularizer(NamedTuple):
    """The hooks by which a regularizer acts in a training step; a hook may be None.

    `params` are the trainable leaves and n is the number of examples on a device. Values that
    are equal on all devices must remain equal.
    """

    # (images f32 [n H W C], keys [n]) -> images: after the built-in augmentation; the key of an
    # image does not depend on the number of devices
    augment: Callable[[Array, Array], Array] | None = None
    # (images f32 [n H W C], labels f32 [n K], key) -> (images, labels): after the built-in mixing;
    # the key is the same on every device
    mix: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None
    # (next_function, args, kwargs, context) -> result of the method: a flax interceptor of the
    # network's methods, active only in training
    intercept: Callable[[Callable, tuple, dict, Any], Any] | None = None
    # (params, step) -> f32 []: added to the loss that is minimized; logged as train/NAME and not
    # included in train/loss
    penalty: Callable[[PyTree, Array], Array] | None = None
    # (gradients, params, key, step) -> gradients: after clipping, before the optimizer's momentum;
    # the key differs in each step and is the same on every device
    gradients: Callable[[PyTree, PyTree, Array, Array], PyTree] | None = None
    # (params, gradients) -> params at which the gradient of the update is computed; costs a second
    # gradient in each step
    perturb: Callable[[PyTree, PyTree], PyTree] | None = None
    # (params) -> params: after each update
    constrain: Callable[[PyTree], PyTree] | None = None


# The arguments of each hook.
HOOKS: dict[str, tuple[str, ...]] = {
    "augment": ("images", "keys"),
    "mix": ("images", "labels", "key"),
    "intercept": ("next_function", "args", "kwargs", "context"),
    "penalty": ("params", "step"),
    "gradients": ("gradients", "params", "key", "step"),
    "perturb": ("params", "gradients"),
    "constrain": ("params",),
}


def make_regularizer(name: str, given: Any) -> Regularizer:
    """Makes the regularizer `name` from the object `given`, whose methods are hooks.

    The hooks' keys are folded with `name`, so that the random draws of a regularizer do not depend
    on other regularizers. The hooks' results are checked while a step is traced.

    Raises `UserError` if the object has no hook, if another method's name resembles that of a
    missing hook, or if a hook takes other arguments.
    """
    what = f"regularizer {name!r}"
    if isinstance(given, type):
        raise UserError(f"{what}: {given.__name__} is a class; give an instance of it")
    hooks: dict[str, Any] = {
        hook: method for hook in HOOKS if (method := getattr(given, hook, None)) is not None
    }
    for other in dir(given):
        if other.startswith("_") or other in HOOKS or not _is_method(given, other):
            continue
        if near := difflib.get_close_matches(other, HOOKS.keys() - hooks, n=1, cutoff=0.75):
            raise UserError(
                f"{what}: {other!r} is not a hook; did you mean {near[0]!r}? Start the names of"
                " other methods with _"
            )
    if not hooks:
        raise UserError(
            f"{what}: {checks.describe(given)} has no hook; expected at least one of the methods"
            f" {', '.join(HOOKS)}"
        )
    for hook, method in hooks.items():
        checks.check_arguments(f"{what}, {hook}", method, HOOKS[hook])
    return Regularizer(**{hook: _CHECKED[hook](what, name, m) for hook, m in hooks.items()})


def _is_method(given: Any, name: str) -> bool:
    member = inspect.getattr_static(given, name)  # does not evaluate properties
    return callable(member) or isinstance(member, staticmethod | classmethod)


def _own_key(key: Array, name: str) -> Array:
    """Folds the key, or the [n] keys, of a stream with the name of a regularizer."""
    fold = partial(jax.random.fold_in, data=np.uint32(zlib.crc32(name.encode())))
    return jax.vmap(fold)(key) if key.ndim else fold(key)


def _checked_augment(what: str, name: str, method: Callable) -> Callable:
    def augment(images: Array, keys: Array) -> Array:
        return checks.check_like(f"{what}, augment", method(images, _own_key(keys, name)), images)

    return augment


def _checked_mix(what: str, name: str, method: Callable) -> Callable:
    def mix(images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
        mixed = method(images, labels, _own_key(key, name))
        if not isinstance(mixed, (tuple, list)) or len(mixed) != 2:
            raise UserError(f"{what}, mix: expected (images, labels), got {checks.describe(mixed)}")
        new_images = checks.check_like(f"{what}, mix: images", mixed[0], images)
        return new_images, checks.check_like(f"{what}, mix: labels", mixed[1], labels)

    return mix


def _checked_intercept(what: str, name: str, method: Callable) -> Callable:
    # A module may delegate to another one with the same scope: the method is intercepted once.
    inside: list[tuple] = []

    def intercept(function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        place = context.module.path, context.method_name
        if place in inside:
            return function(*args, **kwargs)
        inside.append(place)
        try:
            return method(function, args, kwargs, context)
        finally:
            inside.pop()

    return intercept


def _checked_penalty(what: str, name: str, method: Callable) -> Callable:
    def penalty(params: PyTree, step: Array) -> Array:
        value = method(pytree.unstack_blocks(params), step)
        if not checks.is_float_array(value, ()):
            raise UserError(
                f"{what}, penalty: expected one number, float32 [], got {checks.describe(value)}"
            )
        return jnp.asarray(value, jnp.float32)

    return penalty


def _checked_tree(hook: str, what: str, name: str, method: Callable) -> Callable:
    def change(*given: Any) -> PyTree:
        trees: tuple[PyTree, ...] = given
        rest: tuple[Array, ...] = ()
        if hook == "gradients":
            *gradients_and_params, key, step = given
            trees, rest = tuple(gradients_and_params), (_own_key(key, name), step)
        named = [pytree.unstack_blocks(tree) for tree in trees]
        result = checks.check_tree_like(f"{what}, {hook}", method(*named, *rest), named[0])
        return checks.restack(result, given[0])

    return change


_CHECKED: dict[str, Callable[[str, str, Callable], Callable]] = {
    "augment": _checked_augment,
    "mix": _checked_mix,
    "intercept": _checked_intercept,
    "penalty": _checked_penalty,
    **{hook: partial(_checked_tree, hook) for hook in ("gradients", "perturb", "constrain")},
}
