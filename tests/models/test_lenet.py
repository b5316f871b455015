"""LeNet-5: the count by hand, the layers by their definition, the sizes it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import pytree
from flax_cnns.errors import UserError
from flax_cnns.registry import create_model, init_variables, model_info


@pytest.fixture(scope="module")
def variables():
    return init_variables(create_model("lenet5"), jax.random.key(0))


def test_count_by_hand():
    c1, c3, c5 = 6 * (5 * 5 + 1), 16 * (6 * 5 * 5 + 1), 120 * (16 * 5 * 5 + 1)
    f6, head = 84 * (120 + 1), 10 * (84 + 1)
    assert (c1, c3, c5, f6, head) == (156, 2416, 48120, 10164, 850)
    assert model_info("lenet5").params == c1 + c3 + c5 + f6 + head == 61_706


def test_parameters_bear_the_papers_names(variables):
    shapes = {path: leaf.shape for path, leaf in pytree.flatten(variables["params"]).items()}
    kernels = {path: shape for path, shape in shapes.items() if path.endswith("kernel")}
    assert kernels == {
        "c1/kernel": (5, 5, 1, 6),
        "c3/kernel": (5, 5, 6, 16),
        "c5/kernel": (5, 5, 16, 120),
        "f6/kernel": (120, 84),
        "head/kernel": (84, 10),
    }
    assert variables["batch_stats"] == {}


def test_forward_is_the_definition(variables):
    params = jax.tree.map(np.asarray, variables["params"])
    images = np.random.RandomState(0).randn(3, 32, 32, 1).astype(np.float32)

    def conv(x, name):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
        y = np.einsum("nhwcij,ijco->nhwo", windows, params[name]["kernel"])
        return np.tanh(y + params[name]["bias"])

    def pool(x):
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))

    x = conv(pool(conv(pool(conv(images, "c1")), "c3")), "c5").reshape(3, 120)
    x = np.tanh(x @ params["f6"]["kernel"] + params["f6"]["bias"])
    features = create_model("lenet5", num_classes=None).apply(variables, images)
    np.testing.assert_allclose(features, x, atol=1e-5)
    logits = create_model("lenet5").apply(variables, images)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_sizes_and_channels(variables):
    model = create_model("lenet5")
    larger = jax.eval_shape(lambda: model.apply(variables, jnp.zeros((2, 45, 64, 1))))
    assert larger.shape == (2, 10)
    with pytest.raises(UserError, match="31x32 are too small: the smallest is 32x32"):
        model.apply(variables, jnp.zeros((1, 31, 32, 1)))
    with pytest.raises(UserError, match="expected images of 1 channels, got 3"):
        model.apply(variables, jnp.zeros((1, 32, 32, 3)))


def test_computes_in_bfloat16(variables):
    model = create_model("lenet5", dtype="bfloat16")
    images = np.random.RandomState(0).randn(3, 32, 32, 1).astype(np.float32)
    logits = model.apply(variables, images)
    assert logits.dtype == jnp.float32
    exact = create_model("lenet5").apply(variables, images)
    assert 0 < np.abs(logits - exact).max() < 0.05
