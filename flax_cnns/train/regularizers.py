"""Regularizers of weights and gradients: L2 in the loss, max-norm, gradient noise, SAM.

A user's regularizers use the same hooks. A built-in regularizer is a function with a row in
`REGULARIZERS`. Its arguments are the section `config.optimizer`, the parameters, and a bool for
each parameter: whether it learns. It returns its hooks (`Regularizer`), or None if its field is
off. Regularizers act on the trainable leaves only. A stack of blocks is treated like its separate
blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.train import metrics
from flax_cnns.train.hooks import Regularizer
from flax_cnns.train.hooks import make_regularizer as make_regularizer
from flax_cnns.types import Array, PyTree


def l2(config: Any, params: PyTree, trainable: PyTree) -> Regularizer | None:
    """Adds a / 2 ||w||^2 of each leaf to the loss, and so a w to the gradient.

    `config.l2` sets the coefficients a. If the blocks of a stack have different coefficients, a is
    an array along the stack's axis.
    """
    coefficients = pytree.expand_per_parameter(config.l2, params, what="optimizer.l2", default=0.0)
    coefficients, _ = pytree.partition(coefficients, trainable)
    if not any(np.any(a) for a in jax.tree.leaves(coefficients)):
        return None

    def penalty(weights: PyTree, step: Array) -> Array:
        del step

        def half_square(w: Array, a: Any) -> Array | float:
            return 0.5 * jnp.sum(jnp.asarray(a, w.dtype) * jnp.square(w)) if np.any(a) else 0.0

        # One coefficient is not 0, so the sum is an array.
        return cast(Array, sum(jax.tree.leaves(jax.tree.map(half_square, weights, coefficients))))

    return Regularizer(penalty=penalty)


def max_norm(config: Any, params: PyTree, trainable: PyTree) -> Regularizer | None:
    """Rescales the incoming weights of each unit whose Euclidean norm exceeds its limit.

    Srivastava et al. 2014, section 5.1, "max-norm regularization". A unit is one output: a filter
    of a convolution, or a column of a dense layer.

    `config.max_norm` applies to kernels [... out] only, not to biases, norm layers or tokens; 0: no
    limit.
    """
    kernels = {p: leaf for p, leaf in pytree.flatten(params).items() if p.endswith("kernel")}
    limits = pytree.expand_per_parameter(
        config.max_norm, pytree.unflatten(kernels), what="optimizer.max_norm", default=0.0
    )
    learns = pytree.flatten(trainable)
    limits = {p: v for p, v in pytree.flatten(limits).items() if learns[p] and np.any(v)}
    if not limits:
        return None

    def constrain(weights: PyTree) -> PyTree:
        flat = pytree.flatten(weights)
        for path, limit in limits.items():
            w = flat[path]
            incoming = tuple(range(len(pytree.expand_stack(path)) > 1, w.ndim - 1))
            norm = jnp.sqrt(jnp.sum(jnp.square(w), axis=incoming, keepdims=True))
            limit = jnp.asarray(np.where(limit, limit, np.inf), w.dtype)
            flat[path] = w * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
        return pytree.unflatten(flat)

    return Regularizer(constrain=constrain)


def gradient_noise(config: Any, params: PyTree, trainable: PyTree) -> Regularizer | None:
    """Adds normal noise of variance eta / (1 + t)^decay to the gradient of step t, counted from 0
    (Neelakantan et al. 2015, https://arxiv.org/abs/1511.06807, equation 1).

    `config.grad_noise` is eta, and `config.grad_noise_decay` is the decay.
    """
    del params, trainable
    eta, decay = config.grad_noise, config.grad_noise_decay
    return Regularizer(gradients=partial(add_noise, eta=eta, decay=decay)) if eta else None


def add_noise(
    grads: PyTree, weights: PyTree, key: Array, step: Array, *, eta: float, decay: float
) -> PyTree:
    """Returns `grads` plus the noise of a step."""
    del weights
    flat = pytree.flatten(grads)
    sizes: dict[str, int] = {}
    for path, leaf in flat.items():
        blocks = pytree.expand_stack(path)
        sizes |= dict.fromkeys(blocks, leaf.size // len(blocks))
    # One draw for all leaves, in the order of their names: XLA compiles a single generator, and the
    # noise does not depend on whether the network scans its blocks.
    names = sorted(sizes)
    draw = jax.random.normal(key, (sum(sizes.values()),))
    ends = np.cumsum([sizes[name] for name in names])[:-1]
    drawn = dict(zip(names, jnp.split(draw, ends)))
    deviation = jnp.sqrt(eta / (1.0 + step) ** decay)
    for path, leaf in flat.items():
        noise = jnp.stack([drawn[name] for name in pytree.expand_stack(path)])
        flat[path] = leaf + (deviation * noise).reshape(leaf.shape).astype(leaf.dtype)
    return pytree.unflatten(flat)


def sam(config: Any, params: PyTree, trainable: PyTree) -> Regularizer | None:
    """Takes the gradient of the update at a point uphill from the weights, `config.sam` away.

    The point (`ascend`) follows the gradient of the whole global batch. In the paper each device
    follows its own gradient, which makes the result depend on the number of devices. The gradient
    at the point is computed on the same images with the same random keys. L2 and weight decay are
    computed at the weights, not at the point (equation 1).
    """
    del params, trainable
    return Regularizer(perturb=partial(ascend, rho=config.sam)) if config.sam else None


def ascend(weights: PyTree, grads: PyTree, rho: float) -> PyTree:
    """Returns the point at distance `rho` with the highest loss to first order, w + rho g / ||g||.

    SAM: Foret et al. 2021, https://arxiv.org/abs/2010.01412, equation 2 with p = 2.
    """
    scale = rho / jnp.maximum(optax.global_norm(grads), 1e-12)
    return jax.tree.map(lambda w, g: w + (scale * g).astype(w.dtype), weights, grads)


# The name is the field of `config.optimizer` that turns the regularizer on. Regularizers with the
# same hook act in this order.
REGULARIZERS: dict[str, Callable[[Any, PyTree, PyTree], Regularizer | None]] = {
    "l2": l2,
    "max_norm": max_norm,
    "grad_noise": gradient_noise,
    "sam": sam,
}


# ---- stages of a step, given the active regularizers {name: Regularizer}


def make_built_in_regularizers(
    config: Any, params: PyTree, trainable: PyTree
) -> dict[str, Regularizer]:
    """Makes the regularizers that `config`, the section `config.optimizer`, turns on, by name.

    Raises `UserError` if a rule decides nothing.
    """
    made = {name: make(config, params, trainable) for name, make in REGULARIZERS.items()}
    return {name: regularizer for name, regularizer in made.items() if regularizer is not None}


def check_names(regularizers: Mapping[str, Regularizer]) -> None:
    """Raises `UserError` if one of a user's regularizers has a name that is taken."""
    for name in regularizers:
        if name in REGULARIZERS or name in metrics.SUM_NAMES or name in metrics.RESERVED_NAMES:
            raise UserError(
                f"regularizer {name!r}: the name is taken: its penalty would be logged as"
                f" train/{name}, which exists; choose another name"
            )


def augment(regularizers: Mapping[str, Regularizer], images: Array, keys: Array) -> Array:
    """Applies all `augment` hooks: images [n H W C], keys [n] -> images."""
    for regularizer in regularizers.values():
        if regularizer.augment is not None:
            images = regularizer.augment(images, keys)
    return images


def mix(
    regularizers: Mapping[str, Regularizer], images: Array, labels: Array, key: Array
) -> tuple[Array, Array]:
    """Applies all `mix` hooks: images [n H W C], labels [n K] -> (images, labels)."""
    for regularizer in regularizers.values():
        if regularizer.mix is not None:
            images, labels = regularizer.mix(images, labels, key)
    return images, labels


@contextlib.contextmanager
def intercept(regularizers: Mapping[str, Regularizer]) -> Iterator[None]:
    """A context in which all `intercept` hooks intercept the methods of the network."""
    with contextlib.ExitStack() as stack:
        for regularizer in regularizers.values():
            if regularizer.intercept is not None:
                stack.enter_context(nn.intercept_methods(regularizer.intercept))
        yield


def list_penalties(regularizers: Mapping[str, Regularizer]) -> list[str]:
    """Returns the names of the regularizers that have a penalty."""
    return [name for name, reg in regularizers.items() if reg.penalty is not None]


def add_penalties(
    regularizers: Mapping[str, Regularizer], weights: PyTree, grads: PyTree, step: Array
) -> tuple[PyTree, dict[str, Array]]:
    """Returns (`grads` plus the gradients of all penalties, {name: value of the penalty})."""
    values = {}
    for name, regularizer in regularizers.items():
        if regularizer.penalty is not None:
            values[name], penalty_grads = jax.value_and_grad(regularizer.penalty)(weights, step)
            grads = jax.tree.map(jnp.add, grads, penalty_grads)
    return grads, values


def perturbs(regularizers: Mapping[str, Regularizer]) -> bool:
    """Whether a step takes the gradient of its update at a point other than the weights."""
    return any(regularizer.perturb is not None for regularizer in regularizers.values())


def perturb(regularizers: Mapping[str, Regularizer], weights: PyTree, grads: PyTree) -> PyTree:
    """Returns the point for the gradient of the update; `grads` are those at the weights."""
    for regularizer in regularizers.values():
        if regularizer.perturb is not None:
            weights = regularizer.perturb(weights, grads)
    return weights


def make_transformations(
    regularizers: Mapping[str, Regularizer],
) -> list[optax.GradientTransformationExtraArgs]:
    """Makes an optax transformation of each `gradients` hook; its update takes `step` and `key`."""

    def transformation(change: Callable) -> optax.GradientTransformationExtraArgs:
        def update(
            updates: PyTree,
            state: Any,
            params: PyTree = None,
            *,
            step: Array,
            key: Array,
            **_: Any,
        ) -> tuple[PyTree, Any]:
            return change(updates, params, key, step), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    changes = (regularizer.gradients for regularizer in regularizers.values())
    return [transformation(change) for change in changes if change is not None]


def constrain(regularizers: Mapping[str, Regularizer], weights: PyTree) -> PyTree:
    """Applies all `constrain` hooks to `weights`."""
    for regularizer in regularizers.values():
        if regularizer.constrain is not None:
            weights = regularizer.constrain(weights)
    return weights
