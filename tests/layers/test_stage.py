"""Stages under `nn.scan` and `nn.remat`, with named and with stacked variables."""

from __future__ import annotations

from functools import partial

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.train import parallel

DEPTH = 4


class Noisy(nn.Module):
    """A block with all kinds of randomness: dropout, and a branch that is skipped for a batch.

    [N H W C] -> [N H/stride W/stride width]
    """

    width: int
    conv: layers.Conv
    norm: nn.Module
    train: bool
    stride: int = 1

    @nn.compact
    def __call__(self, x, rate, keys):
        def branch(block, x):
            y = block.conv(block.width, (3, 3), strides=block.stride, padding=1, name="conv1")(x)
            y = nn.relu(block.norm(name="norm1")(y))
            y = nn.Dropout(0.5, deterministic=not block.train)(y, rng=keys and keys["dropout"])
            return block.conv(block.width, (3, 3), padding=1, name="conv2")(y)

        shortcut = x[:, :: self.stride, :: self.stride]
        if not self.train:
            return shortcut + (1 - rate) * branch(self, x)
        kept = jax.random.bernoulli(keys["shared"], 1 - rate)
        skip = lambda block, x: jnp.zeros_like(shortcut)  # noqa: E731
        return shortcut + nn.cond(kept, branch, skip, self, x)


class Network(nn.Module):
    depth: int = DEPTH
    axis_name: str | None = None
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, images, *, train=False):
        norm = layers.make_norm("batch", train=train, axis_name=self.axis_name)
        block = partial(Noisy, images.shape[-1], norm=norm, train=train)
        keys = None
        if train:
            split = lambda stream: jax.random.split(self.make_rng(stream), self.depth)  # noqa: E731
            keys = {stream: split(stream) for stream in ("dropout", "shared")}
        stage = layers.Stage(
            block, layers.Conv, self.depth, stride=2, scan=self.scan, remat=self.remat, name="stage"
        )
        x = stage(images, jnp.linspace(0.0, 0.6, self.depth), keys)
        return layers.global_avg_pool(x)


IMAGES = np.random.RandomState(0).randn(8, 8, 8, 3).astype(np.float32)


def step(model):
    """Returns a training step on several devices: loss, statistics, gradients."""

    def run(variables, batch, key):
        rngs = {"dropout": jax.random.fold_in(key, jax.lax.axis_index("batch")), "shared": key}

        def loss_fn(params):
            features, new = model.apply(
                {**variables, "params": params},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            return jnp.sum(features**2), new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        return jax.lax.pmean({"loss": loss, "batch_stats": stats, "params": grads}, "batch")

    return run


@pytest.fixture(scope="module")
def variables():
    rngs = dict(zip(("params", "dropout", "shared"), jax.random.split(jax.random.key(0), 3)))
    return jax.jit(Network().init)(rngs, IMAGES)


def on_four_devices(model, variables, mode="shard_map"):
    mesh = parallel.make_mesh()
    mapped = parallel.parallelize(step(model), mesh, mode=mode, donate=False)
    batch = parallel.shard_batch({"image": IMAGES}, mesh, mode)
    key = parallel.replicate(jax.random.key(7), mesh)
    return jax.device_get(mapped(parallel.replicate(variables, mesh), batch, key))


@pytest.fixture(scope="module")
def unrolled(variables):
    return on_four_devices(Network(axis_name="batch"), variables)


@pytest.mark.parametrize(
    ("fields", "stacked", "mode"),
    [
        pytest.param(dict(scan=True), True, "shard_map", marks=pytest.mark.slow),
        pytest.param(dict(scan=True, remat=True), True, "pmap", marks=pytest.mark.slow),
        (dict(scan=True), False, "shard_map"),
        pytest.param(dict(remat=True), False, "shard_map", marks=pytest.mark.slow),
    ],
)
def test_the_same_results_as_the_unrolled_network(variables, unrolled, fields, stacked, mode):
    """Gradients, statistics, dropout masks and skipped branches agree on synchronized devices."""
    given = pytree.stack_blocks(variables) if stacked else variables
    results = on_four_devices(Network(axis_name="batch", **fields), given, mode)
    for name in variables:
        assert jax.tree.structure(results[name]) == jax.tree.structure(given[name])
    results = pytree.flatten(pytree.unstack_blocks(results))
    assert list(results) == list(pytree.flatten(unrolled))
    for path, expected in pytree.flatten(unrolled).items():
        np.testing.assert_allclose(results[path], expected, rtol=1e-4, atol=1e-5, err_msg=path)


def test_the_branches_of_some_blocks_were_skipped(variables, unrolled):
    """Checks that the test above covers skipped branches."""
    before, after = (pytree.flatten(tree["batch_stats"]) for tree in (variables, unrolled))
    moved = [not np.array_equal(before[path], after[path]) for path in before]
    assert any(moved)
    assert not all(moved)


@pytest.mark.parametrize("scan", [True, False])
def test_the_scanned_program_does_not_grow_with_depth(scan):
    def lines(depth):
        model = Network(depth, scan=scan)
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES))
        given = pytree.stack_blocks(variables) if scan else variables
        return len(jax.jit(model.apply).lower(given, IMAGES).as_text().splitlines())

    assert (lines(3) == lines(9)) is scan


def test_initialization_and_features_use_named_blocks(variables):
    model = Network(scan=True)
    rngs = dict(zip(("params", "dropout", "shared"), jax.random.split(jax.random.key(0), 3)))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(model.init)(rngs, IMAGES), variables)
    features = partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    _, state = jax.eval_shape(features, variables, IMAGES)
    assert state["intermediates"]["stage"]["block3"]["conv1"]["__call__"][0].shape == (8, 4, 4, 3)
    with pytest.raises(UserError, match=r"block2-4 is stacked.*unstack_blocks\(variables\)"):
        features(pytree.stack_blocks(variables), IMAGES)


def test_a_key_that_depends_on_the_name_of_a_block_raises(variables):
    class Wrong(Noisy):
        @nn.compact
        def __call__(self, x, *_):
            return nn.Dropout(0.5, deterministic=False)(x)

    stage = layers.Stage(partial(Wrong, 3, norm=None, train=True), layers.Conv, 3, scan=True)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        stage.apply({}, IMAGES, rngs={"dropout": jax.random.key(0)})
