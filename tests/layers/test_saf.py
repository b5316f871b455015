"""SAF pooling: which responses are dropped, how the others are scaled, and evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.layers import SAFPool, max_pool

IMAGES = np.random.RandomState(0).rand(3, 8, 8, 10).astype(np.float32) + 0.1
KEY = {"dropout": jax.random.key(0)}


@pytest.mark.parametrize("choose", ["random", "strongest"])
@pytest.mark.parametrize("window", [2, None])
def test_evaluation_is_max_pooling(choose, window):
    out = SAFPool(0.5, window, choose).apply({}, IMAGES, False)
    expected = max_pool(IMAGES, 2, 2) if window else IMAGES.max((1, 2))
    np.testing.assert_array_equal(out, expected)


def test_random_drops_a_fraction_and_scales_the_others():
    pooled = np.asarray(max_pool(IMAGES, 2, 2))
    pool = SAFPool(0.25, 2, "random")
    out = np.asarray(pool.apply({}, IMAGES, True, rngs=KEY))
    off = out == 0
    assert 0.15 < off.mean() < 0.35  # of 480: the standard deviation is 0.02
    np.testing.assert_allclose(out[~off], pooled[~off] / 0.75, rtol=1e-6)
    other = pool.apply({}, IMAGES, True, rngs={"dropout": jax.random.key(1)})
    assert (np.asarray(other) != out).any()


@pytest.mark.parametrize("window", [2, None])
def test_strongest_drops_the_largest_of_each_image(window):
    pooled = np.asarray(max_pool(IMAGES, 2, 2) if window else IMAGES.max((1, 2))).reshape(3, -1)
    out = SAFPool(0.2, window, "strongest").apply({}, IMAGES, True)  # no random stream
    for before, after in zip(pooled, np.asarray(out).reshape(3, -1)):
        count = round(0.2 * before.size)
        expected = before.copy()
        expected[np.argsort(before)[-count:]] = 0
        np.testing.assert_array_equal(after, expected)


def test_gradients_reach_the_kept_responses():
    def total(images):
        return SAFPool(0.2, 2, "strongest").apply({}, images, True).sum()

    grad = np.asarray(jax.grad(total)(IMAGES))
    assert grad.sum() == 3 * (160 - 32)  # 32 of the 4 x 4 x 10 responses per image are dropped


@pytest.mark.parametrize("choose", ["random", "strongest"])
def test_a_rate_of_zero_changes_nothing(choose):
    out = SAFPool(0.0, 2, choose).apply({}, IMAGES, True, rngs=KEY)
    np.testing.assert_array_equal(out, max_pool(IMAGES, 2, 2))


def test_mistakes():
    with pytest.raises(UserError, match=r"from 0 to below 1, got 1\.0"):
        SAFPool(1.0).apply({}, jnp.asarray(IMAGES), True)
    with pytest.raises(UserError, match="did you mean 'strongest'"):
        SAFPool(0.1, choose="strong").apply({}, jnp.asarray(IMAGES), True)
