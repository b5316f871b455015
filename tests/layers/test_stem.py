"""The shapes of stems, and the errors for images that do not fit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from flax_cnns.errors import UserError
from flax_cnns.layers import CifarStem, Conv, DeepStem, ImageNetStem, check_images, make_norm


@pytest.mark.parametrize(
    ("stem", "size", "expected"),
    [
        (CifarStem, 32, 32),
        (ImageNetStem, 224, 56),
        (ImageNetStem, 33, 9),  # rounded up twice: 17, 9
        (ImageNetStem, 1, 1),
    ],
)
def test_output_shape(stem, size, expected):
    module = stem(16, partial(Conv, use_bias=False), make_norm("batch", train=False))
    images = jnp.zeros((2, size, size, 3))
    y, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images))
    assert y.shape == (2, expected, expected, 16)
    assert set(variables["params"]) == {"conv", "norm"}


@pytest.mark.parametrize(
    ("ceil", "size", "expected"),
    # The inputs of Caffe's pool are 112, 57 and 2 wide. It has no padding and rounds up.
    [(False, 224, 56), (True, 224, 56), (False, 113, 29), (True, 113, 28), (True, 3, 1)],
)
@pytest.mark.parametrize("stem", [ImageNetStem, DeepStem])
def test_pool_of_the_stem(stem, ceil, size, expected):
    module = stem(16, partial(Conv, use_bias=False), make_norm("batch", train=False), ceil=ceil)
    images = jnp.zeros((2, size, size, 3))
    y, _ = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images))
    assert y.shape == (2, expected, expected, 16)
    if ceil:
        with pytest.raises(UserError, match="2x2 are too small: the smallest is 3x3"):
            module.init(jax.random.key(0), jnp.zeros((2, 2, 2, 3)))


def test_widths_of_the_deep_stem():
    module = DeepStem(64, partial(Conv, use_bias=False), make_norm("batch", train=False))
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    kernels = [tree["params"][f"conv{i}"]["kernel"].shape for i in (1, 2, 3)]
    assert kernels == [(3, 3, 3, 32), (3, 3, 32, 32), (3, 3, 32, 64)]
    assert tree["params"]["norm3"]["scale"].shape == (64,)


def test_images_that_do_not_fit():
    check_images(jnp.zeros((1, 40, 50, 3)), (32, 32, 3), smallest=32)
    with pytest.raises(UserError, match=r"images \[N H W C\], got the shape \(32, 32, 3\)"):
        check_images(jnp.zeros((32, 32, 3)), (32, 32, 3))
    with pytest.raises(UserError, match=r"expected images of 3 channels, got 1 .*\(28, 30, 1\)"):
        check_images(jnp.zeros((1, 28, 30, 1)), (32, 32, 3))
    with pytest.raises(UserError, match="31x40 are too small: the smallest is 32x32"):
        check_images(jnp.zeros((1, 31, 40, 3)), (32, 32, 3), smallest=32)


def test_images_with_their_channels_first():
    for shape, channels in (((2, 3, 32, 32), 3), ((1, 1, 28, 30), 1)):
        message = (
            rf"^images are \[N H W C\]: transpose \(0, 2, 3, 1\); expected {channels} channels"
        )
        with pytest.raises(UserError, match=message):
            check_images(jnp.zeros(shape), (32, 32, channels))
    # Images of three rows with an alpha channel are not mistaken for channels first.
    with pytest.raises(UserError, match="expected images of 3 channels, got 4"):
        check_images(jnp.zeros((2, 3, 3, 4)), (32, 32, 3))
