"""Multi-head attention compared with Flax's own, and its MACs."""

from __future__ import annotations

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.layers import MultiHeadAttention

X = jax.random.normal(jax.random.key(0), (2, 5, 12))


def test_it_is_flaxs_with_queries_keys_and_values_in_one_layer():
    normal = dict(kernel_init=nn.initializers.normal(0.5), bias_init=nn.initializers.normal(0.5))
    theirs = nn.MultiHeadDotProductAttention(3, **normal)
    expected, variables = theirs.init_with_output(jax.random.key(1), X)
    their = variables["params"]
    parts = [their[name] for name in ("query", "key", "value")]
    params = {
        "qkv": {
            "kernel": np.concatenate([part["kernel"].reshape(12, 12) for part in parts], axis=1),
            "bias": np.concatenate([part["bias"].reshape(12) for part in parts]),
        },
        "out": {"kernel": their["out"]["kernel"].reshape(12, 12), "bias": their["out"]["bias"]},
    }
    got = MultiHeadAttention(3, nn.Dense).apply({"params": params}, X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16():
    attention = MultiHeadAttention(3, partial(nn.Dense, dtype=jnp.bfloat16))
    variables = MultiHeadAttention(3, nn.Dense).init(jax.random.key(1), X)
    y = jax.jit(attention.apply)(variables, X)
    assert y.dtype == jnp.bfloat16
    exact = MultiHeadAttention(3, nn.Dense).apply(variables, X)
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.05)


def test_macs_are_those_of_the_dense_layers_and_of_both_products():
    rows = {row.path: row for row in cost(MultiHeadAttention(3, nn.Dense), X.shape).layers}
    assert rows["qkv"].macs == 2 * 5 * 12 * 36
    assert rows["products"].macs == 2 * 2 * 3 * 5 * 5 * 4  # images, products, heads, T, T, D
    assert rows["products"].output_shape == (2, 5, 3, 4)
    assert rows["out"].macs == 2 * 5 * 12 * 12


def test_heads_that_do_not_divide():
    with pytest.raises(UserError, match="a number of heads that divides 12 channels, got 5"):
        MultiHeadAttention(5, nn.Dense).init(jax.random.key(0), X)


def test_dense_layers_on_tokens_are_those_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    plain, flat = nn.Dense(3), nn.Dense(3, dot_general=layers.flat_dot_general)
    params = plain.init(jax.random.key(1), x)

    def loss(dense):
        return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(dense.apply(p, x))), (0, 1))

    chex.assert_trees_all_close(loss(flat)(params, x), loss(plain)(params, x), rtol=1e-5)
