"""Conv means what Flax's convolution means, and pads as PyTorch does."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from flax_cnns.layers import Conv


def direct(x, kernel, stride, padding):
    """The definition, in NumPy: a sum over each window."""
    side = kernel.shape[0]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows[:, ::stride, ::stride], kernel)


def test_is_the_definition_with_symmetric_padding():
    x = np.random.RandomState(0).randn(2, 6, 6, 3).astype(np.float32)
    conv = Conv(4, (3, 3), strides=2, padding=1, use_bias=False)
    variables = conv.init(jax.random.key(0), x)
    expected = direct(x, np.asarray(variables["params"]["kernel"]), 2, 1)
    np.testing.assert_allclose(conv.apply(variables, x), expected, atol=1e-5)
    # What "SAME" would give: it pads an even size at the end only.
    same = Conv(4, (3, 3), strides=2, padding="SAME", use_bias=False).apply(variables, x)
    assert same.shape == expected.shape
    assert np.abs(same - expected).max() > 0.1


def test_has_the_parameters_of_flax():
    x = np.zeros((1, 5, 5, 4), np.float32)
    ours = Conv(8, (3, 3), feature_group_count=2).init(jax.random.key(0), x)
    flax = nn.Conv(8, (3, 3), feature_group_count=2).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours, flax)
