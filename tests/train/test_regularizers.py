"""L2, max-norm, gradient noise, SAM and the modes of weight decay, against their definitions."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from flax_cnns import tree as pytree
from flax_cnns.config import FIELDS
from flax_cnns.errors import UserError
from flax_cnns.train import losses, metrics, optimizers, parallel, regularizers, schedules
from tests.train import tiny
from tests.train.test_steps import distance, plain_setup

RNG = np.random.default_rng(0)
PARAMS = {
    "stage1": {
        f"block{i}": {
            "conv": {"kernel": jnp.asarray(i * RNG.normal(size=(3, 3, 2, 4)), jnp.float32)},
            "norm": {"scale": jnp.full(4, 9.0), "bias": jnp.full(4, -9.0)},
        }
        for i in range(1, 5)
    },
    "head": {"kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)},
}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def make(params=PARAMS, rate=0.1, **fields):
    config = get_config().optimizer
    config.update(fields)
    return optimizers.make_optimizer(config, params, schedules.constant(rate))


def move(optimizer, grads, params=PARAMS, steps=1, key=0):
    """Returns the weights after some updates, without max-norm."""
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.tx.update(
            grads, state, params, step=jnp.int32(step), key=jax.random.key(key)
        )
        params = jax.tree.map(jnp.add, params, updates)
    return params


def on(name, params=PARAMS, **fields):
    """Returns the regularizer `name` of the optimizer with these fields."""
    return make(params, **fields).regularizers[name]


def test_off_leaves_nothing_in_the_step():
    optimizer = make(l2=(0.0,), max_norm=((r".*", 0.0),))
    assert optimizer.regularizers == {}
    states = [jax.tree.structure(o.init(PARAMS)) for o in (optimizer, make())]
    assert states[0] == states[1]


def test_each_regularizer_has_a_field_of_the_optimizer():
    """Weight decay is the only one without a row in `REGULARIZERS`: where it acts depends on the
    optimizer."""
    fields = {name for name, field in FIELDS.items() if field.regularizer}
    names = {f"optimizer.{name}" for name in (*regularizers.REGULARIZERS, "weight_decay")}
    assert names == {name for name in fields if name.startswith("optimizer.")}
    # Penalties are logged under their name, next to the other sums of a step.
    assert regularizers.REGULARIZERS.keys().isdisjoint(metrics.SUM_NAMES)


# ---------------------------------------------------------------------------- L2

L2 = ((r"params/stage1/block3/conv/kernel", 0.5), (r".*/kernel", 0.1), (r".*", 0.0))


def test_the_penalty_is_half_a_squared_norm_and_its_gradient_pulls_to_zero():
    value, slope = jax.jit(jax.value_and_grad(on("l2", l2=L2).penalty))(PARAMS, 0)
    a = {"block3": 0.5}
    kernels = [(a.get(name, 0.1), b["conv"]["kernel"]) for name, b in PARAMS["stage1"].items()]
    kernels.append((0.1, PARAMS["head"]["kernel"]))
    np.testing.assert_allclose(value, sum(a / 2 * np.sum(np.square(w)) for a, w in kernels), 1e-6)
    for name, block in PARAMS["stage1"].items():
        pull = a.get(name, 0.1) * block["conv"]["kernel"]
        np.testing.assert_allclose(slope["stage1"][name]["conv"]["kernel"], pull, rtol=1e-6)
        assert not np.any(slope["stage1"][name]["norm"]["scale"])
    stacked = pytree.stack_blocks(PARAMS)
    found = jax.jit(jax.value_and_grad(on("l2", stacked, l2=L2).penalty))(stacked, 0)
    chex.assert_trees_all_close((found[0], pytree.unstack_blocks(found[1])), (value, slope))


def test_frozen_weights_are_none_of_the_penalty():
    optimizer = make(l2=(1.0,), trainable=((r"params/head/bias", True), (r".*", False)))
    learns, _ = pytree.partition(PARAMS, optimizer.trainable)
    assert optimizer.regularizers["l2"].penalty(learns, 0) == 1.5


# ---------------------------------------------------------------------------- weight decay


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_decoupled_decay_shrinks_by_rate_times_decay_past_every_momentum(name):
    optimizer = make(name=name, weight_decay=(0.5,), weight_decay_mode="decoupled")
    found = move(optimizer, ZERO, steps=3)
    chex.assert_trees_all_close(found, jax.tree.map(lambda w: w * 0.95**3, PARAMS), rtol=1e-5)


def test_modes_make_one_optimizer_of_another():
    grads = jax.tree.map(jnp.cos, PARAMS)
    chain = dict(weight_decay=(0.3,))

    def after(name, mode):
        return move(make(name=name, weight_decay_mode=mode, **chain), grads, steps=2)

    for mode in ("coupled", "decoupled"):
        chex.assert_trees_all_equal(after("adam", mode), after("adamw", mode))
    chex.assert_trees_all_equal(after("adam", "auto"), after("adam", "coupled"))
    chex.assert_trees_all_equal(after("lamb", "auto"), after("lamb", "decoupled"))
    assert distance(after("lamb", "coupled"), after("lamb", "decoupled")) > 1e-4
    assert distance(after("adam", "coupled"), after("adam", "decoupled")) > 1e-4


def test_the_plateau_lowers_the_rate_of_a_decoupled_decay_too():
    optimizer = make(name="rmsprop", weight_decay=(0.5,), weight_decay_mode="decoupled")
    state = optimizer.init(PARAMS)
    for _ in range(2):
        state = optimizers.update_plateau(state, 0.5, patience=1, factor=0.1, min_delta=0.0)
    assert np.isclose(optimizer.learning_rate(jnp.int32(0), state), 0.01)
    updates, _ = optimizer.tx.update(ZERO, state, PARAMS, step=jnp.int32(0))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda w: -0.005 * w, PARAMS), rtol=1e-5)


# ---------------------------------------------------------------------------- max-norm


def norms(kernel):
    return np.linalg.norm(np.asarray(kernel).reshape(-1, kernel.shape[-1]), axis=0)


def test_max_norm_scales_back_each_unit_that_is_too_long():
    rules = ((r"params/head/kernel", 0.0), (r".*", 6.0))
    found = jax.jit(on("max_norm", max_norm=rules).constrain)(PARAMS)
    lengths = np.stack([norms(b["conv"]["kernel"]) for b in PARAMS["stage1"].values()])
    assert 3 < np.sum(lengths > 6) < 13  # some units above the limit, some below
    for old, new in zip(PARAMS["stage1"].values(), found["stage1"].values()):
        old_kernel, new_kernel = old["conv"]["kernel"], new["conv"]["kernel"]
        long = norms(old_kernel) > 6
        np.testing.assert_allclose(norms(new_kernel)[long], 6, rtol=1e-6)
        np.testing.assert_array_equal(new_kernel[..., ~long], old_kernel[..., ~long])
        direction = new_kernel / norms(new_kernel)
        np.testing.assert_allclose(direction, old_kernel / norms(old_kernel), rtol=1e-5)
        chex.assert_trees_all_equal(new["norm"], old["norm"])
    chex.assert_trees_all_equal(found["head"], PARAMS["head"])


def test_max_norm_in_a_stack_is_by_block():
    rules = ((r".*/block2/.*", 1.0), (r".*/block3/.*", 0.0), (r".*", 2.0))
    stacked = pytree.stack_blocks(PARAMS)
    found = jax.jit(on("max_norm", stacked, max_norm=rules).constrain)(stacked)
    expected = jax.jit(on("max_norm", max_norm=rules).constrain)(PARAMS)
    chex.assert_trees_all_close(pytree.unstack_blocks(found), expected, rtol=1e-6)


def test_max_norm_leaves_frozen_kernels_and_has_no_word_for_biases():
    optimizer = make(max_norm=(1e-3,), trainable=((r".*/block[12]/.*", False), (r".*", True)))
    learns, _ = pytree.partition(PARAMS, optimizer.trainable)
    assert "block1" not in optimizer.regularizers["max_norm"].constrain(learns)["stage1"]
    with pytest.raises(UserError, match=r"max_norm: .*'params/head/bias'.*nearest.*kernel"):
        make(max_norm=((r"params/head/bias", 1.0), (r".*", 0.0)))


# ---------------------------------------------------------------------------- gradient noise


def test_the_noise_has_the_variance_of_its_step_and_comes_after_clipping():
    flat = {"a": jnp.zeros(40_000), "b": jnp.zeros((200, 200))}
    noise = on("grad_noise", grad_noise=0.3, grad_noise_decay=0.55).gradients
    draw = jax.jit(lambda step, key: noise(flat, flat, key, step))
    drawn = []
    for step in (0, 9, 999):
        found = draw(jnp.int32(step), jax.random.key(step))
        for leaf in found.values():
            np.testing.assert_allclose(np.var(leaf), 0.3 / (1 + step) ** 0.55, rtol=0.05)
            assert abs(np.mean(leaf)) < 5 * np.std(leaf) / 200
        drawn += [np.ravel(found["a"]), np.ravel(found["b"])]
    assert np.max(np.abs(np.corrcoef(drawn) - np.eye(6))) < 0.03
    optimizer = make(grad_noise=1.0, clip_norm=1e-6, momentum=0.0, rate=1.0)
    moved = jax.tree.map(jnp.subtract, move(optimizer, PARAMS), PARAMS)
    assert 0.8 < np.std(np.concatenate([np.ravel(x) for x in jax.tree.leaves(moved)])) < 1.2


def test_a_stack_is_given_the_noise_of_its_blocks():
    rules = ((r".*/head/.*", False), (r".*", True))
    fields = dict(grad_noise=1.0, momentum=0.0, rate=1.0, trainable=rules)

    def noise(params):
        optimizer = make(params, **fields)
        learns, _ = pytree.partition(params, optimizer.trainable)
        zero = jax.tree.map(jnp.zeros_like, learns)
        step = dict(step=jnp.int32(3), key=jax.random.key(1))
        return optimizer.tx.update(zero, optimizer.init(params), learns, **step)[0]

    found = noise(pytree.stack_blocks(PARAMS))
    chex.assert_trees_all_equal(pytree.unstack_blocks(found), noise(PARAMS))


# ---------------------------------------------------------------------------- the step


def test_ascent_is_rho_far_along_the_gradient():
    grads = jax.tree.map(jnp.sin, PARAMS)
    moved = jax.tree.map(jnp.subtract, regularizers.ascend(PARAMS, grads, 0.5), PARAMS)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (moved, grads))
    np.testing.assert_allclose(np.linalg.norm(a), 0.5, rtol=1e-4)
    np.testing.assert_allclose(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 1.0, rtol=1e-5)
    chex.assert_trees_all_equal(regularizers.ascend(PARAMS, ZERO, 0.5), PARAMS)


def test_sam_descends_by_the_gradient_uphill_and_l2_by_that_of_the_weights():
    config = tiny.config(
        **{"optimizer.sam": 0.5, "optimizer.momentum": 0.0, "optimizer.l2": (0.2,)}
    )
    state, step, _, mesh = plain_setup(config, devices=4)
    before = jax.device_get(state.params)
    data = tiny.examples(8)
    x = jnp.reshape((data["image"] / np.float32(255) - 0.5) / 0.25, (8, -1))
    y = jax.nn.one_hot(data["label"], tiny.CLASSES)

    def loss(params):
        head = params["head"]
        return jnp.mean(losses.cross_entropy(x @ head["kernel"] + head["bias"], y))

    gradient = jax.jit(jax.grad(loss))
    uphill = gradient(before)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(uphill)))
    slope = gradient(jax.tree.map(lambda w, g: w + 0.5 * g / length, before, uphill))
    assert distance(slope, uphill) > 1e-2
    expected = jax.tree.map(lambda w, g: w - 0.1 * (g + 0.2 * w), before, slope)
    state, sums = step(state, parallel.shard_batch(data, mesh), jax.random.key(0))
    assert distance(jax.device_get(state.params), expected) < 1e-5
    np.testing.assert_allclose(sums["loss"] / 8, loss(before), rtol=1e-5)
    squares = sum(np.sum(np.square(w)) for w in jax.tree.leaves(before))
    np.testing.assert_allclose(sums["l2"], 0.1 * squares, rtol=1e-5)


def dropout_run(rho):
    config = tiny.config(**{"optimizer.sam": rho, "train.accumulate": 2})
    return tiny.train(config, n=1, model=tiny.Tiny(dropout=0.5))


def test_both_gradients_of_sam_are_of_the_same_random_network():
    """With a radius so small that rounding removes it, SAM's step is the plain step, even with
    dropout and accumulation."""
    (plain, sums), (found, same) = dropout_run(0.0), dropout_run(1e-30)
    assert distance(found.params, plain.params) < 1e-6
    chex.assert_trees_all_close(sums, same, rtol=1e-6)
    chex.assert_trees_all_equal(found.batch_stats, plain.batch_stats)


def test_sam_keeps_the_statistics_of_the_weights_themselves():
    (plain, sums), (found, same) = dropout_run(0.0), dropout_run(2.0)
    chex.assert_trees_all_close(found.batch_stats, plain.batch_stats, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], same["loss"], rtol=1e-6)
    assert distance(found.params, plain.params) > 1e-4


ALL = {
    "optimizer.l2": ((r".*/kernel", 1e-2), (r".*", 0.0)),
    "optimizer.max_norm": (0.5,),
    "optimizer.grad_noise": 1e-3,
    "optimizer.sam": 0.1,
    "optimizer.weight_decay": (0.01,),
    "optimizer.weight_decay_mode": "decoupled",
    "train.sync_batchnorm": True,
}


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_all_together_the_number_of_devices_does_not_matter(mode):
    one, expected = tiny.train(tiny.config(**ALL))
    state, sums = tiny.train(tiny.config(**ALL), devices=4, mode=mode)
    assert distance(state.params, one.params) < 1e-5
    chex.assert_trees_all_close(sums, expected, rtol=1e-4)
    assert np.max(norms(state.params["conv"]["kernel"])) <= 0.5 * (1 + 1e-6)
    assert sums["bad"] == 0
