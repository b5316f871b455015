"""Branches under random gates, one in the forward and another in the backward pass.

Shake-Shake mixes two branches (Gastaldi 2017, https://arxiv.org/abs/1705.07485), ShakeDrop disturbs
one (Yamada et al. 2018, https://arxiv.org/abs/1802.02375). A network makes its gates' keys by
`make_shakes` or `make_shake_drops`, hands each block its own, and the block calls `shake_shake` or
`shake_drop`.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.checks import check_fields
from flax_cnns.layers.drop_path import drop_rates, make_key
from flax_cnns.layers.stage import split_by_stage
from flax_cnns.types import Array

FORWARDS = ("shake", "even")
BACKWARDS = ("shake", "even", "keep")
SHAKE_LEVELS = ("image", "batch")
SHAKE_DROP_LEVELS = ("batch", "image", "channel", "pixel")


@jax.custom_jvp
def gate(x: Array, forward: Array, backward: Array) -> Array:
    """`forward * x`, whose derivative in x is `backward`; both as x [N H W C], or ones for axes."""
    return forward.astype(x.dtype) * x


@gate.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, _, backward = primals
    return gate(*primals), backward.astype(x.dtype) * tangents[0]


def _shape(level: str, x: Array) -> tuple[int, ...]:
    """Of the gates on x: [N H W C], with 1 for each axis that shares one number."""
    n, h, w, c = x.shape
    shapes = {"batch": (1, 1, 1, 1), "image": (n, 1, 1, 1), "channel": (n, 1, 1, c)}
    return shapes.get(level, (n, h, w, c))


def _stream(level: str) -> str:
    """One number for the batch is one for all devices; what images have, each has for itself."""
    return "shared" if level == "batch" else "dropout"


def _known(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"unknown {field} {value!r}{did_you_mean(value, known)}")


# ---------------------------------------------------------------------------- Shake-Shake


@flax.struct.dataclass
class Shake:
    """How blocks mix their two branches; `key` has an axis of blocks until `Stage` takes one."""

    key: Array
    forward: str = flax.struct.field(pytree_node=False, default="shake")
    backward: str = flax.struct.field(pytree_node=False, default="shake")
    level: str = flax.struct.field(pytree_node=False, default="image")


def make_shakes(network: nn.Module, depths: Sequence[int], train: bool) -> list[Shake | None]:
    """A `Shake` for each stage of `depths` blocks, by the network's fields; None where each branch
    counts half: in evaluation, and with "even" both ways.

    The rows of the paper's table 1: `forward` draws alpha ("shake") or takes 0.5 ("even");
    `backward` draws beta, takes 0.5, or takes alpha again ("keep"); `level` is "image" (a number
    for each, out of the stream "dropout") or "batch" (one for all images of all devices, out of
    "shared").

    Raises `UserError` for unknown names, or a field or a stream that is missing.
    """
    check_fields(network, "make_shakes", "forward", "backward", "level")
    _known("forward", network.forward, FORWARDS)
    _known("backward", network.backward, BACKWARDS)
    _known("level", network.level, SHAKE_LEVELS)
    still = network.forward == "even" and network.backward != "shake"
    if still or not train or network.is_initializing():
        return [None] * len(depths)
    keys = jax.random.split(make_key(network, _stream(network.level)), sum(depths))
    all_blocks = Shake(keys, network.forward, network.backward, network.level)
    return split_by_stage(all_blocks, depths)


def shake_shake(x1: Array, x2: Array, shake: Shake | None) -> Array:
    """`alpha x1 + (1 - alpha) x2`, whose derivatives are beta and 1 - beta: [N H W C] of each.

    alpha and beta are uniform from 0 to 1, independent of each other, or as `shake` says; 0.5 both
    if it is None.
    """
    if shake is None:
        return 0.5 * (x1 + x2)
    alpha_key, beta_key = jax.random.split(shake.key)
    shape = _shape(shake.level, x1)
    alpha = beta = jnp.full(shape, 0.5)
    if shake.forward == "shake":
        alpha = jax.random.uniform(alpha_key, shape)
    if shake.backward == "shake":
        beta = jax.random.uniform(beta_key, shape)
    if shake.backward == "keep":
        beta = alpha
    return gate(x1, alpha, beta) + gate(x2, 1 - alpha, 1 - beta)


# ---------------------------------------------------------------------------- ShakeDrop


@flax.struct.dataclass
class ShakeDrop:
    """How blocks disturb their branch; `rate` and `keys` have an axis of blocks until `Stage` or
    `for_block` takes one of them."""

    rate: Array  # f32: of b = 0, disturbing
    keys: tuple[Array, Array] | None  # of b, of alpha and beta; None: evaluation
    alpha: tuple[float, float] = flax.struct.field(pytree_node=False, default=(-1.0, 1.0))
    beta: tuple[float, float] = flax.struct.field(pytree_node=False, default=(0.0, 1.0))
    level: str = flax.struct.field(pytree_node=False, default="image")


def make_shake_drops(
    network: nn.Module, depths: Sequence[int], train: bool
) -> list[ShakeDrop | None]:
    """A `ShakeDrop` for each stage of `depths` blocks, by the network's fields; None where off.

    `shake_drop` is the last block's rate 1 - p_L, and p_l = 1 - l/L (1 - p_L), l = 1 ... L.
    `shake_drop_alpha` and `shake_drop_beta` are the ranges that the gates are drawn from; (0, 0)
    for both is stochastic depth. `shake_drop_level` says what shares an alpha and a beta: the
    "batch", an "image", a "channel" of an image, a "pixel" of a channel. b is one for the batch on
    all devices, out of the stream "shared", as are the gates of the level "batch"; the others are
    out of "dropout".

    Raises `UserError` for an unknown level, senseless numbers, or a field or a stream that is
    missing.
    """
    fields = ("shake_drop", "shake_drop_alpha", "shake_drop_beta", "shake_drop_level")
    check_fields(network, "make_shake_drops", *fields)
    _known("shake_drop_level", network.shake_drop_level, SHAKE_DROP_LEVELS)
    ranges = dict(alpha=tuple(network.shake_drop_alpha), beta=tuple(network.shake_drop_beta))
    for name, given in ranges.items():
        if len(given) != 2 or given[0] > given[1]:
            raise UserError(f"shake_drop_{name} is a range (lowest, highest), got {given}")
    if not 0 <= network.shake_drop < 1:
        raise UserError(
            f"shake_drop is the last block's rate, 0 to below 1, got {network.shake_drop}"
        )
    if not network.shake_drop:
        return [None] * len(depths)
    keys, total = None, sum(depths)
    if train and not network.is_initializing():
        streams = ("shared", _stream(network.shake_drop_level))
        keys = tuple(jax.random.split(make_key(network, stream), total) for stream in streams)
    rates = jnp.asarray(drop_rates(network.shake_drop, total, "linear"))
    all_blocks = ShakeDrop(rates, keys, **ranges, level=network.shake_drop_level)
    return split_by_stage(all_blocks, depths)


def shake_drop(x: Array, drop: ShakeDrop | None) -> Array:
    """`(b + alpha - b alpha) x`, with the derivative `b + beta - b beta`: [N H W C] -> the same.

    b is 1 at the rate p_l; so x and its gradient are left alone (b = 1) or disturbed. In evaluation
    the factor is its expectation, p_l + (1 - p_l) E[alpha]: p_l for the paper's alpha. None: x.
    """
    if drop is None:
        return x
    if drop.keys is None:
        factor = 1 - drop.rate * (1 - sum(drop.alpha) / 2)
        return factor.astype(x.dtype) * x
    key, gates_key = drop.keys
    alpha_key, beta_key = jax.random.split(gates_key)
    shape = _shape(drop.level, x)
    alpha = jax.random.uniform(alpha_key, shape, jnp.float32, *drop.alpha)
    beta = jax.random.uniform(beta_key, shape, jnp.float32, *drop.beta)
    b = jax.random.bernoulli(key, 1 - drop.rate)
    return gate(x, jnp.where(b, 1, alpha), jnp.where(b, 1, beta))
