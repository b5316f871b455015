"""Residual branches that are dropped at random, for a whole batch (stochastic depth) or per image.

A network has the fields `drop_path` (the last block's rate of dropping, which is 1 - p_L for the
survival probability p_L), `drop_path_mode` and `drop_path_schedule`. `make_drop_paths` turns them
into one `DropPath` per stage. `Stage` gives each block its own, and the block calls
`residual(shortcut, branch, self, x, drop)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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

# Three common schedules: (`rate`, number of blocks L) -> the rates of blocks 1 to L.
DROP_SCHEDULES: dict[str, Callable[[float, int], np.ndarray]] = {
    # Huang et al. 2016, section 3: 1 - p_l = l/L (1 - p_L), l = 1 ... L.
    "linear": lambda rate, L: rate * np.arange(1, L + 1) / L,
    # EfficientNet's released code: i/N, i = 0 ... N-1. The first block is never dropped, and no
    # block reaches `rate`.
    "efficientnet": lambda rate, L: rate * np.arange(L) / L,
    # ConvNeXt and timm: from 0 in the first block to `rate` in the last.
    "convnext": lambda rate, L: np.linspace(0.0, rate, L),
}
DROP_MODES = ("batch", "sample")
State = TypeVar("State")  # DropPath, ShakeDrop or None


@flax.struct.dataclass
class DropPath:
    """Drop-path state of one block or of a whole stage.

    A stage's `rate` and `key` have a leading block axis. `Stage` and `for_block` index it.
    """

    rate: Array  # f32: probability of dropping
    key: Array | None  # None: evaluation
    mode: str = flax.struct.field(pytree_node=False)  # of DROP_MODES


def drop_rates(rate: float, depth: int, schedule: str = "linear") -> np.ndarray:
    """Returns the rate of dropping of each block, f32 [depth], by a schedule of DROP_SCHEDULES.

    The last block has the rate `rate`, or a little less with the schedule "efficientnet". Raises
    `UserError` for an unknown schedule, or a rate outside [0, 1).
    """
    if schedule not in DROP_SCHEDULES:
        hint = did_you_mean(schedule, DROP_SCHEDULES)
        raise UserError(f"unknown drop_path_schedule {schedule!r}{hint}")
    if not 0 <= rate < 1:
        raise UserError(
            f"drop_path: expected the last block's rate of dropping, from 0 to below 1, got {rate}"
        )
    return DROP_SCHEDULES[schedule](rate, depth).astype(np.float32)


def make_drop_paths(
    network: nn.Module, depths: Sequence[int], train: bool
) -> list[DropPath | None]:
    """Returns the `DropPath` of each stage of `depths` blocks, from the network's fields.

    The entries are None if `drop_path` is 0. The field `drop_path_mode` is one of:

    - "batch": stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382). There is one
      decision per block and step, drawn from the stream "shared". The decision is the same on all
      devices, because a step is as slow as its slowest device, and in all pieces of a step that
      accumulates gradients. A dropped branch is not computed, and its BatchNorm statistics are not
      updated. In evaluation each branch is scaled by its survival probability p_l.
    - "sample": as in timm and torchvision. There is one decision per image, drawn from the stream
      "dropout". Kept branches are scaled by 1 / p_l, and evaluation is unchanged.

    Raises `UserError` for an unknown mode or schedule, a rate outside [0, 1), or a missing field or
    stream.
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


def for_block(drop: State, i: int) -> State:
    """Returns the state of a stage's block `i` (0-based), for networks without `Stage`.

    `drop` is a `DropPath`, a `ShakeDrop` or None.
    """
    return jax.tree.map(lambda a: a[i], drop)


def split_by_branch(drop: DropPath | None, n: int) -> list[DropPath | None]:
    """Returns the states of one block's `n` branches: the same rate, independent decisions."""
    if drop is None or drop.key is None:
        return [drop] * n
    return [dataclasses.replace(drop, key=key) for key in jax.random.split(drop.key, n)]


def residual(
    shortcut: Array,
    branch: Callable[[Any, Array], Array],
    block: nn.Module,
    x: Array,
    drop: DropPath | None,
) -> Array:
    """Returns `shortcut + branch(block, x)`, where `drop` decides whether to drop the branch.

    `branch` must make its layers from its argument `block`, not from the `self` of the enclosing
    method: inside `nn.cond`, `block` and `self` are different modules. `shortcut` and the branch's
    result have the same shape and dtype. If `drop` is None, the branch is never dropped.
    """
    if drop is None:
        return shortcut + branch(block, x)
    keep_prob = (1 - drop.rate).astype(shortcut.dtype)
    if drop.key is None:
        y = branch(block, x)
        return shortcut + (keep_prob * y if drop.mode == "batch" else y)
    if drop.mode == "sample":
        y = branch(block, x)
        keep = jax.random.bernoulli(drop.key, 1 - drop.rate, (len(y), *[1] * (y.ndim - 1)))
        return shortcut + jnp.where(keep, y / keep_prob, 0)

    def add_branch(block: nn.Module, shortcut: Array, x: Array) -> Array:
        with inside_control_flow():
            y = branch(block, x)
        return shortcut + y

    keep = jax.random.bernoulli(drop.key, 1 - drop.rate)
    return nn.cond(keep, add_branch, lambda block, shortcut, x: shortcut, block, shortcut, x)


def make_key(module: nn.Module, stream: str) -> Any:
    """Returns `module.make_rng(stream)`. Raises `UserError` if the rngs of `apply` lack the
    stream."""
    if not module.has_rng(stream):
        where = "the same on every device" if stream == "shared" else "different on each device"
        raise UserError(
            f"{type(module).__name__} draws random numbers in training: "
            f'expected apply(..., rngs={{"{stream}": key}}), {where}'
        )
    return module.make_rng(stream)
