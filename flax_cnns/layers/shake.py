"""Branches with random gates that differ between the forward and the backward pass.

Shake-Shake mixes two branches (Gastaldi 2017, https://arxiv.org/abs/1705.07485). ShakeDrop perturbs
one (Yamada et al. 2018, https://arxiv.org/abs/1802.02375). A network draws the gates' keys by
`make_shakes` or `make_shake_drops` and gives each block its own. The block calls `shake_shake` or
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
    """Returns `forward * x`, whose derivative with respect to x is `backward`.

    x is [N H W C]; `forward` and `backward` broadcast to it.
    """
    return forward.astype(x.dtype) * x


@gate.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, _, backward = primals
    return gate(*primals), backward.astype(x.dtype) * tangents[0]


def _gate_shape(level: str, x: Array) -> tuple[int, ...]:
    """Returns the shape of the gates of x [N H W C]: 1 for each axis that shares one gate."""
    n, h, w, c = x.shape
    shapes = {"batch": (1, 1, 1, 1), "image": (n, 1, 1, 1), "channel": (n, 1, 1, c)}
    return shapes.get(level, (n, h, w, c))


def _stream(level: str) -> str:
    """Returns the random stream of the gates.

    A gate of a whole batch is drawn from "shared", the same on all devices. Gates of an image are
    drawn from "dropout", which differs between devices.
    """
    return "shared" if level == "batch" else "dropout"


def _check_known(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"unknown {field} {value!r}{did_you_mean(value, known)}")


# ---------------------------------------------------------------------------- Shake-Shake


@flax.struct.dataclass
class Shake:
    """Shake-Shake's state of one block or of a whole stage, whose `key` has a leading block
    axis."""

    key: Array
    forward: str = flax.struct.field(pytree_node=False, default="shake")
    backward: str = flax.struct.field(pytree_node=False, default="shake")
    level: str = flax.struct.field(pytree_node=False, default="image")


def make_shakes(network: nn.Module, depths: Sequence[int], train: bool) -> list[Shake | None]:
    """Returns the `Shake` of each stage of `depths` blocks, from the network's fields.

    The fields are those of the paper's table 1:

    - `forward` draws alpha ("shake") or sets it to 0.5 ("even").
    - `backward` draws beta ("shake"), or sets it to 0.5 ("even") or to alpha ("keep").
    - `level` is "image" (one number for each image, drawn from the stream "dropout") or "batch"
      (one number for all images on all devices, drawn from the stream "shared").

    The entries are None if alpha and beta are always 0.5, as in evaluation.

    Raises `UserError` for unknown names, or a missing field or stream.
    """
    check_fields(network, "make_shakes", "forward", "backward", "level")
    _check_known("forward", network.forward, FORWARDS)
    _check_known("backward", network.backward, BACKWARDS)
    _check_known("level", network.level, SHAKE_LEVELS)
    is_random = network.forward == "shake" or network.backward == "shake"
    if not is_random or not train or network.is_initializing():
        return [None] * len(depths)
    keys = jax.random.split(make_key(network, _stream(network.level)), sum(depths))
    all_blocks = Shake(keys, network.forward, network.backward, network.level)
    return split_by_stage(all_blocks, depths)


def shake_shake(x1: Array, x2: Array, shake: Shake | None) -> Array:
    """Returns `alpha x1 + (1 - alpha) x2`, with the derivatives beta and 1 - beta, all [N H W C].

    alpha and beta are uniform from 0 to 1 and independent, unless `shake` sets them otherwise. If
    `shake` is None, both are 0.5.
    """
    if shake is None:
        return 0.5 * (x1 + x2)
    alpha_key, beta_key = jax.random.split(shake.key)
    shape = _gate_shape(shake.level, x1)
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
    """ShakeDrop's state of one block or of a whole stage.

    A stage's `rate` and `keys` have a leading block axis. `Stage` and `for_block` index it.
    """

    rate: Array  # f32: probability that b is 0, which perturbs the branch
    keys: tuple[Array, Array] | None  # for b, and for alpha and beta; None: evaluation
    alpha: tuple[float, float] = flax.struct.field(pytree_node=False, default=(-1.0, 1.0))
    beta: tuple[float, float] = flax.struct.field(pytree_node=False, default=(0.0, 1.0))
    level: str = flax.struct.field(pytree_node=False, default="image")


def make_shake_drops(
    network: nn.Module, depths: Sequence[int], train: bool
) -> list[ShakeDrop | None]:
    """Returns the `ShakeDrop` of each stage of `depths` blocks, from the network's fields.

    - `shake_drop` is the last block's rate 1 - p_L, and p_l = 1 - l/L (1 - p_L) for l = 1 ... L. If
      `shake_drop` is 0, the entries are None.
    - `shake_drop_alpha` and `shake_drop_beta` are the ranges from which the gates are drawn. With
      (0, 0) for both, ShakeDrop is stochastic depth.
    - `shake_drop_level` is the part that shares an alpha and a beta: the "batch", an "image", a
      "channel" of an image, or a "pixel" of a channel.

    b is one number for the batch on all devices, drawn from the stream "shared". At the level
    "batch", alpha and beta are drawn from "shared" too; at the other levels, from "dropout".

    Raises `UserError` for an unknown level, a rate outside [0, 1), an invalid range, or a missing
    field or stream.
    """
    fields = ("shake_drop", "shake_drop_alpha", "shake_drop_beta", "shake_drop_level")
    check_fields(network, "make_shake_drops", *fields)
    _check_known("shake_drop_level", network.shake_drop_level, SHAKE_DROP_LEVELS)
    ranges = dict(alpha=tuple(network.shake_drop_alpha), beta=tuple(network.shake_drop_beta))
    for name, given in ranges.items():
        if len(given) != 2 or given[0] > given[1]:
            raise UserError(f"shake_drop_{name}: expected a range (lowest, highest), got {given}")
    if not 0 <= network.shake_drop < 1:
        raise UserError(
            f"shake_drop: expected the last block's rate, from 0 to below 1, got "
            f"{network.shake_drop}"
        )
    if not network.shake_drop:
        return [None] * len(depths)
    total = sum(depths)
    keys: tuple[Array, Array] | None = None
    if train and not network.is_initializing():
        b_keys = jax.random.split(make_key(network, "shared"), total)
        gate_stream = _stream(network.shake_drop_level)
        keys = b_keys, jax.random.split(make_key(network, gate_stream), total)
    rates = jnp.asarray(drop_rates(network.shake_drop, total, "linear"))
    all_blocks = ShakeDrop(rates, keys, **ranges, level=network.shake_drop_level)
    return split_by_stage(all_blocks, depths)


def shake_drop(x: Array, drop: ShakeDrop | None) -> Array:
    """Returns `(b + alpha - b alpha) x`, with the derivative `b + beta - b beta`, all [N H W C].

    b is 1 with probability p_l = 1 - `drop.rate`. Then x and its gradient are unchanged. If b is 0,
    they are multiplied by alpha and beta. In evaluation the factor is the expectation
    p_l + (1 - p_l) E[alpha], which is p_l for the paper's alpha. If `drop` is None, returns x.
    """
    if drop is None:
        return x
    if drop.keys is None:
        factor = 1 - drop.rate * (1 - sum(drop.alpha) / 2)
        return factor.astype(x.dtype) * x
    key, gates_key = drop.keys
    alpha_key, beta_key = jax.random.split(gates_key)
    shape = _gate_shape(drop.level, x)
    alpha = jax.random.uniform(alpha_key, shape, jnp.float32, *drop.alpha)
    beta = jax.random.uniform(beta_key, shape, jnp.float32, *drop.beta)
    b = jax.random.bernoulli(key, 1 - drop.rate)
    return gate(x, jnp.where(b, 1, alpha), jnp.where(b, 1, beta))
