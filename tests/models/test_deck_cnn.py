"""The CIFAR-100 classifier of the HSLU deck "Image Classification and Network Architectures"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables
from tests.models.published import PUBLISHED
from tests.models.shapes import cost_of

NAME = "deck003_cifar100_example"


@pytest.fixture(scope="module")
def variables():
    return init_variables(create_model(NAME, init="paper"), jax.random.key(0))


def test_the_published_summary():
    rows = [(layer.path, layer.output_shape, layer.params) for layer in cost_of(NAME).layers]
    assert rows == [
        ("conv1/conv", (1, 30, 30, 32), 896),
        ("conv2/conv", (1, 13, 13, 32), 9_248),
        ("conv3/conv", (1, 4, 4, 32), 9_248),
        ("head", (1, 100), 51_300),
    ]
    by_hand = (9 * 3 * 32 + 32, 9 * 32 * 32 + 32, 9 * 32 * 32 + 32, 4 * 4 * 32 * 100 + 100)
    assert tuple(params for *_, params in rows) == by_hand
    assert sum(by_hand) == PUBLISHED[NAME].params


def test_forward_is_the_definition(variables):
    params = jax.tree.map(np.asarray, variables["params"])
    images = np.random.RandomState(0).randn(3, 32, 32, 3).astype(np.float32)

    def conv(x, name):
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        y = np.einsum("nhwcij,ijco->nhwo", windows, params[name]["conv"]["kernel"])
        return np.maximum(y + params[name]["conv"]["bias"], 0)

    def pool(x):
        n, h, w, c = x.shape
        x = x[:, : h // 2 * 2, : w // 2 * 2]
        return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))

    x = conv(pool(conv(pool(conv(images, "conv1")), "conv2")), "conv3").reshape(3, 512)
    features = create_model(NAME, num_classes=None).apply(variables, images)
    np.testing.assert_allclose(features, x, atol=1e-5)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    logits, state = create_model(NAME).apply(
        variables, images, capture_intermediates=True, mutable="intermediates"
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    seen = state["intermediates"]
    seen = {name: seen[name]["__call__"][0] for name in ("conv1", "pool1", "pool2", "conv3")}
    np.testing.assert_allclose(seen["conv1"], conv(images, "conv1"), atol=1e-5)
    np.testing.assert_allclose(seen["pool1"], pool(conv(images, "conv1")), atol=1e-5)
    np.testing.assert_allclose(seen["conv3"].reshape(3, 512), x, atol=1e-5)
    assert seen["pool2"].shape == (3, 6, 6, 32)


def test_the_papers_initialization_is_kerass(variables):
    for path, leaf in pytree.flatten(variables["params"]).items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
            continue
        *window, fan_in, fan_out = leaf.shape
        bound = np.sqrt(6 / (np.prod(window) * (fan_in + fan_out)))
        if path == "head/kernel":
            bound = np.sqrt(6 / (512 + 100))
        assert 0.98 * bound < np.abs(leaf).max() <= bound, path
        assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.05), path


def test_sizes_and_channels(variables):
    model = create_model(NAME)
    for size in (18, 30, 45):
        images = jax.ShapeDtypeStruct((2, size, 64, 3), jnp.float32)
        assert jax.eval_shape(model.apply, variables, images).shape == (2, 100)
    with pytest.raises(UserError, match="17x32 are too small: the smallest is 18x18"):
        model.apply(variables, jnp.zeros((1, 17, 32, 3)))
    with pytest.raises(UserError, match="expected images of 3 channels, got 1"):
        model.apply(variables, jnp.zeros((1, 32, 32, 1)))


def test_computes_in_bfloat16(variables):
    model = create_model(NAME, dtype="bfloat16")
    images = np.random.RandomState(0).randn(3, 32, 32, 3).astype(np.float32)
    logits = model.apply(variables, images)
    assert logits.dtype == jnp.float32
    exact = create_model(NAME).apply(variables, images)
    assert 0 < np.abs(logits - exact).max() < 0.05
