"""Residual branches that are dropped at random: stochastic depth, and drop-path image by image.

A network has the fields `drop_path` (the last block's rate of dropping; its survival is 1 - that),
`drop_path_mode` and `drop_path_schedule`. `make_drop_paths` makes one `DropPath` for each stage of
them, `Stage` hands each block its own, and the block calls
`residual(shortcut, branch, self, x, drop)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.checks import check_fields
from flax_cnns.layers.conv import inside_control_flow
from flax_cnns.layers.stage import split_by_stage
from flax_cnns.types import Array

# Rates of blocks 1 to L, by the rate of the last: the three growths that are found in the wild.
DROP_SCHEDULES: dict[str, Callable[[float, int], np.ndarray]] = {
    # Huang et al. 2016, section 3: 1 - p_l = l/L (1 - p_L), l = 1 ... L.
    "linear": lambda rate, L: rate * np.arange(1, L + 1) / L,
    # EfficientNet's released code: i/N, i = 0 ... N-1. The first block always stays, and no block
    # reaches the rate.
    "efficientnet": lambda rate, L: rate * np.arange(L) / L,
    # ConvNeXt's and timm's: from 0 in the first block to the rate in the last.
    "convnext": lambda rate, L: np.linspace(0.0, rate, L),
}
DROP_MODES = ("batch", "sample")


@flax.struct.dataclass
class DropPath:
    """What blocks are told about dropping their branches; `rate` and `key` have an axis of blocks
    until `Stage` or `for_block` takes one of them."""

    rate: Array  # f32: of dropping
    key: Array | None  # None: evaluation
    mode: str = flax.struct.field(pytree_node=False)


def drop_rates(rate: float, depth: int, schedule: str = "linear") -> np.ndarray:
    """f32 [depth]: each block's rate of dropping, the last one's being about `rate`.

    Raises `UserError` for an unknown schedule, or a rate outside of [0, 1).
    """
    if schedule not in DROP_SCHEDULES:
        hint = did_you_mean(schedule, DROP_SCHEDULES)
        raise UserError(f"unknown drop_path_schedule {schedule!r}{hint}")
    if not 0 <= rate < 1:
        raise UserError(f"drop_path is the last block's rate of dropping, 0 to below 1, got {rate}")
    return DROP_SCHEDULES[schedule](rate, depth).astype(np.float32)


def make_drop_paths(
    network: nn.Module, depths: Sequence[int], train: bool
) -> list[DropPath | None]:
    """A `DropPath` for each stage of `depths` blocks, by the network's fields; None where all stay.

    `drop_path_mode="batch"` is stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382):
    one decision a block and step, out of the stream "shared", which is the same on all devices,
    since a step is as slow as its slowest device, and for all pieces of a step that accumulates
    gradients. A dropped branch is not computed, its statistics
    stay, and in evaluation each branch counts p_l times.
    "sample" is timm's and torchvision's: one decision an image, out of "dropout"; branches that
    stay count 1 / p_l times, and evaluation is left alone.

    Raises `UserError` for unknown names, a rate that is none, or a field or a stream that is
    missing.
    """
    fields = ("drop_path", "drop_path_mode", "drop_path_schedule")
    check_fields(network, "make_drop_paths", *fields)
    if network.drop_path_mode not in DROP_MODES:
        hint = did_you_mean(network.drop_path_mode, DROP_MODES)
        raise UserError(f"unknown drop_path_mode {network.drop_path_mode!r}{hint}")
    rates = drop_rates(network.drop_path, sum(depths), network.drop_path_schedule)
    if not network.drop_path:
        return [None] * len(depths)
    keys = None
    if train and not network.is_initializing():
        stream = {"batch": "shared", "sample": "dropout"}[network.drop_path_mode]
        keys = jax.random.split(make_key(network, stream), sum(depths))
    all_blocks = DropPath(jnp.asarray(rates), keys, network.drop_path_mode)
    return split_by_stage(all_blocks, depths)


def for_block(drop: DropPath | None, i: int) -> DropPath | None:
    """The i-th block's, from 0, for who calls blocks without `Stage`."""
    return jax.tree.map(lambda a: a[i], drop)


def split_by_branch(drop: DropPath | None, n: int) -> list[DropPath | None]:
    """For the `n` branches of one block: the same rate, a decision each."""
    if drop is None or drop.key is None:
        return [drop] * n
    return [drop.replace(key=key) for key in jax.random.split(drop.key, n)]


def residual(
    shortcut: Array,
    branch: Callable[[nn.Module, Array], Array],
    block: nn.Module,
    x: Array,
    drop: DropPath | None,
) -> Array:
    """`shortcut + branch(block, x)`, the branch dropped as `drop` says.

    The branch makes its layers by `block`, the module that it is given, never by the `self` around
    it: inside `nn.cond` that is another one. Both terms have one shape and dtype.
    """
    if drop is None:
        return shortcut + branch(block, x)
    stay = (1 - drop.rate).astype(shortcut.dtype)
    if drop.key is None:
        y = branch(block, x)
        return shortcut + (stay * y if drop.mode == "batch" else y)
    if drop.mode == "sample":
        y = branch(block, x)
        stays = jax.random.bernoulli(drop.key, 1 - drop.rate, (len(y), *[1] * (y.ndim - 1)))
        return shortcut + jnp.where(stays, y / stay, 0)

    def add(block: nn.Module, shortcut: Array, x: Array) -> Array:
        with inside_control_flow():
            y = branch(block, x)
        return shortcut + y

    keep = jax.random.bernoulli(drop.key, 1 - drop.rate)
    return nn.cond(keep, add, lambda block, shortcut, x: shortcut, block, shortcut, x)


def make_key(module: nn.Module, stream: str) -> Any:
    """`module.make_rng(stream)`; raises `UserError` where `apply` was not given the stream."""
    if not module.has_rng(stream):
        where = "the same on every device" if stream == "shared" else "another one on each device"
        raise UserError(
            f"{type(module).__name__} draws random numbers in training: "
            f'expected apply(..., rngs={{"{stream}": key}}), {where}'
        )
    return module.make_rng(stream)
