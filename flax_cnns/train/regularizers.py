"""What keeps weights small or minima flat: L2 in the loss, max-norm, gradient noise, SAM.

All are over the trainable leaves alone, and a stack of blocks is treated as its blocks would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns import tree as pytree
from flax_cnns.types import Array, PyTree


def l2(coefficients: PyTree) -> Callable[[PyTree], Array]:
    """`penalty(weights)`: the sum over all leaves of a / 2 ||w||^2, whose gradient is a w.

    `coefficients` are the a, a tree like the weights (an array along a stack whose blocks differ).
    """

    def penalty(weights: PyTree) -> Array:
        def one(w: Array, a: Any) -> Array:
            return 0.5 * jnp.sum(jnp.asarray(a, w.dtype) * jnp.square(w)) if np.any(a) else 0.0

        return sum(jax.tree.leaves(jax.tree.map(one, weights, coefficients)))

    return penalty


def max_norm(limits: Mapping[str, Any]) -> Callable[[PyTree], PyTree]:
    """`constrain(weights)`: each unit whose incoming weights have a Euclidean norm above its limit
    gets them scaled back to it (Srivastava et al. 2014, section 5.1, "max-norm regularization").

    `limits` are of kernels [... out] by path; 0 is none. A unit is one of the outputs: a filter in
    a convolution, a column in a dense layer.
    """

    def constrain(weights: PyTree) -> PyTree:
        flat = pytree.flatten(weights)
        for path, limit in limits.items():
            w = flat[path]
            incoming = tuple(range(len(pytree.members(path)) > 1, w.ndim - 1))
            norm = jnp.sqrt(jnp.sum(jnp.square(w), axis=incoming, keepdims=True))
            limit = jnp.asarray(np.where(limit, limit, np.inf), w.dtype)
            flat[path] = w * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
        return pytree.unflatten(flat)

    return constrain


def gradient_noise(eta: float, decay: float) -> optax.GradientTransformationExtraArgs:
    """Adds normal noise of variance eta / (1 + t)^decay to the gradient of step t, counted from 0
    (Neelakantan et al. 2015, https://arxiv.org/abs/1511.06807, equation 1).

    `update(..., step=, key=)`: the key of that step, the same on every device.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None, *, step, key, **_):
        del params
        flat = pytree.flatten(updates)
        sizes = {}
        for path, leaf in flat.items():
            blocks = pytree.members(path)
            sizes |= dict.fromkeys(blocks, leaf.size // len(blocks))
        # One draw for all leaves, in the order of their names: XLA compiles one generator, and a
        # network that scans is given what its blocks would be given.
        names = sorted(sizes)
        draw = jax.random.normal(key, (sum(sizes.values()),))
        ends = np.cumsum([sizes[name] for name in names])[:-1]
        drawn = dict(zip(names, jnp.split(draw, ends)))
        deviation = jnp.sqrt(eta / (1.0 + step) ** decay)
        for path, leaf in flat.items():
            noise = jnp.stack([drawn[name] for name in pytree.members(path)])
            flat[path] = leaf + (deviation * noise).reshape(leaf.shape).astype(leaf.dtype)
        return pytree.unflatten(flat), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def ascend(weights: PyTree, grads: PyTree, rho: float) -> PyTree:
    """The point at distance `rho` where the loss is highest to first order: w + rho g / ||g||
    (SAM: Foret et al. 2021, https://arxiv.org/abs/2010.01412, equation 2 with p = 2)."""
    scale = rho / jnp.maximum(optax.global_norm(grads), 1e-12)
    return jax.tree.map(lambda w, g: w + (scale * g).astype(w.dtype), weights, grads)
