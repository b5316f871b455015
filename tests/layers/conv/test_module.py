"""Conv and conv2d have nn.Conv's parameters, results and errors."""

from __future__ import annotations

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.layers import Conv
from flax_cnns.layers.conv import conv2d
from tests.layers.conv.cases import Case, quick_jit, same

SHAPE = (2, 6, 5, 4)
FIELDS = {
    "default": {},
    "no bias": {"use_bias": False},
    "strides": {"strides": 2},
    "two strides": {"strides": (1, 2)},
    "list of strides": {"kernel_size": [3, 2], "strides": [2, 1]},
    "no strides": {"strides": None},
    "VALID": {"padding": "VALID"},
    "CIRCULAR": {"padding": "CIRCULAR"},
    "REFLECT": {"padding": "REFLECT", "kernel_dilation": 2},
    "padding": {"padding": 2, "strides": 2},
    "two paddings": {"padding": (1, 0)},
    "pairs": {"padding": ((0, 2), (1, -1))},
    "dilated kernel": {"kernel_dilation": (2, 1)},
    "dilated input": {"input_dilation": (1, 2), "padding": 1},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4, "features": 8},
    "mask": {"mask": np.tri(4, 6, dtype=np.float32) * np.ones((3, 3, 1, 1), np.float32)},
    "bfloat16": {"dtype": jnp.bfloat16},
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16, "param_dtype": jnp.float16},
    "precision": {"precision": "highest"},
    "bias": {"bias_init": nn.initializers.normal(1.0)},
    "one dimension": {"kernel_size": (3,), "padding": "CAUSAL"},
    "an int is one dimension": {"kernel_size": 3},
    "three dimensions": {"kernel_size": (1, 2, 3)},
}
SHAPES = {"one dimension": (2, 7, 4), "three dimensions": (1, 3, 4, 5, 4)}


@pytest.mark.parametrize("name", FIELDS)
def test_has_the_parameters_and_results_of_flax(name):
    x = np.random.RandomState(0).randn(*SHAPES.get(name, SHAPE)).astype(np.float32)
    fields = {"features": 6, "kernel_size": (3, 3), **FIELDS[name]}
    run = lambda conv: conv(**fields).init_with_output(jax.random.key(0), x)  # noqa: E731
    (ours, own), (theirs, params) = quick_jit(lambda: (run(Conv), run(nn.Conv)))()
    assert jax.tree.structure(own) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, own, params)
    half = ours.dtype.itemsize == 2  # the library adds in half precision
    same(np.float32(ours), np.float32(theirs), 2e-2 if half else 1e-5)
    assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("shape", [(6, 5, 4), (2, 1, 3, 6, 5, 4), (2, 0, 6, 5, 4)])
def test_batches_of_any_rank(shape):
    x = np.random.RandomState(0).randn(*shape).astype(np.float32)
    conv = Conv(3, (3, 3), strides=2)
    params = conv.init(jax.random.key(0), np.zeros(SHAPE, np.float32))
    loss = lambda conv: lambda p, x: (lambda y: (jnp.sin(y).sum(), y))(conv.apply(p, x))  # noqa: E731
    ours, theirs = (
        jax.grad(loss(c), (0, 1), has_aux=True)(params, x)
        for c in (conv, nn.Conv(3, (3, 3), strides=2))
    )
    assert ours[1].shape == (*shape[:-3], 3, 3, 3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)


WRONG = {
    "groups of channels": {"feature_group_count": 3},
    "groups of features": {"feature_group_count": 4},
    "unknown padding": {"padding": "SAMEE"},
    "three paddings": {"padding": (1, 1, 1)},
    "three strides": {"strides": (1, 1, 1)},
    "no stride": {"strides": 0},
    "stride backwards": {"strides": -1},
    "no dilation": {"kernel_dilation": 0},
    "three dilations": {"kernel_dilation": (1, 1, 1)},
    "cropped to nothing": {"padding": -4},
    "mask": {"mask": np.ones((3, 3))},
    "no features": {"features": -1},
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", WRONG)
def test_bad_fields_get_the_error_of_flax(name):
    def message(conv):
        with pytest.raises((AssertionError, TypeError, ValueError, RuntimeError)) as caught:
            conv(**{"features": 6, "kernel_size": (3, 3), **WRONG[name]}).init(
                jax.random.key(0), jnp.ones(SHAPE)
            )
        return caught.type, re.sub(r"loc\(.*\)", "", str(caught.value))

    assert message(Conv) == message(nn.Conv)


def test_bad_operands_get_the_error_of_the_library():
    x, kernel = jnp.ones(SHAPE), jnp.ones((3, 3, 4, 6))
    for x_, kernel_, fields, type_, text in [
        (x, kernel[:, :, :3], {}, ValueError, "feature dimension size .* 4 // 1 != 3"),
        (x, kernel[0], {}, TypeError, "ndim to be equal, got 4 and 3"),
        (x[0], kernel, {}, TypeError, "ndim to be equal, got 3 and 4"),
        (x, kernel.astype(jnp.bfloat16), {}, TypeError, "same dtypes, got float32, bfloat16"),
        (x, kernel[:, :, :2], {"groups": 4}, ValueError, "4 // 4 != 2"),
        (x, kernel, {"padding": "CIRCULAR"}, RuntimeError, "expected 'VALID', 'SAME'"),
        (x, kernel, {"padding": (1, 2, 3)}, TypeError, "explicit pads .* expected 2, got 3"),
        (x, kernel, {"strides": (1, 1, 1)}, ValueError, "broadcast"),
        (x, kernel, {"dilation": (1,)}, ValueError, "window-dilation .* got: 1"),
    ]:
        with pytest.raises(type_, match=text):
            conv2d(x_, kernel_, **fields)


def test_a_kernel_that_does_not_fit_sees_nothing_as_in_flax():
    x = jnp.ones(SHAPE)
    for conv in (Conv, nn.Conv):
        y, _ = conv(6, (7, 7), padding="VALID").init_with_output(jax.random.key(0), x)
        assert y.shape == (2, 0, 0, 6)


def test_integers_and_complex_numbers_are_the_libraries():
    for dtype in (jnp.int32, jnp.complex64):
        x, kernel = jnp.ones(SHAPE, dtype), jnp.ones((3, 3, 4, 6), dtype)
        same(conv2d(x, kernel), Case(SHAPE[:3], 4, 6).library(x, kernel))


def test_equal_fields_make_equal_modules():
    assert Conv(4, (3, 3)) == Conv(4, (3, 3))
    assert hash(Conv(4, (3, 3))) == hash(Conv(4, (3, 3)))
    assert Conv(4, (3, 3)).clone(features=5) == Conv(5, (3, 3))
