"""Regularizers as hooks of the training step, and checks of the hooks that a user wrote.

A user's regularizer is any object that has some of the hooks as methods; `make_regularizer` turns
the object into a `Regularizer`. Its hooks get `params` with every block under its own name, also if
the network scans.
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
    """What one does in a step, by any of these hooks. `params` are the trainable leaves, n is the
    number of examples on a device, and whatever is the same on all devices stays so."""

    # (images f32 [n H W C], keys [n]) -> images: behind the built-in augmentation; an image's key
    # does not depend on the number of devices
    augment: Callable[[Array, Array], Array] | None = None
    # (images f32 [n H W C], labels f32 [n K], key) -> (images, labels): behind the built-in mixing;
    # the key is the same on every device
    mix: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None
    # (next_function, args, kwargs, context) -> what the method returns: flax's interceptor of the
    # network's methods, in training alone
    intercept: Callable[[Callable, tuple, dict, Any], Any] | None = None
    # (params, step) -> what is added to the loss f32 []; logged as train/NAME, and no part of
    # train/loss
    penalty: Callable[[PyTree, Array], Array] | None = None
    # (gradients, params, key, step) -> gradients: after clipping, before the optimizer's momentum;
    # the key is that of the step, the same on every device
    gradients: Callable[[PyTree, PyTree, Array, Array], PyTree] | None = None
    # (params, gradients) -> the point whose gradient the update takes: a second one in each step
    perturb: Callable[[PyTree, PyTree], PyTree] | None = None
    # (params) -> params: after each update
    constrain: Callable[[PyTree], PyTree] | None = None


# What each hook is called with.
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
    """The hooks that an object has as methods, as the regularizer `name`.

    Its keys are folded with the name, so that another regularizer changes none of its draws, and
    what it returns is checked as a step is traced. Raises `UserError` for an object without a hook,
    a method whose name is nearly that of a hook that it lacks, and one that takes other arguments.
    """
    what = f"regularizer {name!r}"
    if isinstance(given, type):
        raise UserError(f"{what}: {given.__name__} is a class; give an object of it")
    hooks = {hook: getattr(given, hook, None) for hook in HOOKS}
    hooks = {hook: method for hook, method in hooks.items() if method is not None}
    for other in dir(given):
        if other.startswith("_") or other in HOOKS or not _is_method(given, other):
            continue
        if near := difflib.get_close_matches(other, HOOKS.keys() - hooks, n=1, cutoff=0.75):
            raise UserError(
                f"{what}: {other!r} is no hook; did you mean {near[0]!r}? The name of a method that"
                " is something else begins with _"
            )
    if not hooks:
        raise UserError(
            f"{what}: {checks.describe(given)} has no hook; expected some of the methods"
            f" {', '.join(HOOKS)}"
        )
    for hook, method in hooks.items():
        checks.check_arguments(f"{what}, {hook}", method, HOOKS[hook])
    return Regularizer(**{hook: _CHECKED[hook](what, name, m) for hook, m in hooks.items()})


def _is_method(given: Any, name: str) -> bool:
    found = inspect.getattr_static(given, name)  # a property is not computed
    return callable(found) or isinstance(found, staticmethod | classmethod)


def _own_key(key: Array, name: str) -> Array:
    """Of the regularizer `name`, from that of a stream; or [n] keys from [n]."""
    fold = partial(jax.random.fold_in, data=np.uint32(zlib.crc32(name.encode())))
    return jax.vmap(fold)(key) if key.ndim else fold(key)


def _checked_augment(what: str, name: str, method: Callable) -> Callable:
    def augment(images: Array, keys: Array) -> Array:
        return checks.check_like(f"{what}, augment", method(images, _own_key(keys, name)), images)

    return augment


def _checked_mix(what: str, name: str, method: Callable) -> Callable:
    def mix(images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
        found = method(images, labels, _own_key(key, name))
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise UserError(
                f"{what}, mix: expected (images, labels), came {checks.describe(found)}"
            )
        new_images = checks.check_like(f"{what}, mix: images", found[0], images)
        return new_images, checks.check_like(f"{what}, mix: labels", found[1], labels)

    return mix


def _checked_intercept(what: str, name: str, method: Callable) -> Callable:
    # A module may run as another one with the same scope: its method is intercepted once.
    inside: list[tuple] = []

    def intercept(function: Callable, args: tuple, kwargs: dict, at: Any) -> Any:
        place = at.module.path, at.method_name
        if place in inside:
            return function(*args, **kwargs)
        inside.append(place)
        try:
            return method(function, args, kwargs, at)
        finally:
            inside.pop()

    return intercept


def _checked_penalty(what: str, name: str, method: Callable) -> Callable:
    def penalty(params: PyTree, step: Array) -> Array:
        found = method(pytree.unstack_blocks(params), step)
        if not checks.is_float_array(found, ()):
            raise UserError(
                f"{what}, penalty: expected one number, float32 [], came {checks.describe(found)}"
            )
        return jnp.asarray(found, jnp.float32)

    return penalty


def _checked_tree(hook: str, what: str, name: str, method: Callable) -> Callable:
    def change(*given: Any) -> PyTree:
        trees, rest = given, ()
        if hook == "gradients":
            *trees, key, step = given
            rest = _own_key(key, name), step
        named = [pytree.unstack_blocks(tree) for tree in trees]
        found = checks.check_tree_like(f"{what}, {hook}", method(*named, *rest), named[0])
        return checks.restack(found, given[0])

    return change


_CHECKED: dict[str, Callable[[str, str, Callable], Callable]] = {
    "augment": _checked_augment,
    "mix": _checked_mix,
    "intercept": _checked_intercept,
    "penalty": _checked_penalty,
    **{hook: partial(_checked_tree, hook) for hook in ("gradients", "perturb", "constrain")},
}
