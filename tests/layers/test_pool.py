"""Pooling: windows, padding, precision."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from flax_cnns.layers import avg_pool, global_avg_pool, max_pool


def test_max_pool_never_sees_its_padding():
    x = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)  # all negative: zeros in the padding would win
    y = max_pool(x, 3, 2, padding=1)
    np.testing.assert_array_equal(y[0, :, :, 0], [[-1, -2], [-5, -6]])


def test_avg_pool_drops_what_fills_no_window():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(avg_pool(x, 2, 2)[0, :, :, 0], [[3, 5], [13, 15]])


def test_global_avg_pool_adds_in_float32():
    x = jnp.ones((1, 32, 32, 1), jnp.bfloat16).at[0, 0, 0, 0].set(2)
    y = global_avg_pool(x)  # bfloat16 has 8 bits: the sum of 1025 would come out as 1024
    assert y.dtype == jnp.float32
    assert y[0, 0] == 1025 / 1024
