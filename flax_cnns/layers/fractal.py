"""The join of a fractal network and what drop-path keeps of its inputs (Larsson et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

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
    """One step's sample of a fractal network, by which every join knows what it keeps.

    `column`, i32 [] or one an image [N], is the column that global sampling chose, from 1, the
    shallowest, and 0 where sampling is local.
    """

    column: Array
    key: Array
    rate: float = flax.struct.field(pytree_node=False)  # local: of dropping an input of a join

    def keep(self, first: int, last: int, *place: int) -> Array:
        """bool [inputs] or [inputs N]: which of the columns `first` to `last` their join takes.

        `place`, numbers that no other join has. A join off the way of the chosen column takes all;
        nothing of it goes on.
        """
        key, shape = self.key, (last - first + 1, *self.column.shape)
        for number in place:
            key = jax.random.fold_in(key, number)
        columns = jnp.arange(first, last + 1).reshape(-1, *[1] * self.column.ndim)
        chosen = columns == self.column
        kept = jnp.where(self.column == 0, keep_at_least_one(key, self.rate, shape), chosen)
        return kept | ~kept.any(axis=0)


def keep_at_least_one(key: Array, rate: float, shape: Sequence[int]) -> Array:
    """bool [inputs ...]: each input is dropped with the rate; where all would be, one stays."""
    each, one = jax.random.split(key)
    kept = jax.random.bernoulli(each, 1 - rate, shape)
    chance = jax.nn.one_hot(jax.random.randint(one, shape[1:], 0, shape[0]), shape[0], axis=0)
    return jnp.where(kept.any(axis=0), kept, chance.astype(bool))


def draw_columns(network: nn.Module, columns: int, images: int, train: bool) -> ColumnDrop | None:
    """A step's sample by the network's fields; None where every path stays.

    `drop_path_global` of the samples are global, one column of all; the others are local, by the
    rate `drop_path`. `drop_path_mode="batch"`: one sample a step, out of the stream "shared", which
    is the same on all devices. "sample": one an image, out of "dropout".

    Raises `UserError` for an unknown mode, rates that are none, or a field or a stream that is
    missing.
    """
    check_fields(network, "draw_columns", "drop_path", "drop_path_global", "drop_path_mode")
    mode = network.drop_path_mode
    if mode not in DROP_MODES:
        raise UserError(f"unknown drop_path_mode {mode!r}{did_you_mean(mode, DROP_MODES)}")
    if not 0 <= network.drop_path < 1 or not 0 <= network.drop_path_global <= 1:
        raise UserError(
            f"drop_path is a join's rate of dropping an input, 0 to below 1, and drop_path_global "
            f"the part of global samples, 0 to 1, got {network.drop_path} and "
            f"{network.drop_path_global}"
        )
    drops = network.drop_path or network.drop_path_global
    if not drops or not train or network.is_initializing():
        return None
    key = make_key(network, {"batch": "shared", "sample": "dropout"}[mode])
    key, which, coin = jax.random.split(key, 3)
    shape = {"batch": (), "sample": (images,)}[mode]
    chosen = jax.random.randint(which, shape, 1, columns + 1)
    is_global = jax.random.bernoulli(coin, network.drop_path_global, shape)
    return ColumnDrop(jnp.where(is_global, chosen, 0), key, network.drop_path)


def fractal_join(inputs: Sequence[Array], keep: Array | None = None) -> Array:
    """The mean of what is kept: [N H W C], as many as `keep` [inputs] or [inputs N] is long."""
    if keep is None:
        return sum(inputs) / len(inputs)
    keep = keep.reshape(len(inputs), -1, 1, 1, 1)
    total = jnp.where(keep, jnp.stack(inputs), 0).sum(axis=0)
    return total / keep.sum(axis=0).astype(total.dtype)
