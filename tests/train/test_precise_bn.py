from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import Interrupted
from flax_cnns.train import parallel, precise_bn
from tests.train import tiny

BATCHES = 3


def moments_step(model, modes, *, devices=1, mode="shard_map"):
    """Returns (step, mesh): images are scaled to 0..1, labels are unchanged."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    step = precise_bn.make_moments_step(
        model.apply,
        modes,
        augment=lambda images, keys: images.astype(jnp.float32) / 255,
        mix=lambda images, labels, key: (images, jax.nn.one_hot(labels, tiny.CLASSES)),
    )
    return parallel.parallelize(step, mesh, mode=mode, donate=False), mesh


def estimate(model, variables, modes, *, devices=1, mode="shard_map", **kwargs):
    step, mesh = moments_step(model, modes, devices=devices, mode=mode)
    batches = [parallel.shard_batch(tiny.examples(8, i), mesh, mode) for i in range(BATCHES)]
    key = parallel.replicate(jax.random.key(5), mesh)
    return precise_bn.estimate_statistics(
        step, parallel.replicate(variables, mesh), batches, key, **kwargs
    )


@pytest.fixture(scope="module")
def network():
    """Returns (model, variables, mean [4], variance [4]) of the norm's inputs over all examples."""
    model = tiny.Tiny(dropout=0.5, aux=True)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *tiny.SHAPE)))
    images = np.concatenate([tiny.examples(8, i)["image"] for i in range(BATCHES)])
    conv = nn.Conv(4, (3, 3)).apply(
        {"params": variables["params"]["conv"]}, images.astype(np.float32) / 255
    )
    return model, variables, np.mean(conv, (0, 1, 2)), np.var(conv, (0, 1, 2))


@pytest.mark.parametrize(("devices", "mode"), [(1, "shard_map"), (4, "shard_map"), (2, "pmap")])
def test_it_is_the_mean_and_variance_over_all_examples(network, devices, mode):
    """For any number of devices, which normalize separately, and any old statistics."""
    model, variables, mean, var = network
    strange = variables | {"batch_stats": {"norm": {"mean": mean + 3, "var": 100 * var}}}
    found = estimate(model, strange, {"norm": "train"}, devices=devices, mode=mode)
    np.testing.assert_allclose(found["norm"]["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(found["norm"]["var"], var, rtol=1e-5)
    assert found["norm"]["var"].dtype == np.float32


def test_what_is_frozen_keeps_its_statistics_and_is_normalized_by_them(network):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            norm = lambda name: nn.BatchNorm(not train, name=name)  # noqa: E731
            return norm("second")(norm("first")(images))

    model, images = Two(), np.concatenate([tiny.examples(8, i)["image"] for i in range(BATCHES)])
    variables = model.init(jax.random.key(0), jnp.zeros((1, *tiny.SHAPE)), train=False)
    kept = {"mean": np.float32([0.25]), "var": np.float32([4.0])}
    variables["batch_stats"]["first"] = kept
    found = estimate(model, variables, {"first": "frozen", "second": "train"})
    assert found["first"] == kept
    second = (images / 255 - 0.25) / np.sqrt(4.0 + 1e-5)
    np.testing.assert_allclose(found["second"]["mean"], [second.mean()], atol=1e-6)
    np.testing.assert_allclose(found["second"]["var"], [second.var()], rtol=1e-5)


def test_a_branch_counts_where_it_was_computed():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            def branch(self, x):
                return nn.BatchNorm(not train, name="norm")(x)

            stays = images.max() > 0  # stochastic depth, but not random
            if self.is_initializing():
                return branch(self, images)
            return nn.cond(stays, branch, lambda self, x: x, self, images)

    model, modes = Dropped(), {"norm": "train"}
    variables = model.init(jax.random.key(0), jnp.zeros((1, *tiny.SHAPE)), train=False)
    step, mesh = moments_step(model, modes, devices=2)
    examples = tiny.examples(8)
    full, empty = (
        examples | {"image": np.full_like(examples["image"], value)} for value in (255, 0)
    )
    key, variables = parallel.replicate((jax.random.key(0), variables), mesh)

    def found(*batches):
        sharded = [parallel.shard_batch(batch, mesh) for batch in batches]
        return precise_bn.estimate_statistics(step, variables, sharded, key)["norm"]

    np.testing.assert_array_equal(found(empty, full, empty)["mean"], [1.0])
    np.testing.assert_array_equal(found(empty)["mean"], [0.0])  # unchanged
    np.testing.assert_array_equal(found(empty)["var"], [1.0])


def test_it_stops_between_two_batches(network):
    model, variables, *_ = network
    asked = itertools.count(1)
    with pytest.raises(Interrupted):
        estimate(model, variables, {"norm": "train"}, should_stop=lambda: next(asked) == 3)
    assert next(asked) == 4
