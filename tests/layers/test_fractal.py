"""FractalNet's join and drop-path: distributions, means and gradients."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.layers.fractal import ColumnDrop, draw_columns, fractal_join, keep_at_least_one


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (2, 0.15), (3, 0.15), (3, 0.8), (4, 0.9)])
def test_local_sampling_has_the_papers_distribution(n, rate):
    """Inputs are dropped independently. If all would be dropped, each is kept equally often."""
    draws = 20_000
    kept = np.asarray(jax.jit(lambda key: keep_at_least_one(key, rate, (n, draws)))(keys_of(1)[0]))
    assert kept.any(axis=0).all()
    for pattern in itertools.product((False, True), repeat=n):
        expected = (1 - rate) ** sum(pattern) * rate ** (n - sum(pattern)) if any(pattern) else 0
        expected += rate**n / n if sum(pattern) == 1 else 0
        frequency = (kept == np.array(pattern)[:, None]).all(axis=0).mean()
        deviation = np.sqrt(expected * (1 - expected) / draws)
        assert abs(frequency - expected) <= 4.5 * deviation, pattern


class Network(nn.Module):
    columns: int = 3
    drop_path: float = 0.15
    drop_path_global: float = 0.5
    drop_path_mode: str = "batch"

    def __call__(self, images, train=True):
        return draw_columns(self, self.columns, images, train)


def draw(key, images=2, train=True, **fields):
    network = Network(**fields)
    return network.apply({}, images, train, rngs={"shared": key, "dropout": key})


def test_half_of_the_steps_are_global_with_uniform_columns():
    columns = np.asarray(jax.jit(jax.vmap(lambda key: draw(key).column))(keys_of(6000)))
    for column, expected in ((0, 1 / 2), (1, 1 / 6), (2, 1 / 6), (3, 1 / 6)):
        deviation = np.sqrt(expected * (1 - expected) / 6000)
        assert abs((columns == column).mean() - expected) < 4.5 * deviation


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_all_or_none_are_global(part):
    columns = jax.vmap(lambda key: draw(key, drop_path_global=part).column)(keys_of(50))
    assert ((columns > 0) == bool(part)).all()


def test_each_image_has_its_own_sample():
    drop = draw(keys_of(1)[0], images=6000, drop_path_mode="sample")
    columns = np.asarray(drop.column)
    assert columns.shape == (6000,)
    assert abs((columns == 0).mean() - 0.5) < 4.5 * np.sqrt(0.25 / 6000)
    kept = np.asarray(drop.keep(1, 3, 1))
    assert kept.shape == (3, 6000)
    assert (kept[:, columns == 2] == np.array([[False], [True], [False]])).all()
    local = kept[:, columns == 0]
    expected = 0.85 + 0.15**3 / 3
    assert np.abs(local.mean(axis=1) - expected).max() < 4.5 * np.sqrt(0.15 * 0.85 / 3000)


def test_a_global_sample_keeps_one_column_in_every_join():
    drop = ColumnDrop(jnp.int32(2), jax.random.key(0), 0.15)
    np.testing.assert_array_equal(drop.keep(1, 4, 1), [False, True, False, False])
    np.testing.assert_array_equal(drop.keep(2, 4, 1), [True, False, False])
    np.testing.assert_array_equal(drop.keep(3, 4, 1), [True, True])  # outside the chosen column


def test_joins_draw_independently_and_reproducibly():
    drop = ColumnDrop(jnp.zeros(4000, jnp.int32), jax.random.key(0), 0.5)
    one, other = (np.asarray(drop.keep(1, 2, *place)) for place in ((1, 1, 1), (1, 2, 1)))
    np.testing.assert_array_equal(one, drop.keep(1, 2, 1, 1, 1))
    both = (one[0] & other[0]).mean()  # an input is kept with probability 1/2 + 1/8
    assert abs(both - 0.625**2) < 4.5 * np.sqrt(0.25 / 4000)


def test_a_join_is_the_mean_of_the_kept_inputs():
    inputs = list(np.random.default_rng(0).standard_normal((3, 2, 4, 4, 5)).astype(np.float32))
    np.testing.assert_allclose(fractal_join(inputs), np.mean(inputs, axis=0), rtol=1e-5, atol=1e-6)
    kept = fractal_join(inputs, jnp.array([True, False, True]))
    np.testing.assert_allclose(kept, (inputs[0] + inputs[2]) / 2, rtol=1e-5, atol=1e-6)
    each = fractal_join(inputs, jnp.array([[True, False], [False, True], [False, True]]))
    np.testing.assert_allclose(each[0], inputs[0][0], rtol=1e-6)
    np.testing.assert_allclose(each[1], (inputs[1] + inputs[2])[1] / 2, rtol=1e-5, atol=1e-6)
    halves = [x.astype(jnp.bfloat16) for x in inputs]
    assert fractal_join(halves, jnp.ones(3, bool)).dtype == jnp.bfloat16


def test_dropped_inputs_have_no_gradient_and_no_influence():
    inputs = [jnp.full((1, 1, 1, 1), value) for value in (1.0, jnp.inf, 3.0)]
    out, grads = jax.value_and_grad(
        lambda inputs: fractal_join(inputs, jnp.array([True, False, True])).sum()
    )(inputs)
    assert out == 2.0
    assert [float(grad.sum()) for grad in grads] == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("drop_path_global", [0.0, 0.5, 1.0])
def test_the_expectation_of_a_join_is_the_plain_mean(drop_path_global):
    inputs = [jnp.full((1, 1, 1, 1), value) for value in (1.0, 2.0, 6.0)]

    def once(key):
        drop = draw(key, drop_path=0.4, drop_path_global=drop_path_global)
        return fractal_join(inputs, drop.keep(1, 3, 1)).sum()

    outs = np.asarray(jax.jit(jax.vmap(once))(keys_of(8000, 1)))
    assert abs(outs.mean() - 3) < 4.5 * outs.std() / np.sqrt(8000)


def test_nothing_is_drawn_where_nothing_is_dropped():
    assert Network().apply({}, 2, train=False) is None
    assert Network(drop_path=0.0, drop_path_global=0.0).apply({}, 2) is None


def test_global_samples_need_no_local_ones():
    columns = jax.vmap(lambda key: draw(key, drop_path=0.0, drop_path_global=1.0).column)
    assert set(np.unique(columns(keys_of(50)))) == {1, 2, 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(drop_path=1.0), "0 to below 1"),
        (dict(drop_path=-0.1), "0 to below 1"),
        (dict(drop_path_global=1.5), "0 to 1, got 0.15 and 1.5"),
        (dict(drop_path_mode="batc"), "did you mean 'batch'"),
    ],
)
def test_invalid_fields(fields, message):
    with pytest.raises(UserError, match=message):
        Network(**fields).apply({}, 2, train=False)


@pytest.mark.parametrize(("mode", "stream"), [("batch", "shared"), ("sample", "dropout")])
def test_a_missing_stream(mode, stream):
    with pytest.raises(UserError, match=rf'rngs=\{{"{stream}": key\}}'):
        Network(drop_path_mode=mode).apply({}, 2)
