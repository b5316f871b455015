"""Pooling: windows, padding, ties, precision and derivatives; TPUs run nn.max_pool."""

from __future__ import annotations

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.layers import adaptive_avg_pool, avg_pool, global_avg_pool, max_pool, pool

# Nearly all of the time of these tests is compile time.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def library(x, window, stride, padding=0):
    pads = padding if padding == "SAME" else ((padding,) * 2,) * 2
    return nn.max_pool(x, (window,) * 2, (stride,) * 2, pads)


def images(*shape, dtype=np.float32):
    """Returns small integers, which have many ties."""
    return np.random.RandomState(0).randint(-3, 4, shape).astype(dtype)


def with_gradient(pool, **fields):
    """Returns x -> (pooled values, a gradient in which each window has its own weight)."""

    def run(x):
        y, transpose = jax.vjp(partial(pool, **fields), x)
        return y, transpose(jnp.arange(1, y.size + 1, dtype=y.dtype).reshape(y.shape))[0]

    return quick_jit(run)


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [v.dtype for v in jax.tree.leaves(ours)] == [v.dtype for v in jax.tree.leaves(theirs)]


def on_gpu(x, window, stride, padding):
    """Max pooling as a GPU computes it, here on a CPU."""
    size, args = pool._geometry(x, window, stride, padding, False)
    return pool.choose_taps(x, window, stride, [before for before, _ in args["padding"]], size)


def test_max_pool_ignores_its_padding():
    x = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)  # negative: zeros in the padding would be maxima
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
        (2, 1, "SAME"),
        (3, 2, "SAME"),
    ],
)
def test_max_pool_is_flaxs_also_with_ties(window, stride, padding):
    x = images(2, 7, 6, 3)  # sizes that the strides do not divide
    fields = {"window": window, "stride": stride, "padding": padding}
    equal(with_gradient(max_pool, **fields)(x), with_gradient(library, **fields)(x))


def test_the_first_of_equal_pixels_gets_the_gradient():
    grad = jax.grad(lambda x: max_pool(x, 2, 2).sum())
    np.testing.assert_array_equal(
        grad(jnp.ones((1, 4, 4, 1)))[0, :, :, 0],
        [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]],
    )


def test_minus_infinity_can_be_the_maximum():
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
    theirs = with_gradient(library, **fields)(x)
    equal(with_gradient(max_pool, **fields)(x), theirs)
    equal(with_gradient(on_gpu, **fields)(x), theirs)


def test_max_pool_of_integers_and_of_nothing():
    equal(
        max_pool(images(1, 5, 5, 2, dtype=np.int32), 3, 2),
        jnp.asarray(library(images(1, 5, 5, 2, dtype=np.int32), 3, 2)),
    )
    assert max_pool(jnp.zeros((0, 4, 4, 2)), 2, 2).shape == (0, 2, 2, 2)
    assert max_pool(jnp.zeros((1, 2, 2, 2)), 3, 2).shape == (1, 0, 0, 2)


def test_max_pool_under_vmap_and_second_derivatives():
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

    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    theirs = run(library)
    jax.tree.map(close, run(max_pool), theirs)
    jax.tree.map(close, run(on_gpu), theirs)


@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [(2, 2, 0), (3, 1, 1), (3, 2, "SAME")],
)
def test_max_pool_on_a_gpu_is_flaxs_also_with_ties(window, stride, padding):
    x = images(2, 7, 6, 3)
    fields = {"window": window, "stride": stride, "padding": padding}
    equal(with_gradient(on_gpu, **fields)(x), with_gradient(library, **fields)(x))
    x[0, 2, 2] = np.nan
    equal(on_gpu(x, **fields), library(x, **fields))


def lower_for(platform, pool, window):
    """Returns the operations of a pooling and its gradient."""
    run = with_gradient(pool, window=window, stride=2, padding=1)
    text = run.trace(images(2, 8, 8, 3)).lower(lowering_platforms=(platform,)).as_text()
    # Zeros replace the residuals of the other platforms' gradients; XLA removes them.
    free = {"stablehlo.constant", "stablehlo.broadcast_in_dim", "stablehlo.case"}
    names = re.findall(r" = \"?(stablehlo\.\w+)", text)
    return sorted(name for name in names if name not in free)


@pytest.mark.parametrize(("platform", "window"), [("tpu", 3), ("cuda", 4)])
def test_a_tpu_and_large_windows_run_flax_and_nothing_else(platform, window):
    ours = lower_for(platform, max_pool, window)
    assert ours == lower_for(platform, library, window)
    assert {"stablehlo.reduce_window", "stablehlo.select_and_scatter"} <= set(ours)


