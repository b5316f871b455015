"""Deeply-Supervised Nets: counts by hand, when companions act, initial values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10_dsn
from flax_cnns import tree as pytree
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.train.losses import make_aux_weights
from tests.models.published import PUBLISHED
from tests.models.shapes import blank_model, cost_of

# The release: name, kernel size, input and output channels, and the output's side for 32x32.
CONVS = [
    ("conv1", 5, 3, 192, 32),
    ("mlpconv1/cccp1", 1, 192, 160, 32),
    ("mlpconv1/cccp2", 1, 160, 96, 32),
    ("conv2", 5, 96, 192, 16),
    ("mlpconv2/cccp1", 1, 192, 192, 16),
    ("mlpconv2/cccp2", 1, 192, 192, 16),
    ("conv3", 3, 192, 192, 8),
    ("mlpconv3/cccp1", 1, 192, 192, 8),
    ("head", 1, 192, 10, 8),
]
# Number of inputs of each companion.
COMPANIONS = {"aux1": 32 * 32 * 192, "aux2": 16 * 16 * 192, "aux3": 8 * 8 * 192}


def test_count_and_cost_of_every_layer_by_hand():
    expected = {
        name: ((1, side, side, out), window**2 * n * out + out, side**2 * window**2 * n * out)
        for name, window, n, out, side in CONVS
    }
    rows = cost_of("dsn").layers
    main = {row.path: (row.output_shape, row.params, row.macs) for row in rows[: len(CONVS)]}
    assert main == expected
    assert sum(params for _, params, _ in main.values()) == 966_986  # "about 1 M"
    companions = {row.path: row.params for row in rows[len(CONVS) :]}
    assert companions == {f"{name}/head": n * 10 + 10 for name, n in COMPANIONS.items()}
    assert PUBLISHED["dsn"].params == 966_986 + sum(companions.values())


def run(size, train=False, **fields):
    """Returns shapes: of the logits, of captured outputs by path, of sown values by path."""
    model = blank_model("dsn", **fields)

    def run():
        images = jnp.zeros((2, size, size, 3))
        variables = model.init(jax.random.key(0), images)
        return model.apply(
            variables,
            images,
            train=train,
            rngs={"dropout": jax.random.key(1)},
            capture_intermediates=True,
            mutable=["intermediates", "aux_logits"],
        )

    out, state = jax.eval_shape(run)
    flat = pytree.flatten(state["intermediates"])
    shapes = {path.removesuffix("/__call__/0"): leaf.shape for path, leaf in flat.items()}
    sown = {path: leaf.shape for path, leaf in pytree.flatten(state.get("aux_logits", {})).items()}
    return out, shapes, sown


def test_output_shape_of_each_stage():
    logits, shapes, _ = run(32)
    assert logits.shape == (2, 10)
    for i, (side, width) in enumerate(((32, 96), (16, 192), (8, 192)), 1):
        assert shapes[f"conv{i}"] == (2, side, side, 192)
        assert shapes[f"mlpconv{i}"] == (2, side, side, width)


def test_it_classifies_images_of_another_size_than_it_learned_from():
    model = create_model("dsn")
    variables = jax.eval_shape(
        lambda: init_variables(model, jax.random.key(0), images_shape=(1, 8, 8, 3))
    )
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, 13, 13, 3)))
    assert logits.shape == (2, 10)


def test_companions_are_linear_in_the_convolutions_and_dropout_is_random():
    model = create_model("dsn", input_size=(4, 4, 3))
    variables = init_variables(model, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))

    def logits(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        keep = ["aux_logits", "intermediates"]
        return model.apply(
            variables, images, train=train, rngs=rngs, mutable=keep, capture_intermediates=True
        )

    (logits1, state), (logits2, _) = logits(0, True), logits(1, True)
    for i in (1, 2, 3):
        maps = np.asarray(state["intermediates"][f"conv{i}"]["__call__"][0]).reshape(2, -1)
        assert (maps < 0).any()  # before ReLU
        companion = variables["params"][f"aux{i}"]["head"]
        expected = maps @ companion["kernel"] + companion["bias"]
        np.testing.assert_allclose(state["aux_logits"][f"aux{i}"]["logits"][0], expected, atol=1e-4)
    assert (logits1 != logits2).any()
    logits1, logits2 = logits(0, False)[0], logits(1, False)[0]
    np.testing.assert_array_equal(logits1, logits2)
    assert (logits1 < 0).any()  # no ReLU on the maps of the classes
    assert create_model("dsn").dropout == 0.5


def test_weight_of_the_companions_falls_as_in_the_paper():
    ((pattern, weight),) = make_aux_weights(cifar10_dsn.get_config().train, steps_per_epoch=500.0)
    assert pattern == ".*"
    for step in (0, 12_500, 25_000, 50_000):
        assert weight(step) == pytest.approx(0.1 * (1 - step / 50_000))
    assert weight(150_000) == 0


def test_papers_initial_values():
    model = create_model("dsn", init="paper", input_size=(8, 8, 3), num_classes=20)
    params = init_variables(model, jax.random.key(0))["params"]
    for path, leaf in pytree.flatten(params).items():
        if path.endswith("bias"):
            assert not leaf.any()
        elif path.startswith("aux"):  # uniform, variance 1 / fan_in
            bound = np.sqrt(3 / leaf.shape[0])
            assert np.abs(leaf).max() == pytest.approx(bound, rel=0.01), path
            assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.05), path
        else:
            assert np.std(leaf) == pytest.approx(0.05, rel=0.05), path
