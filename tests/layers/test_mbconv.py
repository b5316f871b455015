"""Depthwise separable convolutions, inverted residuals, and rounding of widths and depths."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.layers.conv import conv2d

conv = partial(layers.Conv, use_bias=False)
norm = layers.make_norm("batch", train=False)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, 6, 5, 4))


@pytest.mark.parametrize(("stride", "padding"), [(1, "torch"), (2, "torch"), (2, "same")])
def test_separable_is_a_dense_convolution_of_low_rank(x, stride, padding):
    """Chollet 2016: K[h w c o] = sum_m D[h w c*mult+m] P[c*mult+m o], D depthwise, P pointwise."""
    mult, width = 3, 5
    module = layers.SeparableConv(
        width, conv, stride=stride, depth_multiplier=mult, padding=padding
    )
    y, variables = module.init_with_output(KEY, x)
    params = variables["params"]
    depthwise, pointwise = params["depthwise"]["kernel"], params["pointwise"]["kernel"]
    assert (depthwise.shape, pointwise.shape) == ((3, 3, 1, 4 * mult), (1, 1, 4 * mult, width))
    dense = jnp.einsum(
        "hwcm,cmo->hwco", depthwise.reshape(3, 3, 4, mult), pointwise.reshape(4, mult, width)
    )
    sides = {"torch": 1, "same": "SAME"}[padding]
    expected = conv2d(x, dense, strides=stride, padding=sides)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_separable_with_a_norm_and_an_activation_between(x):
    module = layers.SeparableConv(5, conv, norm=norm, activation=nn.relu6)
    variables = module.init(KEY, x)
    flat = pytree.flatten(variables)
    flat["params/depthwise_norm/scale"] = jnp.zeros(4)
    flat["params/depthwise_norm/bias"] = jnp.asarray([-1.0, 2.0, 9.0, 0.0])
    y = module.apply(pytree.unflatten(flat), x)
    expected = jnp.asarray([0.0, 2.0, 6.0, 0.0]) @ flat["params/pointwise/kernel"][0, 0]
    np.testing.assert_allclose(y, jnp.broadcast_to(expected, y.shape), rtol=1e-4, atol=1e-6)


def test_the_two_paddings_differ_at_stride_2_on_even_sizes():
    """The kernel copies its first pixel, which is in the padding (torch) or in the map (same)."""
    image = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 0] = 1

    def run(padding, image):
        padding = layers.resolve_padding(padding, 3)
        return conv2d(image, kernel, strides=2, padding=padding)[0, :, :, 0]

    np.testing.assert_array_equal(run("same", image), [[1, 3], [9, 11]])
    np.testing.assert_array_equal(run("torch", image), [[0, 0], [0, 6]])
    odd = image[:, :3, :3]
    np.testing.assert_array_equal(run("same", odd), run("torch", odd))
    assert [layers.resolve_padding("torch", k) for k in (1, 3, 5, 7)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="unknown padding 'SAME'; known: same, torch"):
        layers.resolve_padding("SAME", 3)


@pytest.mark.parametrize("width", [3, 10, 11.2, 16.8, 42, 44, 100, 352.5, 1000])
@pytest.mark.parametrize("divisor", [8, 4])
def test_widths_are_multiples_and_never_below_90_percent(width, divisor):
    rounded = layers.round_width(width, divisor)
    assert rounded % divisor == 0
    assert rounded >= 0.9 * width
    assert abs(rounded - width) < divisor


def test_rounding_as_published():
    """Widths of EfficientNet-B1 to B3 and MobileNetV2; depths of B1: 1.1 times 1, 2, 3, 4."""
    assert [layers.round_width(w * 1.2) for w in (32, 16, 24, 40, 320)] == [40, 24, 32, 48, 384]
    assert [layers.round_width(w * 0.35) for w in (32, 16, 24, 96)] == [16, 8, 8, 32]
    assert [layers.round_depth(1.1 * n) for n in (1, 2, 3, 4)] == [2, 3, 4, 5]
    assert layers.round_depth(2) == 2


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_not_above_zero_is_named(factor):
    with pytest.raises(UserError, match=r"a width above 0, got .* width_mult must be a factor"):
        layers.round_width(32 * factor)
    with pytest.raises(UserError, match=r"a depth above 0, got .* depth_mult must be a factor"):
        layers.round_depth(2 * factor)


@pytest.mark.parametrize(("width", "stride", "added"), [(4, 1, True), (4, 2, False), (8, 1, False)])
def test_input_is_added_if_the_shape_does_not_change(x, width, stride, added):
    block = layers.MBConv(width, conv, norm, stride, zero_init=True)
    y, variables = block.init_with_output(KEY, x)
    assert y.shape == (2, -(-6 // stride), -(-5 // stride), width)
    assert bool((variables["params"]["project_norm"]["scale"] == 0).all()) is added
    if added:
        np.testing.assert_array_equal(y, x)
    else:
        assert float(jnp.std(y)) > 0.1


def test_the_projection_is_linear_and_the_rest_is_not(x):
    """A negated projection gives -y. The activation follows the other two convolutions."""
    seen = []
    block = layers.MBConv(8, conv, norm, activation=lambda v: seen.append(v.shape) or nn.relu6(v))
    y, variables = block.init_with_output(KEY, x)
    assert seen == [(2, 6, 5, 24)] * 2
    flat = pytree.flatten(variables)
    flat["params/project/kernel"] *= -1
    np.testing.assert_allclose(block.apply(pytree.unflatten(flat), x), -y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "inner", "squeeze"),
    [
        (dict(expansion=6), 24, 1),
        (dict(expansion=2.5), 10, 1),
        (dict(inner=7, squeeze=3), 7, 3),
        (dict(expansion=1), 4, 1),
    ],
)
def test_inner_widths(x, fields, inner, squeeze):
    block = layers.MBConv(8, conv, norm, kernel_size=5, se=layers.SqueezeExcite, **fields)
    params = jax.eval_shape(block.init, KEY, x)["params"]
    assert params["depthwise"]["kernel"].shape == (5, 5, 1, inner)
    assert params["se"]["reduce"]["kernel"].shape == (inner, squeeze)
    assert params["se"]["expand"]["kernel"].shape == (squeeze, inner)
    assert ("expand" in params) is (inner != 4)


def test_branch_is_dropped_only_where_there_is_a_shortcut(x):
    drop = layers.DropPath(jnp.float32(0.99), jax.random.key(3), "sample")
    block = layers.MBConv(4, conv, norm)
    variables = block.init(KEY, x)
    assert not bool(jax.random.bernoulli(drop.key, 1 - drop.rate, (2, 1, 1, 1)).any())
    np.testing.assert_array_equal(block.apply(variables, x, drop), x)
    wider = layers.MBConv(8, conv, norm)
    variables = wider.init(KEY, x)
    np.testing.assert_array_equal(wider.apply(variables, x, drop), wider.apply(variables, x))
