"""Overhead of a step: no second copy of the state, and no transfers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.train import parallel
from tests.train import tiny

MODES = ("shard_map", "pmap")


@pytest.fixture(params=MODES)
def parts(request):
    """Returns (mode, state, train step, evaluation step, mesh, key), on four devices with EMA."""
    config = tiny.config(**{"train.ema": 0.9, "optimizer.name": "adam"})
    state, step, evaluation, mesh = tiny.setup(config, devices=4, mode=request.param)
    key = parallel.replicate(jax.random.key(0), mesh)
    return request.param, state, step, evaluation, mesh, key


def test_the_state_is_given_away_and_its_memory_used_again(parts):
    mode, state, step, _, mesh, key = parts
    batch = parallel.shard_batch(tiny.examples(8), mesh, mode)
    memory = step.lower(state, batch, key).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= size  # per device
    new, _ = step(state, batch, key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


def test_bytes_travel_before_the_step_and_nothing_in_it(parts):
    mode, state, step, evaluation, mesh, key = parts
    batch = parallel.shard_batch(tiny.examples(8), mesh, mode)
    assert batch["image"].dtype == np.uint8
    pieces = batch["image"].addressable_shards
    assert [piece.data.size for piece in pieces] == [2 * np.prod(tiny.SHAPE)] * 4
    assert {piece.device for piece in pieces} == set(mesh.devices.flat)
    masked = parallel.shard_batch(tiny.examples(8) | {"mask": np.ones(8, np.float32)}, mesh, mode)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, batch, key)
        evaluation(state.variables, masked, None)


@pytest.mark.parametrize(("size", "near"), [(6, "4 or 8"), (10, "8 or 12"), (3, "4")])
def test_a_batch_that_does_not_divide(size, near):
    with pytest.raises(
        UserError, match=f"{size} examples cannot be split .* 4 devices; choose {near}"
    ):
        parallel.check_batch(size, parallel.make_mesh(), what="data.batch_size")
