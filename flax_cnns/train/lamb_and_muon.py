"""LAMB's trust ratio and Muon, for each block of a stack by itself."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import optax

from flax_cnns import tree as pytree
from flax_cnns.types import Array, PyTree


def scale_by_trust_ratio() -> optax.GradientTransformation:
    """LAMB's trust ratio, for each leaf; in a stack, for each block's leaf."""
    scale = optax.scale_by_trust_ratio()

    def scale_leaf(path: tuple, update: Array, weight: Array) -> Array:
        ratio = lambda u, w: scale.update(u, optax.EmptyState(), w)[0]  # noqa: E731
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return (jax.vmap(ratio) if len(pytree.expand_stack(name)) > 1 else ratio)(update, weight)

    return optax.stateless(partial(jax.tree_util.tree_map_with_path, scale_leaf))


class MuonState(NamedTuple):
    """The state of muon: of Optax's Muon for convolution kernels, and of sgd for the rest."""

    kernels: PyTree
    rest: PyTree


def make_muon(
    momentum: float, nesterov: bool, sgd: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) by `optax.contrib` for
    convolution kernels, as matrices [k*k*C, F]; `sgd` for all other leaves.

    As in Optax, the update of a kernel is scaled by sqrt(max(1, F / (k*k*C))).
    """

    def dimensions(params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: optax.contrib.MuonDimensionNumbers(
                tuple(range(leaf.ndim - 4, leaf.ndim - 1)), leaf.ndim - 1
            ),
            params,
        )

    muon = optax.contrib.scale_by_muon(
        beta=momentum, nesterov=nesterov, weight_dimension_numbers=dimensions
    )

    def is_kernel(path: tuple, leaf: Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stacked = len(pytree.expand_stack(name)) > 1
        return leaf.ndim - stacked == 4

    def split(tree: PyTree) -> tuple[PyTree, PyTree]:
        return pytree.partition(tree, jax.tree_util.tree_map_with_path(is_kernel, tree))

    def scale(update: Array) -> Array:
        fan_in, fan_out = math.prod(update.shape[-4:-1]), update.shape[-1]
        return update * max(1, fan_out / fan_in) ** 0.5

    def init(params: PyTree) -> MuonState:
        kernels, rest = split(params)
        return MuonState(muon.init(kernels), sgd.init(rest))

    def update(updates: PyTree, state: MuonState, params: PyTree = None):
        del params
        kernels, rest = split(updates)
        kernels, first = muon.update(kernels, state.kernels)
        rest, second = sgd.update(rest, state.rest)
        return pytree.merge(jax.tree.map(scale, kernels), rest), MuonState(first, second)

    return optax.GradientTransformation(init, update)