def test_a_gpu_scatters_nothing():
    ours = lower_for("cuda", max_pool, 3)
    assert not {"stablehlo.reduce_window", "stablehlo.select_and_scatter"} & set(ours)
    assert ours.count("stablehlo.slice") >= 9


def test_avg_pool_drops_pixels_that_fill_no_window():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(avg_pool(x, 2, 2)[0, :, :, 0], [[3, 5], [13, 15]])


def test_avg_pool_with_tensorflows_padding_is_flax_without_counting_it():
    # The height is padded by 1 at the top, the width by 0 on the left.
    x = np.random.RandomState(0).randn(2, 7, 6, 3).astype(np.float32)
    theirs = nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)
    np.testing.assert_allclose(avg_pool(x, 3, 2, padding="SAME"), theirs, atol=1e-6)


def test_global_avg_pool_adds_in_float32():
    x = jnp.ones((1, 32, 32, 1), jnp.bfloat16).at[0, 0, 0, 0].set(2)
    y = global_avg_pool(x)  # in bfloat16, which has 8 bits, the sum 1025 is 1024
    assert y.dtype == jnp.float32
    assert y[0, 0] == 1025 / 1024


def windows(n, window, stride, padding, ceil):
    """Yields (begin, end) of each window along one axis, with padding, by PyTorch's rule."""
    begin, reached = -padding, False
    while begin + window <= n + padding or (ceil and begin < n and not reached):
        yield begin, min(begin + window, n + padding)
        reached = begin + window == n + padding
        begin += stride


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    ("window", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1), (2, 3, 0), (3, 1, 1)]
)
def test_pools_are_their_definition_window_by_window(window, stride, padding, ceil):
    x = np.random.RandomState(0).randn(1, 8, 6, 2).astype(np.float32)
    rows, columns = (list(windows(n, window, stride, padding, ceil)) for n in (8, 6))
    shape = (len(rows), len(columns), 2)
    largest, means, inner_means = np.empty(shape), np.empty(shape), np.empty(shape)
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            seen = x[0, max(top, 0) : bottom, max(left, 0) : right]
            largest[i, j] = seen.max((0, 1))
            means[i, j] = seen.sum((0, 1)) / ((bottom - top) * (right - left))
            inner_means[i, j] = seen.mean((0, 1))
    given = (window, stride, padding, ceil)
    np.testing.assert_array_equal(max_pool(x, *given)[0], largest.astype(np.float32))
    np.testing.assert_allclose(avg_pool(x, *given)[0], means, atol=1e-6)
    np.testing.assert_allclose(avg_pool(x, *given, count_padding=False)[0], inner_means, atol=1e-6)


def test_ceil_mode_has_a_gradient_if_the_last_window_is_cut():
    x = np.random.RandomState(0).randn(2, 6, 6, 3).astype(np.float32)
    grad = quick_jit(jax.grad(lambda x: max_pool(x, 3, 2, ceil=True).sum()))(x)
    assert max_pool(x, 3, 2, ceil=True).shape == (2, 3, 3, 3)
    assert np.asarray(grad).sum() == 2 * 3 * 3 * 3  # each window gives one


@pytest.mark.parametrize("size", [(7, 7), (14, 21), (9, 10), (3, 1)])
def test_adaptive_avg_pool_is_its_definition(size):
    x = np.random.RandomState(0).randn(2, *size, 3).astype(np.float32)
    expected = np.empty((2, 7, 7, 3))
    for i in range(7):
        for j in range(7):
            rows = slice(i * size[0] // 7, -(-(i + 1) * size[0] // 7))
            columns = slice(j * size[1] // 7, -(-(j + 1) * size[1] // 7))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(adaptive_avg_pool(x, 7), expected, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [5, 6, 7, 8, 9])
def test_pools_are_pytorchs(size, padding):
    torch = pytest.importorskip("torch")
    x = np.random.RandomState(0).randn(2, size, size + 1, 3).astype(np.float32)
    t = torch.from_numpy(x.transpose(0, 3, 1, 2))
    pools, f = torch.nn.functional, dict(padding=padding, ceil_mode=True)
    for ours, theirs in [
        (max_pool(x, 3, 2, padding, ceil=True), pools.max_pool2d(t, 3, 2, **f)),
        (avg_pool(x, 3, 2, padding, ceil=True), pools.avg_pool2d(t, 3, 2, **f)),
        (adaptive_avg_pool(x, 4), pools.adaptive_avg_pool2d(t, 4)),
    ]:
        np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-6)
