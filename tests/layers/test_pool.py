"""Pooling: windows, padding, ties, precision, derivatives; nn.max_pool on accelerators."""

from __future__ import annotations

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.layers import avg_pool, global_avg_pool, max_pool

# Nearly all of the time here is the compiler's.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def library(x, window, stride, padding=0):
    return nn.max_pool(x, (window,) * 2, (stride,) * 2, ((padding,) * 2,) * 2)


def images(*shape, dtype=np.float32):
    """Small whole numbers: many ties."""
    return np.random.RandomState(0).randint(-3, 4, shape).astype(dtype)


def with_gradient(pool, **fields):
    """x -> its pooled values, and a gradient in which no two windows count the same."""

    def run(x):
        y, transpose = jax.vjp(partial(pool, **fields), x)
        return y, transpose(jnp.arange(1, y.size + 1, dtype=y.dtype).reshape(y.shape))[0]

    return quick_jit(run)


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [v.dtype for v in jax.tree.leaves(ours)] == [v.dtype for v in jax.tree.leaves(theirs)]


def test_max_pool_never_sees_its_padding():
    x = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)  # all negative: zeros in the padding would win
    y = max_pool(x, 3, 2, padding=1)
    np.testing.assert_array_equal(y[0, :, :, 0], [[-1, -2], [-5, -6]])


@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [
        (1, 2, 0),
        (2, 1, 0),
        (2, 2, 0),
        (2, 3, 1),
        (3, 1, 1),
        (3, 2, 0),
        (3, 2, 1),
        (3, 3, 0),
        (5, 2, 2),
    ],
)
def test_max_pool_is_flax_ties_included(window, stride, padding):
    x = images(2, 7, 6, 3)  # sizes that do not divide
    fields = {"window": window, "stride": stride, "padding": padding}
    equal(with_gradient(max_pool, **fields)(x), with_gradient(library, **fields)(x))


def test_the_first_of_equal_pixels_has_the_gradient():
    grad = jax.grad(lambda x: max_pool(x, 2, 2).sum())
    np.testing.assert_array_equal(
        grad(jnp.ones((1, 4, 4, 1)))[0, :, :, 0],
        [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]],
    )


def test_nothing_but_minus_infinity_is_a_maximum_too():
    x = np.full((1, 4, 4, 1), -np.inf, np.float32)
    fields = {"window": 3, "stride": 2, "padding": 1}
    y, grad = with_gradient(max_pool, **fields)(x)
    np.testing.assert_array_equal(y, library(x, **fields))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("place", [(0, 0), (2, 2), (3, 1)])
def test_nan_reaches_every_window_that_sees_it(place):
    x = images(1, 5, 5, 2)
    x[0, *place, 1] = np.nan
    y = max_pool(x, 3, 2, 1)
    assert np.isnan(y).any()
    equal(y, library(x, 3, 2, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_max_pool_in_half_precision(dtype):
    x = images(2, 6, 6, 3, dtype=dtype)
    fields = {"window": 3, "stride": 2, "padding": 1}
    equal(with_gradient(max_pool, **fields)(x), with_gradient(library, **fields)(x))


def test_max_pool_of_integers_and_of_nothing():
    equal(
        max_pool(images(1, 5, 5, 2, dtype=np.int32), 3, 2),
        jnp.asarray(library(images(1, 5, 5, 2, dtype=np.int32), 3, 2)),
    )
    assert max_pool(jnp.zeros((0, 4, 4, 2)), 2, 2).shape == (0, 2, 2, 2)
    assert max_pool(jnp.zeros((1, 2, 2, 2)), 3, 2).shape == (1, 0, 0, 2)


def test_max_pool_mapped_and_derived_twice():
    x = np.random.RandomState(0).randn(3, 2, 6, 5, 2).astype(np.float32)

    def run(pool):
        pool = partial(pool, window=3, stride=2, padding=1)
        loss = lambda x: (pool(x) ** 3).sum()  # noqa: E731
        square = lambda x: (jax.grad(loss)(x) ** 2).sum()  # noqa: E731
        return quick_jit(
            lambda x: (
                jax.vmap(pool)(x),
                jax.vmap(jax.grad(loss), 3, 3)(x),
                jax.jvp(pool, (x[0],), (x[1],)),
                jax.grad(square)(x[0]),
                jax.jvp(jax.grad(loss), (x[0],), (x[1],))[1],
                jax.hessian(loss)(x[0, :1, :3, :3, :1]),
            )
        )(x)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), run(max_pool), run(library)
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_run_flax_and_nothing_else(platform):
    def lowered(pool):
        run = with_gradient(pool, window=3, stride=2, padding=1)
        return run.trace(images(2, 8, 8, 3)).lower(lowering_platforms=(platform,)).as_text()

    def operations(text):
        # Zeros stand for what the gradient on a CPU would have kept; XLA removes them.
        free = {"stablehlo.constant", "stablehlo.broadcast_in_dim", "stablehlo.case"}
        found = re.findall(r" = \"?(stablehlo\.\w+)", text)
        return sorted(name for name in found if name not in free)

    ours = operations(lowered(max_pool))
    assert ours == operations(lowered(library))
    assert {"stablehlo.reduce_window", "stablehlo.select_and_scatter"} <= set(ours)


def test_avg_pool_drops_what_fills_no_window():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(avg_pool(x, 2, 2)[0, :, :, 0], [[3, 5], [13, 15]])


def test_global_avg_pool_adds_in_float32():
    x = jnp.ones((1, 32, 32, 1), jnp.bfloat16).at[0, 0, 0, 0].set(2)
    y = global_avg_pool(x)  # bfloat16 has 8 bits: the sum of 1025 would come out as 1024
    assert y.dtype == jnp.float32
    assert y[0, 0] == 1025 / 1024
