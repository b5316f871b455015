"""Squeeze-and-excitation is its paper's equations."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.layers import SqueezeExcite


def test_equations_2_to_4():
    x = np.random.RandomState(0).standard_normal((3, 4, 5, 8)).astype(np.float32)
    module = SqueezeExcite(reduction=4)
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda a: a + 0.1, params)  # biases start at zero
    hidden = x.mean((1, 2)) @ params["reduce"]["kernel"] + params["reduce"]["bias"]
    assert hidden.shape == (3, 2)
    scale = np.maximum(hidden, 0) @ params["expand"]["kernel"] + params["expand"]["bias"]
    expected = x / (1 + np.exp(-scale))[:, None, None, :]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "fields", "hidden"),
    [
        *((64, {}, 4), (64, {"divisor": 8}, 8), (192, {"divisor": 8}, 16), (8, {}, 1)),
        (256, {"reduction": 8}, 32),
    ],
)
def test_the_width_between(channels, fields, hidden):
    x = jnp.zeros((1, 2, 2, channels), jnp.bfloat16)
    module = SqueezeExcite(dtype=jnp.bfloat16, **fields)
    y, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert variables["params"]["reduce"]["kernel"].shape == (channels, hidden)
    assert variables["params"]["reduce"]["kernel"].dtype == jnp.float32


def test_given_width_activation_and_gate():
    """MobileNetV3 uses hard sigmoid, which is 0 below -3 and 1 above 3."""
    x = jnp.ones((1, 1, 1, 4))
    module = SqueezeExcite(inner=3, activation=nn.silu, gate=nn.hard_sigmoid)
    params = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), x)["params"])
    assert params["reduce"]["kernel"].shape == (4, 3)
    params["reduce"]["bias"] = jnp.asarray([-2.0, 0.0, 0.0])
    params["expand"]["kernel"] = jnp.zeros((3, 4)).at[0].set(1.0)
    params["expand"]["bias"] = jnp.asarray([-9.0, 9.0, 0.0, 1.5])
    silu = -2 / (1 + np.exp(2.0))
    expected = [0, 1, (silu + 3) / 6, (silu + 4.5) / 6]
    np.testing.assert_allclose(module.apply({"params": params}, x)[0, 0, 0], expected, rtol=1e-5)
