"""Shake-Shake and ShakeDrop: the gates of values and gradients, their distribution and sharing."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.layers.shake import BACKWARDS, FORWARDS, SHAKE_LEVELS, Shake, ShakeDrop
from flax_cnns.train import parallel, steps

slow = partial(pytest.param, marks=pytest.mark.slow)
DRAWS = 4000
ONES, ZEROS = jnp.ones((2, 1, 1, 1)), jnp.zeros((2, 1, 1, 1))


def keys_of(n, key=1):
    return jax.random.split(jax.random.key(key), n)


def random(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def shake_gates(key, shape=(2, 1, 1, 1), **modes):
    """Returns (alpha, beta), the weights of the first branch in the value and in the gradient.

    They are measured as the output for (1, 0), and as the gradient in x1 for a cotangent of ones.
    """
    run = lambda x1, x2: layers.shake_shake(x1, x2, Shake(key, **modes))  # noqa: E731
    alpha, vjp = jax.vjp(run, jnp.ones(shape), jnp.zeros(shape))
    return alpha, vjp(jnp.ones(shape))[0]


def drop_gates(key, shape=(2, 1, 1, 1), rate=0.5, **fields):
    """Returns ShakeDrop's factors of the value and of the gradient."""
    drop = ShakeDrop(jnp.float32(rate), tuple(jax.random.split(key)), **fields)
    value, vjp = jax.vjp(lambda x: layers.shake_drop(x, drop), jnp.ones(shape))
    return value, vjp(jnp.ones(shape))[0]


def draw_many(gates, **fields):
    """Returns [steps, images] of each gate."""
    result = jax.jit(jax.vmap(partial(gates, **fields)))(keys_of(DRAWS))
    return [np.asarray(gate)[:, :, 0, 0, 0] for gate in result]


