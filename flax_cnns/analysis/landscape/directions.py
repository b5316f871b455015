"""Directions in the space of parameters: random and filter-normalized, or of a run's path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree


def random_direction(params: PyTree, key: Array) -> PyTree:
    """Returns a random normal direction in which each filter has the norm of the weights' filter.

    Li et al. 2018, arXiv 1712.09913, section 4: d *= |w| / |d|. A filter is one output of a kernel:
    the last axis of Flax's kernels, also of dense layers. The direction is 0 for biases, scales and
    other parameters with fewer than two axes. Stacked blocks (`tree.stack_blocks`) get the
    direction that they have one by one. Equal keys give equal directions.
    """
    named = pytree.unstack_blocks(params)
    leaves = {}
    for number, (path, leaf) in enumerate(sorted(pytree.flatten(named).items())):
        drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
        leaves[path] = jnp.zeros_like(leaf) if leaf.ndim < 2 else _scale_filters(drawn, leaf)
    direction = pytree.unflatten(leaves)
    stacked = pytree.flatten(named).keys() != pytree.flatten(params).keys()
    return pytree.stack_blocks(direction) if stacked else direction


def _scale_filters(drawn: Array, weights: Array) -> Array:
    axes = tuple(range(weights.ndim - 1))
    norm = lambda a: jnp.sqrt(jnp.sum(a**2, axis=axes, keepdims=True))  # noqa: E731
    return drawn * norm(weights) / (norm(drawn) + 1e-10)


class Trajectory(NamedTuple):
    """The plane that holds most of a run's path, and the path in it."""

    directions: tuple[PyTree, PyTree]  # orthonormal
    points: np.ndarray  # f64 [steps 2]; the last is 0, 0
    explained: np.ndarray  # f64 [2]: share of the variance of the path


def fit_trajectory(checkpoints: Sequence[PyTree]) -> Trajectory:
    """Returns the first two principal components of params_i - params_last (Li et al. 2018, section
    7). Raises `UserError` for fewer than three checkpoints, and for checkpoints on a line."""
    if len(checkpoints) < 3:
        raise UserError(f"a trajectory needs at least 3 checkpoints, got {len(checkpoints)}")
    # Leaf by leaf: only small matrices, of as many rows as there are checkpoints, hold sums.
    steps = jax.tree.map(_differences, checkpoints[-1], *checkpoints)
    centered = [leaf - leaf.mean(0) for leaf in jax.tree.leaves(steps)]
    gram = sum(leaf @ leaf.T for leaf in centered)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if values[1] <= 1e-12 * values[0]:
        raise UserError("the checkpoints lie on a line: there is no plane; take evaluate_line")
    weights = (vectors / np.sqrt(values)).T  # [2 checkpoints]
    axes = [weights @ leaf for leaf in centered]
    points = sum(step @ axis.T for step, axis in zip(jax.tree.leaves(steps), axes))
    return Trajectory(
        (_restore(axes, 0, checkpoints[-1]), _restore(axes, 1, checkpoints[-1])),
        points,
        values / np.trace(gram),
    )


def _differences(last: Array, *leaves: Array) -> np.ndarray:
    """f64 [checkpoints, size of the leaf]: each minus the last."""
    return np.stack([np.ravel(leaf).astype(np.float64) - np.ravel(last) for leaf in leaves])


def _restore(axes: Sequence[np.ndarray], number: int, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    parts = [axis[number].reshape(leaf.shape) for axis, leaf in zip(axes, leaves)]
    return jax.tree.unflatten(
        structure, [jnp.asarray(part, leaf.dtype) for part, leaf in zip(parts, leaves)]
    )
