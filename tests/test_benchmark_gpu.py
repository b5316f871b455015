"""The benchmark for a GPU, and the networks on plain Flax that it compares ours with."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from experiments.benchmarks import plain_flax
from flax_cnns.models.registry import create_model, init_variables


def test_the_plain_resnet_has_the_parameters_of_ours():
    depths = (2, 1, 1, 1)
    ours = create_model("resnet50", depths=depths)
    ours = jax.eval_shape(partial(init_variables, ours), jax.random.key(0))
    plain = plain_flax.PlainResNet(depths)
    state = partial(plain_flax.make_plain_state, plain, images_shape=(2, 224, 224, 3))
    state = jax.eval_shape(state, jax.random.key(0))

    def shapes(tree):
        return sorted(x.shape for x in jax.tree.leaves(tree))

    assert shapes(state.params) == shapes(ours["params"])
    assert shapes(state.batch_stats) == shapes(ours["batch_stats"])


def test_the_plain_step_learns():
    model = plain_flax.PlainResNet(depths=(1,), width=4, num_classes=5)
    state = plain_flax.make_plain_state(model, jax.random.key(0), (8, 16, 16, 3))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    batch = {"image": images, "label": rng.integers(0, 5, 8).astype(np.int32)}
    step = jax.jit(plain_flax.make_plain_step(model))
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 3
    assert metrics["accuracy"] == 1