def check_uniform(sample, low=0.0, high=1.0):
    """Checks mean, variance and the Kolmogorov-Smirnov distance (exceeded once in 10,000)."""
    sample, n = (np.sort(sample) - low) / (high - low), len(sample)
    assert sample[0] >= 0
    assert sample[-1] <= 1
    assert abs(sample.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / n)
    assert abs(sample.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    steps = np.arange(n + 1) / n
    assert max((steps[1:] - sample).max(), (sample - steps[:-1]).max()) < 2.23 / np.sqrt(n)


def correlation(a, b):
    return abs(np.corrcoef(a, b)[0, 1])


# ---------------------------------------------------------------------------- Shake-Shake

TABLE_1 = [  # forward, backward, level
    (forward, backward, level)
    for forward in FORWARDS
    for backward in BACKWARDS
    for level in SHAKE_LEVELS
]


@pytest.mark.parametrize(("forward", "backward", "level"), TABLE_1)
def test_value_and_gradient_are_the_definition(forward, backward, level):
    """alpha and beta, measured on (1, 0), hold for any two branches, in values and gradients."""
    modes = dict(forward=forward, backward=backward, level=level)
    key, shape = jax.random.key(3), (4, 3, 2, 5)
    alpha, beta = shake_gates(key, shape, **modes)
    x1, x2, g, dx1, dx2 = (random(*shape, seed=seed) for seed in range(5))
    mix = lambda x1, x2: layers.shake_shake(x1, x2, Shake(key, **modes))  # noqa: E731

    value, vjp = jax.vjp(mix, x1, x2)
    np.testing.assert_allclose(value, alpha * x1 + (1 - alpha) * x2, rtol=1e-5, atol=1e-6)
    for result, expected in zip(vjp(jnp.asarray(g)), (beta * g, (1 - beta) * g)):
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    same, tangent = jax.jvp(mix, (x1, x2), (dx1, dx2))
    np.testing.assert_array_equal(same, value)
    np.testing.assert_allclose(tangent, beta * dx1 + (1 - beta) * dx2, rtol=1e-5, atol=1e-6)

    if forward == "even":
        np.testing.assert_array_equal(alpha, 0.5)
    if backward == "even":
        np.testing.assert_array_equal(beta, 0.5)
    if backward == "keep":
        np.testing.assert_array_equal(beta, alpha)
    for gate, mode in ((alpha, forward), (beta, backward)):
        gate = np.asarray(gate).reshape(4, -1)
        assert (gate == gate[:, :1]).all()  # one gate for the whole image
        if mode == "shake":
            assert len(np.unique(gate[:, 0])) == (4 if level == "image" else 1)


@pytest.mark.parametrize("level", SHAKE_LEVELS)
def test_alpha_and_beta_are_uniform_and_independent(level):
    alpha, beta = draw_many(shake_gates, level=level)
    bound = 4 / np.sqrt(DRAWS)
    check_uniform(alpha[:, 0])
    check_uniform(beta[:, 0])
    assert correlation(alpha[:, 0], beta[:, 0]) < bound
    assert correlation(alpha[:-1, 0], alpha[1:, 0]) < bound  # from step to step
    for gate in (alpha, beta):
        if level == "image":
            assert correlation(gate[:, 0], gate[:, 1]) < bound
            check_uniform(gate[:, 1])
        else:
            np.testing.assert_array_equal(gate[:, 0], gate[:, 1])


def test_the_value_is_not_the_rounded_sum_of_two_gates():
    """The value is alpha * x1 to the bit: beta does not influence it, not even by rounding."""
    key = jax.random.key(5)
    x = 1e6 * random(8, 2, 2, 3)
    alpha, _ = shake_gates(key, x.shape)
    result = layers.shake_shake(jnp.asarray(x), jnp.zeros_like(x), Shake(key))
    np.testing.assert_array_equal(result, np.asarray(alpha) * x)
    keep = layers.shake_shake(jnp.asarray(x), jnp.zeros_like(x), Shake(key, backward="even"))
    np.testing.assert_array_equal(result, keep)


def test_evaluation_is_the_expectation_of_training():
    x1, x2 = random(2, 2, 2, 3), random(2, 2, 2, 3, seed=1)
    values = jax.vmap(lambda key: layers.shake_shake(x1, x2, Shake(key)))(keys_of(DRAWS))
    expected = layers.shake_shake(x1, x2, None)
    np.testing.assert_allclose(expected, (x1 + x2) / 2, rtol=1e-6)
    deviation = np.abs(x1 - x2) / np.sqrt(12 * DRAWS)
    assert (np.abs(values.mean(0) - expected) < 4.5 * deviation).all()


# ---------------------------------------------------------------------------- ShakeDrop


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("level", ["batch", "image", "channel", "pixel"])
def test_shake_drop_value_and_gradient_are_the_definition(level, rate):
    """Both factors are 1, or they are an alpha and a beta that are shared as the level says."""
    shape = (4, 3, 2, 5)
    shared = {"batch": (0, 1, 2, 3), "image": (1, 2, 3), "channel": (1, 2), "pixel": ()}[level]
    seen = set()
    for key in keys_of(6, 2):
        forward, backward = drop_gates(key, shape, rate, level=level)
        drop = ShakeDrop(jnp.float32(rate), tuple(jax.random.split(key)), level=level)
        run = lambda x, drop=drop: layers.shake_drop(x, drop)  # noqa: E731
        x, g = random(*shape), jnp.asarray(random(*shape, seed=1))
        value, vjp = jax.vjp(run, x)
        np.testing.assert_array_equal(value, forward * x)
        np.testing.assert_array_equal(vjp(g)[0], backward * g)
        np.testing.assert_array_equal(jax.jvp(run, (x,), (g,))[1], backward * g)
        is_kept = bool((forward == 1).all())
        seen.add(is_kept)
        if is_kept:
            np.testing.assert_array_equal(backward, 1)
            continue
        for factor in (forward, backward):
            assert len(np.unique(factor)) == np.prod(
                [shape[i] for i in range(4) if i not in shared]
            )
            np.testing.assert_array_equal(np.ptp(factor, axis=shared), 0)
    assert seen == {0.0: {True}, 0.5: {True, False}, 1.0: {False}}[rate]


def test_alpha_beta_and_b_are_as_published():
    """alpha is from -1 to 1, beta from 0 to 1. The fraction p_l of the steps is not perturbed."""
    rate = 0.7
    forward, backward = draw_many(drop_gates, rate=rate)
    is_kept = forward == 1
    np.testing.assert_array_equal(is_kept[:, 0], is_kept[:, 1])
    np.testing.assert_array_equal(backward[is_kept], 1)
    assert abs(is_kept[:, 0].mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / DRAWS)
    alpha, beta = forward[~is_kept[:, 0]], backward[~is_kept[:, 0]]
    check_uniform(alpha[:, 0], -1, 1)
    check_uniform(beta[:, 0])
    for a, b in ((alpha[:, 0], beta[:, 0]), alpha.T, beta.T):
        assert correlation(a, b) < 4 / np.sqrt(len(a))


@pytest.mark.parametrize("alpha", [(-1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (-1.0, -0.5)])
def test_shake_drop_evaluation_is_the_expectation_of_training(alpha):
    rate = 0.4
    forward, _ = draw_many(drop_gates, rate=rate, alpha=alpha)
    drop = ShakeDrop(jnp.float32(rate), None, alpha=alpha)
    result = float(layers.shake_drop(ONES, drop)[0, 0, 0, 0])
    assert result == pytest.approx(1 - rate + rate * sum(alpha) / 2, rel=1e-6)
    assert abs(forward[:, 0].mean() - result) < 4 * forward.std() / np.sqrt(DRAWS)


def test_without_ranges_it_is_stochastic_depth():
    forward, backward = draw_many(drop_gates, rate=0.5, alpha=(0.0, 0.0), beta=(0.0, 0.0))
    np.testing.assert_array_equal(forward, backward)
    assert set(np.unique(forward)) == {0.0, 1.0}


# ---------------------------------------------------------------------------- in a network


class ShakeBlock(nn.Module):
    conv: Any
    stride: int = 1

    @nn.compact
    def __call__(self, x, shake=None):
        x1 = self.conv(3, (1, 1), name="conv1")(x)
        x2 = self.conv(3, (1, 1), name="conv2")(x)
        return x + layers.shake_shake(x1, x2, shake)


class Shaken(nn.Module):
    """Two stages of Shake-Shake: [N H W 3] -> [N H W 3]."""

    forward: str = "shake"
    backward: str = "shake"
    level: str = "image"
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        stage = partial(layers.Stage, ShakeBlock, layers.Conv, scan=self.scan, remat=self.remat)
        for i, shake in enumerate(layers.make_shakes(self, (2, 4), train), 1):
            x = stage((2, 4)[i - 1], name=f"stage{i}")(x, shake)
        return x


class Dropped(nn.Module):
    """Four blocks of ShakeDrop: x + x, x + x + ..."""

    shake_drop: float = 0.5
    shake_drop_level: str = "image"
    shake_drop_alpha: tuple = (-1.0, 1.0)
    shake_drop_beta: tuple = (0.0, 1.0)

    @nn.compact
    def __call__(self, x, *, train=False):
        (drops,) = layers.make_shake_drops(self, (4,), train)
        for i in range(4):
            x = x + layers.shake_drop(x, layers.for_block(drops, i))
        return x


def test_rates_decay_linearly():
    """With branches x, evaluation gives the product of 1 + p_l, p_l = 1 - l/L (1 - p_L)."""
    result = Dropped().apply({}, ONES)
    expected = np.prod([1 + 1 - l / 4 * 0.5 for l in (1, 2, 3, 4)])  # noqa: E741
    np.testing.assert_allclose(result, np.full_like(ONES, expected), rtol=1e-6)
    np.testing.assert_array_equal(Dropped(shake_drop=0.0).apply({}, ONES, train=True), 16)


@pytest.mark.parametrize(
    "fields", [slow(dict(scan=True)), dict(scan=True, remat=True), slow(dict(remat=True))]
)
def test_scanned_and_rematerialized_stages_shake_the_same(fields):
    """With remat, the backward pass recomputes the forward pass with the same gates."""
    x = random(4, 2, 2, 3)
    variables = Shaken().init(jax.random.key(0), x)
    rngs = {"dropout": jax.random.key(1)}

    def run(variables, **fields):
        loss = lambda v: jnp.sum(Shaken(**fields).apply(v, x, train=True, rngs=rngs) ** 2)  # noqa: E731
        return pytree.flatten(jax.jit(jax.value_and_grad(loss))(variables)[1])

    given = pytree.stack_blocks(variables) if "scan" in fields else variables
    result = pytree.flatten(pytree.unstack_blocks(pytree.unflatten(run(given, **fields))))
    for path, leaf in run(variables).items():
        np.testing.assert_allclose(result[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)


def value_and_gradient(model, variables, x, train_rngs):
    """Returns the values and the gradient in x of one pass, which depend on all gates."""
    value, vjp = jax.vjp(lambda x: model.apply(variables, x, train=True, rngs=train_rngs), x)
    return jnp.concatenate([value[:, 0, 0], vjp(jnp.ones_like(value))[0][:, 0, 0]], -1)


@pytest.mark.parametrize("level", SHAKE_LEVELS)
@pytest.mark.parametrize("network", [Shaken, Dropped])
def test_four_devices(network, level):
    """The random streams are those of train/steps.py, and all images are equal.

    Gates of a batch are the same on all devices, and gates of an image differ everywhere. Another
    step draws other gates. The same step, as after a resume, draws the same gates.
    """
    mesh = parallel.make_mesh()
    # Gates act only if b is 0, so the rate is high.
    model = Shaken(level=level) if network is Shaken else Dropped(0.9, level)
    once = random(1, 2, 2, 3).repeat(8, 0)
    variables = model.init(jax.random.key(0), once)

    def step(variables, batch, state):
        key, number = state
        device = jax.lax.axis_index("batch")
        rngs = {
            "shared": steps.stream_key(key, steps.Stream.SHARED, number),
            "dropout": jax.random.fold_in(
                steps.stream_key(key, steps.Stream.DROPOUT, number), device
            ),
        }
        result = value_and_gradient(model, variables, batch["image"], rngs)
        return jax.lax.all_gather(result, "batch", tiled=True)

    mapped = parallel.parallelize(step, mesh, donate=False)
    batch = parallel.shard_batch({"image": once}, mesh)

    def run(number):
        return np.asarray(
            mapped(parallel.replicate(variables, mesh), batch, (jax.random.key(0), number))
        )

    outs = [run(number) for number in range(3)]
    np.testing.assert_array_equal(run(2), outs[2])
    assert not np.allclose(outs[0], outs[1])
    for out in outs:
        images = np.unique(out.round(5), axis=0)
        assert len(images) == (8 if level == "image" else 1)


def test_b_is_the_same_on_all_devices():
    """b is one number per block and step; alpha and beta are drawn for each image."""
    mesh = parallel.make_mesh()
    model = Dropped(0.5)

    def step(state, batch, number):
        rngs = {
            "shared": number,
            "dropout": jax.random.fold_in(number, jax.lax.axis_index("batch")),
        }
        unchanged = []
        (drops,) = layers.make_shake_drops(model.bind({}, rngs=rngs), (4,), train=True)
        for i in range(4):
            x = layers.shake_drop(batch["image"], layers.for_block(drops, i))
            unchanged.append((x == batch["image"]).all((1, 2, 3)))
        return jax.lax.all_gather(jnp.stack(unchanged, 1), "batch", tiled=True)

    mapped = parallel.parallelize(step, mesh, donate=False)
    batch = parallel.shard_batch({"image": np.ones((8, 1, 1, 1), np.float32)}, mesh)
    outs = np.stack([mapped(jnp.zeros(()), batch, key) for key in keys_of(16)])  # [16, 8, 4]
    assert (outs == outs[:, :1]).all()
    assert len(np.unique(outs[:, 0], axis=0)) > 4


@pytest.mark.parametrize("model", [Shaken(), Dropped()])
def test_evaluation_and_initialization_need_no_keys(model):
    x = random(4, 2, 2, 3)
    variables = model.init(jax.random.key(0), x, train=True)
    result = model.apply(variables, x)
    with_keys = model.apply(variables, x, rngs={"dropout": keys_of(1)[0]})
    np.testing.assert_array_equal(result, with_keys)


def test_even_in_both_passes_needs_no_keys():
    x = random(4, 2, 2, 3)
    variables = Shaken().init(jax.random.key(0), x)
    for backward in ("even", "keep"):
        result = Shaken("even", backward).apply(variables, x, train=True)
        np.testing.assert_array_equal(result, Shaken().apply(variables, x))


def test_bfloat16_stays():
    x = jnp.ones((2, 1, 1, 1), jnp.bfloat16)
    key = jax.random.key(0)
    assert layers.shake_shake(x, x, Shake(key)).dtype == jnp.bfloat16
    for keys in (None, (key, key)):
        run = partial(layers.shake_drop, drop=ShakeDrop(jnp.float32(0.9), keys))
        value, vjp = jax.vjp(run, x)
        assert (value.dtype, vjp(x)[0].dtype) == (jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Shaken(forward="shak"), "unknown forward 'shak'; did you mean 'shake'"),
        (Shaken(forward="keep"), "unknown forward 'keep'; known: even, shake"),
        (Shaken(backward="kept"), "unknown backward 'kept'; did you mean 'keep'"),
        (Shaken(level="images"), "unknown level 'images'; did you mean 'image'"),
        (Dropped(shake_drop_level="pixels"), "did you mean 'pixel'"),
        (Dropped(1.0), "shake_drop: expected the last block's rate, from 0 to below 1, got 1.0"),
        (Dropped(shake_drop_alpha=(1, -1)), r"shake_drop_alpha: expected a range .*got \(1, -1\)"),
        (Dropped(shake_drop_beta=(1,)), r"shake_drop_beta: expected a range"),
    ],
)
def test_invalid_fields(model, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 2, 2, 3)))


@pytest.mark.parametrize(
    ("model", "streams", "missing"),
    [
        (Shaken(), ("shared",), "dropout"),
        (Shaken(level="batch"), ("dropout",), "shared"),
        (Dropped(), ("dropout",), "shared"),
        (Dropped(), ("shared",), "dropout"),
    ],
)
def test_a_missing_stream(model, streams, missing):
    variables = model.init(jax.random.key(0), jnp.zeros((2, 2, 2, 3)))
    rngs = {stream: jax.random.key(0) for stream in streams}
    with pytest.raises(UserError, match=rf'rngs=\{{"{missing}": key\}}'):
        model.apply(variables, jnp.zeros((2, 2, 2, 3)), train=True, rngs=rngs)
