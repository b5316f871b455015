"""FractalNet's join layer, and drop-path for its inputs (Larsson et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.checks import check_fields
from flax_cnns.layers.drop_path import DROP_MODES, make_key
from flax_cnns.types import Array


@flax.struct.dataclass
class ColumnDrop:
    """One step's drop-path sample: it decides for every join of the network which inputs to keep.

    `column` is i32 [], or [N] with one number per image. The number is the column that global
    sampling chose, counted from 1 (the shallowest); 0 means local sampling.
    """

    column: Array
    key: Array
    rate: float = flax.struct.field(pytree_node=False)  # at which local sampling drops an input

    def keep(self, first: int, last: int, *place: int) -> Array:
        """Returns which of the columns `first` to `last` a join keeps: bool [inputs] or [inputs N].

        The integers `place` differ for every join. A join without the globally chosen column keeps
        all its inputs; its output is not used.
        """
        key, shape = self.key, (last - first + 1, *self.column.shape)
        for number in place:
            key = jax.random.fold_in(key, number)
        columns = jnp.arange(first, last + 1).reshape(-1, *[1] * self.column.ndim)
        chosen = columns == self.column
        kept = jnp.where(self.column == 0, keep_at_least_one(key, self.rate, shape), chosen)
        return kept | ~kept.any(axis=0)


def keep_at_least_one(key: Array, rate: float, shape: Sequence[int]) -> Array:
    """Drops each input with probability `rate`, but keeps one if all would be dropped.

    Returns bool [inputs ...], of the given shape.
    """
    keep_key, index_key = jax.random.split(key)
    kept = jax.random.bernoulli(keep_key, 1 - rate, shape)
    index = jax.random.randint(index_key, shape[1:], 0, shape[0])
    single = jax.nn.one_hot(index, shape[0], axis=0)
    return jnp.where(kept.any(axis=0), kept, single.astype(bool))


def draw_columns(network: nn.Module, columns: int, images: int, train: bool) -> ColumnDrop | None:
    """Returns a step's drop-path sample from the network's fields; None if every path is kept.

    The fraction `drop_path_global` of the samples is global: only one column is kept. The other
    samples are local: each input of a join is dropped with the rate `drop_path`. With
    `drop_path_mode="batch"` there is one sample per step, drawn from the stream "shared", which is
    the same on all devices. With "sample" there is one sample per image, drawn from the stream
    "dropout".

    Raises `UserError` for an unknown mode, rates out of range, or a missing field or stream.
    """
    check_fields(network, "draw_columns", "drop_path", "drop_path_global", "drop_path_mode")
    mode = network.drop_path_mode
    if mode not in DROP_MODES:
        raise UserError(f"unknown drop_path_mode {mode!r}{did_you_mean(mode, DROP_MODES)}")
    if not 0 <= network.drop_path < 1 or not 0 <= network.drop_path_global <= 1:
        raise UserError(
            f"expected drop_path, a join's rate of dropping an input, from 0 to below 1, and "
            f"drop_path_global, the fraction of global samples, from 0 to 1, got "
            f"{network.drop_path} and {network.drop_path_global}"
        )
    is_on = network.drop_path or network.drop_path_global
    if not is_on or not train or network.is_initializing():
        return None
    key = make_key(network, {"batch": "shared", "sample": "dropout"}[mode])
    key, column_key, global_key = jax.random.split(key, 3)
    shape = (images,) if mode == "sample" else ()
    chosen = jax.random.randint(column_key, shape, 1, columns + 1)
    is_global = jax.random.bernoulli(global_key, network.drop_path_global, shape)
    return ColumnDrop(jnp.where(is_global, chosen, 0), key, network.drop_path)


def fractal_join(inputs: Sequence[Array], keep: Array | None = None) -> Array:
    """Returns the mean [N H W C] of the inputs that are kept.

    `keep` is bool [inputs] or [inputs N]. If it is None, all inputs are kept.
    """
    if keep is None:
        return cast(Array, sum(inputs)) / len(inputs)
    keep = keep.reshape(len(inputs), -1, 1, 1, 1)
    total = jnp.where(keep, jnp.stack(inputs), 0).sum(axis=0)
    return total / keep.sum(axis=0).astype(total.dtype)
