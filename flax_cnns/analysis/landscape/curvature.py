"""Curvature of the loss at trained parameters: top Hessian eigenvalues, SAM's sharpness."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_cnns import tree as pytree
from flax_cnns.analysis.landscape.objective import Loss, Variables
from flax_cnns.types import Array, PyTree


class Eigenpair(NamedTuple):
    """An eigenvalue of the Hessian and its eigenvector."""

    value: float
    vector: PyTree  # of norm 1, like the parameters
    steps: int  # of the power iteration


def find_top_eigenvalues(
    loss: Loss | Any,
    variables: Variables,
    count: int = 1,
    *,
    key: Array,
    tolerance: float = 1e-3,
    most: int = 100,
    say: Callable[[str], None] = lambda line: None,
) -> list[Eigenpair]:
    """Returns the eigenvalues of the Hessian that are largest in absolute value, by power iteration
    with deflation.

    Each iteration ends when the value changes by less than `tolerance`, relatively, or after `most`
    steps. `loss` is a `Loss`, or has its method `hessian_times`. `say` gets a line for each
    eigenvalue, and one for every tenth step.
    """
    found: list[Eigenpair] = []
    for number in range(count):
        drawn = {
            path: jax.random.normal(jax.random.fold_in(key, number * 10_000 + i), leaf.shape)
            for i, (path, leaf) in enumerate(pytree.flatten(variables["params"]).items())
        }
        vector, value = _normalize(pytree.unflatten(drawn)), 0.0
        for steps in range(1, most + 1):
            for pair in found:
                overlap = _dot(vector, pair.vector)
                vector = jax.tree.map(lambda v, u, c=overlap: v - c * u, vector, pair.vector)
            vector = _normalize(vector)
            product = loss.hessian_times(variables, vector)
            value, last = float(_dot(vector, product)), value
            if abs(value - last) <= tolerance * max(abs(value), 1e-12) or steps == most:
                break
            if steps % 10 == 0:
                say(f"eigenvalue {number + 1}/{count}: {value:.4g} after {steps} steps")
            vector = product
        # `value` belongs to `vector`, not to `product`; `vector` is orthogonal to those before.
        found.append(Eigenpair(value, vector, steps))
        say(f"eigenvalue {number + 1}/{count}: {value:.4g}, found in {steps} steps")
    return found


def measure_sharpness(loss: Loss, variables: Variables, rho: float = 0.05) -> float:
    """Returns L(w + rho g / |g|) - L(w), where g is the gradient at w.

    This is SAM's sharpness, with its maximum found to first order (Foret et al. 2021, arXiv
    2010.01412, section 2 and equation 2). `rho` is a distance in the space of parameters.
    """
    climb = _normalize(loss.gradient(variables))
    moved = jax.tree.map(lambda w, g: w + rho * g, variables["params"], climb)
    return loss({**variables, "params": moved}) - loss(variables)


def _pairs(tree: PyTree, other: PyTree) -> Iterable[tuple[Any, Any]]:
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other))


def measure_norm(tree: PyTree) -> float:
    """Returns the Euclidean norm of all leaves together."""
    return float(jnp.sqrt(_dot(tree, tree)))


def _dot(tree: PyTree, other: PyTree) -> Array:
    return sum((jnp.sum(a * b) for a, b in _pairs(tree, other)), jnp.float32(0))


def _normalize(tree: PyTree) -> PyTree:
    norm = jnp.sqrt(_dot(tree, tree)) + 1e-12
    return jax.tree.map(lambda leaf: leaf / norm, tree)
