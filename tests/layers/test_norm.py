"""Normalization: closed forms, running statistics, precision and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.layers import local_response_norm, make_norm
from flax_cnns.layers.norm import check_batch_norms

X = np.random.RandomState(0).randn(8, 4, 4, 32).astype(np.float32) * 3 + 1


def test_batch_norm_in_training_normalizes_the_batch_and_updates_the_statistics_by_a_tenth():
    norm = make_norm("batch", train=True)()
    variables = norm.init(jax.random.key(0), X)
    y, moved = norm.apply(variables, X, mutable=["batch_stats"])
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    np.testing.assert_allclose(y, (X - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    # new = 0.9 old + 0.1 batch, from mean 0 and variance 1
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9 + 0.1 * var, atol=1e-5)


def test_batch_norm_in_evaluation_uses_the_statistics():
    norm = make_norm("batch", train=False)()
    variables = norm.init(jax.random.key(0), X)
    mean, var = np.arange(32.0), np.arange(1.0, 33.0)
    variables["batch_stats"] = {"mean": mean, "var": var}
    y = norm.apply(variables, X)
    np.testing.assert_allclose(y, (X - mean) / np.sqrt(var + 1e-5), atol=1e-5)


@pytest.mark.parametrize("name", ["batch", "group"])
def test_a_norm_is_captured_once(name):
    norm = make_norm(name, train=True)()
    mutable = ["batch_stats", "intermediates"]
    captured = norm.init_with_output(
        jax.random.key(0), X, capture_intermediates=True, mutable=["params", *mutable]
    )[1]["intermediates"]
    assert len(captured["__call__"]) == 1


def test_batch_norm_refuses_to_train_on_one_value_per_channel():
    norm = make_norm("batch", train=True)()
    variables = norm.init(jax.random.key(0), X[:1, :1, :1])
    apply = lambda x, norm=norm: norm.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
    for one in (X[:1, :1, :1], X[0, 0, :1]):
        with pytest.raises(UserError, match=r"BatchNorm of \[.*1, 32\].* 1 value per channel"):
            jax.eval_shape(apply, one)
    for more in (X[:2, :1, :1], X[:1, :1, :2], X[0, 0, :2]):
        jax.eval_shape(apply, more)
    frozen = make_norm("batch", train=False)()
    assert frozen.apply(variables, X[:1, :1, :1]).shape == (1, 1, 1, 32)
    # With an axis name, the values on all devices count.
    both = lambda x: apply(x, make_norm("batch", train=True, axis_name="batch")())  # noqa: E731
    devices = jax.vmap(both, axis_name="batch")
    jax.eval_shape(devices, X[:2, None, :1, :1])
    with pytest.raises(UserError, match="1 value per channel"):
        jax.eval_shape(devices, X[:1, None, :1, :1])


class Nested(nn.Module):
    """A BatchNorm inside a lifted function."""

    lift: Callable

    @nn.compact
    def __call__(self, x):
        return self.lift(lambda module, x: make_norm("batch", train=True)(name="norm")(x))(self, x)


def _scan(body):
    def scanned(module, x):
        axes = {"params": 0, "batch_stats": 0}
        run = nn.scan(lambda m, x, _: (body(m, x), None), variable_axes=axes, length=2)
        return run(module, x, None)[0]

    return scanned


LIFTS = {
    "none": lambda body: body,
    "remat": nn.remat,
    "scan": _scan,
    "cond": lambda body: lambda m, x: nn.cond(x.sum() > 0, body, lambda m, x: x, m, x),
    "map": lambda body: nn.map_variables(body, "batch_stats", mutable=True),
}


@pytest.mark.parametrize("lift", LIFTS)
def test_batch_norm_says_that_its_statistics_must_be_mutable(lift):
    plain = Nested(LIFTS["none"])
    variables = jax.eval_shape(plain.init, jax.random.key(0), X)
    if lift == "scan":
        add = lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype)  # noqa: E731
        variables = jax.tree.map(add, variables)
    network = Nested(LIFTS[lift])
    message = r'the running statistics of norm: expected apply\(.*mutable=\["batch_stats"\]\)'
    with pytest.raises(UserError, match=message) as error:
        jax.eval_shape(network.apply, variables, X)
    assert "\n" not in str(error.value)
    _, moved = jax.eval_shape(partial(network.apply, mutable=["batch_stats"]), variables, X)
    assert moved == {"batch_stats": variables["batch_stats"]}


def test_flax_own_batch_norm_is_checked_in_the_context():
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X[:1, :1, :1])
    apply = lambda: layer.apply(variables, X[:1, :1, :1], mutable=["batch_stats"])  # noqa: E731
    apply()
    with check_batch_norms(), pytest.raises(UserError, match="1 value per channel"):
        apply()


def test_statistics_stay_float32_under_bfloat16():
    norm = make_norm("batch", train=True, dtype=jnp.bfloat16)()
    variables = norm.init(jax.random.key(0), X)
    y, moved = norm.apply(variables, X, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, moved))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * X.mean((0, 1, 2)), atol=1e-5)


def test_group_norm_normalizes_sixteen_channels_of_each_image_and_keeps_nothing():
    norm = make_norm("group", train=True, axis_name="batch")()
    variables = norm.init(jax.random.key(0), X)
    assert set(variables) == {"params"}
    groups = np.asarray(norm.apply(variables, X)).reshape(8, 4, 4, 2, 16)
    np.testing.assert_allclose(groups.mean((1, 2, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.var((1, 2, 4)), 1, atol=1e-4)


def test_group_norm_with_channels_that_16_does_not_divide():
    with pytest.raises(UserError, match='norm="group": expected a multiple of 16 channels, got '):
        make_norm("group", train=True)().init(jax.random.key(0), X[..., :24])


def test_layer_norm_of_maps_is_over_height_width_and_channels_of_each_image():
    norm = make_norm("layer", train=True, axis_name="batch")()
    x = X[..., :24]  # any width
    variables = norm.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (24,), "bias": (24,)}}
    gamma, beta = np.arange(24.0), np.arange(24.0)[::-1]
    y = norm.apply({"params": {"scale": gamma, "bias": beta}}, x)
    mean, var = (f((1, 2, 3), keepdims=True) for f in (x.mean, x.var))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * gamma + beta, atol=1e-4)


def test_layer_norm_of_bfloat16_maps_has_float32_statistics_and_parameters():
    norm = make_norm("layer", train=True, dtype=jnp.bfloat16)()
    y, variables = norm.init_with_output(jax.random.key(0), X + 1000)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.asarray(y, np.float32).std((1, 2, 3)), 1, atol=0.05)


def test_channel_norm_is_over_the_channels_of_each_pixel():
    norm = make_norm("channel", train=True, axis_name="batch", epsilon=1e-6)()
    x = X + 1000  # with this mean, E[x^2] - E[x]^2 would lose the variance to rounding
    variables = norm.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (32,), "bias": (32,)}}
    y = norm.apply(variables, x)
    mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / std, atol=1e-3)
    np.testing.assert_allclose(norm.apply(variables, x[0, 0]), y[0, 0], atol=1e-3)


@pytest.mark.parametrize("kind", ["batch", "group", "layer", "channel"])
def test_without_scale_there_is_no_gamma(kind):
    norm = make_norm(kind, train=True, scale=False)()
    y, variables = norm.init_with_output(jax.random.key(0), X)
    assert set(variables["params"]) == {"bias"}
    np.testing.assert_array_equal(
        y, make_norm(kind, train=True)().init_with_output(jax.random.key(0), X)[0]
    )
    assert make_norm("none", train=True, scale=False)().init(jax.random.key(0), X) == {}


def test_unknown_norm_names_the_near_miss():
    with pytest.raises(UserError, match="unknown norm 'bach'; did you mean 'batch'"):
        make_norm("bach", train=True)


def test_no_norm_has_the_same_interface_and_no_variables():
    norm = make_norm("none", train=True, axis_name="batch")(name=None, scale_init=max)
    y, variables = norm.init_with_output(jax.random.key(0), X)
    np.testing.assert_array_equal(y, X)
    assert variables == {}


@pytest.mark.parametrize("size", [5, 4])
def test_local_response_norm_is_the_papers_sum_over_neighboring_channels(size):
    y = local_response_norm(X, size, alpha=0.1, beta=0.75, k=2.0)
    for channel in (0, 1, 15, 31):
        near = X[..., max(channel - size // 2, 0) : channel + (size - 1) // 2 + 1]
        expected = X[..., channel] / (2.0 + 0.1 * (near**2).sum(-1)) ** 0.75
        np.testing.assert_allclose(y[..., channel], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("size", [5, 4])
def test_local_response_norm_is_pytorchs_with_alpha_by_size(size):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.LocalResponseNorm(size, alpha=0.1, beta=0.75, k=1.0)
    expected = theirs(torch.from_numpy(X.transpose(0, 3, 1, 2).copy())).numpy()
    ours = local_response_norm(X, size, alpha=0.1 / size, beta=0.75, k=1.0)
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
