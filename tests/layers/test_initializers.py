"""Each initializer has its paper's standard deviation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.layers import caffe_xavier, gaussian, get_head_initializer, get_initializer


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("he", np.sqrt(2 / (3 * 3 * 128))),
        ("lecun", np.sqrt(1 / (3 * 3 * 64))),
        ("gaussian", 0.01),
    ],
)
def test_standard_deviation_of_a_kernel(name, std):
    kernel = get_initializer(name)(jax.random.key(0), (3, 3, 64, 128), jnp.float32)
    assert np.std(kernel) == pytest.approx(std, rel=0.02)
    # Not truncated: 0.27 % of a normal distribution is beyond three standard deviations.
    assert np.mean(np.abs(kernel) > 3 * std) == pytest.approx(0.0027, rel=0.2)


@pytest.mark.parametrize("shape", [(3, 3, 2, 16), (1, 1, 16, 8), (1, 1, 8, 16)])
def test_orthogonal_kernels_are_orthogonal_matrices(shape):
    matrix = get_initializer("orthogonal")(jax.random.key(0), shape, jnp.float32)
    matrix = np.reshape(matrix, (-1, shape[-1]))
    high = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    np.testing.assert_allclose(high.T @ high, np.eye(high.shape[1]), atol=1e-5)


def test_takes_a_function_or_a_known_name():
    assert get_initializer(max) is max
    with pytest.raises(UserError, match="unknown kernel_init 'hee'; did you mean 'he'"):
        get_initializer("hee")


def test_xavier_is_uniform_and_paper_is_the_given_initializer():
    kernel = get_initializer("xavier")(jax.random.key(0), (3, 3, 64, 128), jnp.float32)
    bound = np.sqrt(6 / (3 * 3 * (64 + 128)))  # equation 16
    assert 0.999 * bound < np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / np.sqrt(3), rel=0.01)
    kernel = get_initializer("paper", paper=gaussian(0.01))(jax.random.key(0), (5, 5, 64, 64))
    assert np.std(kernel) == pytest.approx(0.01, rel=0.02)
    with pytest.raises(UserError, match="unknown kernel_init 'paper'"):
        get_initializer("paper")


def test_caffes_xavier_is_uniform_by_the_fan_in():
    kernel = caffe_xavier(jax.random.key(0), (3, 3, 64, 128))
    bound = np.sqrt(3 / (3 * 3 * 64))
    assert 0.999 * bound < np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / np.sqrt(3), rel=0.01)


def test_a_head_is_initialized_as_in_the_paper_or_by_its_fan_in():
    assert get_head_initializer("paper", paper=max) is max
    for init in ("he", "xavier", min):
        assert get_head_initializer(init, paper=max) is get_initializer("lecun")
