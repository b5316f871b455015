"""A user's network that is built only from linen and the public names of `flax_cnns.layers`."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns.errors import UserError

MODELS = sorted((Path(layers.__file__).parents[1] / "models").glob("*.py"))
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)


class Block(nn.Module):
    """x + conv(dropout(relu(norm(conv(x))))): [N H W C] -> [N H W C]."""

    conv: Any
    norm: Any
    stride: int = 1

    @nn.compact
    def __call__(self, x, drop=None, key=None):
        def branch(block, x):
            conv = partial(block.conv, x.shape[-1], (3, 3), padding=1)
            y = nn.relu(block.norm(name="norm1")(conv(name="conv1")(x)))
            if key is not None:
                y = nn.Dropout(0.5, deterministic=False)(y, rng=key)
            return conv(name="conv2")(y)

        return layers.residual(x, branch, self, x, drop)


class OwnNet(nn.Module):
    num_classes: int | None = 5
    depth: int = 3
    drop_path: float = 0.5
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    kernel_init: str = "he"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    norm: str = "batch"
    axis_name: str | None = None
    scan: bool = False

    @nn.compact
    def __call__(self, images, *, train=False):
        layers.check_images(images, (8, 8, 3))
        conv, norm = layers.building_blocks(self, train)
        (drop,) = layers.make_drop_paths(self, (self.depth,), train)
        keys = None
        if train and not self.is_initializing():
            keys = jax.random.split(layers.make_key(self, "dropout"), self.depth)
        x = layers.CifarStem(4, conv, norm, name="stem")(images)
        block = partial(Block, norm=norm)
        x = layers.Stage(block, conv, self.depth, scan=self.scan, name="stage1")(x, drop, keys)
        if self.num_classes is not None:
            pooled = layers.global_avg_pool(x)
            logits = layers.make_head(self)(self.num_classes, name="aux1")(pooled)
            if train:
                self.sow("aux_logits", "logits", logits)
        return layers.classify(self, x)


@pytest.fixture(scope="module")
def variables():
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(OwnNet().init, compiler_options=options)(jax.random.key(0), IMAGES)


@pytest.fixture(scope="module")
def trained(variables):
    """Returns {scan: training pass}; its arguments are the seeds of "dropout" and "shared"."""

    def train(scan, dropout, shared):
        rngs = {"dropout": jax.random.key(dropout), "shared": jax.random.key(shared)}
        given = dict(train=True, rngs=rngs, mutable=["batch_stats", "aux_logits"])
        return OwnNet(scan=scan).apply(variables, IMAGES, **given)

    return {scan: jax.jit(partial(train, scan)) for scan in (False, True)}


def test_its_blocks_scan_drop_and_sow(trained):
    unrolled, scanned = (trained[scan](1, 2) for scan in (False, True))
    assert scanned[0].shape == (4, 5)
    assert set(scanned[1]["batch_stats"]["stage1"]) == {"block1", "block2", "block3"}
    assert scanned[1]["aux_logits"]["logits"][0].shape == (4, 5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), unrolled, scanned)


def test_it_draws_from_both_streams(trained):
    logits = lambda *seeds: np.asarray(trained[True](*seeds)[0])  # noqa: E731
    first = logits(1, 2)
    np.testing.assert_array_equal(logits(1, 2), first)
    assert any((logits(seed, 2) != first).any() for seed in (3, 4))
    assert any((logits(1, seed) != first).any() for seed in (3, 4, 5))


def test_missing_arguments_of_apply(variables):
    apply = lambda **given: jax.eval_shape(  # noqa: E731
        partial(OwnNet().apply, variables, train=True, **given), IMAGES
    )
    key, mutable = jax.random.key(0), ["batch_stats"]
    for given, message in (
        (dict(rngs={"dropout": key}, mutable=mutable), r'rngs=\{"shared": key\}'),
        (dict(rngs={"shared": key}, mutable=mutable), r'rngs=\{"dropout": key\}'),
        (dict(rngs={"shared": key, "dropout": key}), r'stem/norm: .*mutable=\["batch_stats"\]'),
    ):
        with pytest.raises(UserError, match=message):
            apply(**given)


class Bare(nn.Module):
    dtype: Any = jnp.float32

    def __call__(self, images, *, train=False):
        return images.mean((1, 2))


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (lambda net: layers.building_blocks(net, True), "kernel_init"),
        (layers.make_head, "kernel_init"),
        (lambda net: layers.classify(net, IMAGES), "num_classes"),
        (lambda net: layers.classify_by_maps(net, IMAGES, paper=layers.he), "num_classes"),
        (lambda net: layers.make_drop_paths(net, (1,), True), "drop_path"),
        (lambda net: layers.make_shakes(net, (1,), True), "forward"),
        (lambda net: layers.make_shake_drops(net, (1,), True), "shake_drop"),
        (lambda net: layers.draw_columns(net, 2, 4, True), "drop_path"),
    ],
)
def test_fields_that_layers_read_from_the_network(part, field):
    with pytest.raises(UserError, match=rf"Bare has no field '{field}', .* add `{field}: "):
        part(Bare())


def find_used_names(source: str) -> set[str]:
    """Returns the names that a file imports or reads from `flax_cnns.layers` and its modules."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and re.match(r"flax_cnns\.layers\b", node.module or ""):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "layers":
            names.add(node.attr)
    return names


def test_networks_are_made_of_public_names():
    assert layers.__all__ == sorted(set(layers.__all__))
    assert all(hasattr(layers, name) for name in layers.__all__)
    source = "from flax_cnns.layers.norm import a\nlayers.b(1)\nx: layers.C"
    assert find_used_names(source) == {"a", "b", "C"}
    for path in MODELS:
        assert find_used_names(path.read_text()) <= set(layers.__all__), path
