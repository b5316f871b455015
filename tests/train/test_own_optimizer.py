"""A user's optimizer, made by a factory, against plain Optax and the built-in optimizers."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import get_config
from flax_cnns import tree as pytree
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.errors import UserError
from flax_cnns.train import optimizers, parallel, regularizers, schedules
from tests.train import tiny
from tests.train.test_regularizers import PARAMS, move
from tests.train.test_steps import distance

GRADS = jax.tree.map(jnp.cos, PARAMS)
FALLING = schedules.piecewise_linear([(0, 0.2), (8, 0.05)])


def make(factory=None, *, schedule=FALLING, factory_fields=None, own=None, **fields):
    config = get_config().optimizer
    config.update(fields)
    given = dict(factory=factory, factory_fields=factory_fields or {}, own_regularizers=own or {})
    return optimizers.make_optimizer(config, PARAMS, schedule, **given)


def momentum_sgd(learning_rate_schedule, decay=0.9):
    return optax.sgd(learning_rate_schedule, momentum=decay)


HALF = regularizers.make_regularizer(
    "Half",
    type("Half", (), {"gradients": lambda self, g, p, k, s: jax.tree.map(lambda x: x / 2, g)})(),
)
RULES = ((r"params/head/.*", 2.0), (r".*", 0.5))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "lr_mult": RULES,
            "weight_decay": (0.3,),
            "clip_norm": 0.1,
            "own": {"Half": HALF},
            "trainable": ((r".*/block1/.*", False), (r".*", True)),
        },
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_sgd_of_optax_is_the_built_in_one(fields):
    found, expected = (
        jax.jit(functools.partial(move, make(factory, **fields), steps=3))(*of_trainable(fields))
        for factory in (momentum_sgd, None)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def of_trainable(fields):
    """Returns gradients and parameters of the trainable leaves."""
    trainable = make(**fields).trainable
    return pytree.partition(GRADS, trainable)[0], pytree.partition(PARAMS, trainable)[0]


def test_decoupled_decay_stands_beside_it():
    fields = dict(weight_decay=(0.5,), weight_decay_mode="decoupled", lr_mult=RULES)
    zero, steps = jax.tree.map(jnp.zeros_like, PARAMS), 3
    found = move(make(momentum_sgd, **fields), zero, steps=steps)
    rates = np.prod([1 - 0.5 * 2.0 * float(FALLING(i)) for i in range(steps)])
    np.testing.assert_allclose(found["head"]["kernel"], rates * PARAMS["head"]["kernel"], rtol=1e-5)
    # The same as for the built-in optimizer: the decay is not part of the momentum.
    chex.assert_trees_all_close(found, move(make(**fields), zero, steps=steps), rtol=1e-5)


def test_the_rate_is_that_of_the_step_and_of_the_plateau_whatever_optax_counts():
    optimizer = make(optax.sgd)
    state, key = optimizer.init(PARAMS), jax.random.key(0)
    for step, scale in ((0, 1.0), (6, 1.0), (6, 0.1), (2, 0.1)):
        if (step, scale) == (6, 0.1):
            for _ in range(2):
                state = optimizers.update_plateau(state, 0.5, patience=1, factor=0.1, min_delta=0.0)
        updates, state = optimizer.tx.update(GRADS, state, PARAMS, step=jnp.int32(step), key=key)
        rate = scale * float(FALLING(step))
        chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -rate * g, GRADS), rtol=1e-5)  # noqa: B023
        np.testing.assert_allclose(optimizer.learning_rate(jnp.int32(step), state), rate, rtol=1e-6)


def test_a_state_that_holds_the_weights_has_buffers_of_its_own():
    def anchored(rate):
        return optax.GradientTransformation(lambda params: params, lambda g, s, p=None: (g, s))

    params = jax.tree.map(jnp.asarray, PARAMS)
    state = make(anchored).init(params)
    held = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    assert not held & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}


def two_parts(learning_rate_schedule, slow=0.1):
    """Lion for kernels, SGD with another rate for the rest."""
    label = lambda path, leaf: "kernel" if path[-1].key == "kernel" else "rest"  # noqa: E731
    return optax.multi_transform(
        {
            "kernel": optax.lion(learning_rate_schedule),
            "rest": optax.sgd(lambda count: slow * learning_rate_schedule(count)),
        },
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def injected(learning_rate_schedule, b1=0.8):
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate_schedule, b1=b1)


FROZEN = {
    "trainable": ((r".*/block2/.*", False), (r".*/conv/.*|params/head/.*", True), (r".*", False))
}


@pytest.mark.parametrize(
    ("factory", "fields"),
    [
        (optax.lion, {"b1": 0.8, "weight_decay": 0.1}),
        (optax.adamw, {"weight_decay": 0.1}),
        (optax.contrib.muon, {"ns_steps": 2}),
        (two_parts, {"slow": 0.5}),
        (injected, {"b1": 0.7}),
    ],
    ids=["lion", "adamw", "muon", "multi_transform", "inject_hyperparams"],
)
def test_what_optax_has_does_as_it_does_alone(factory, fields):
    """Both optimize the trainable leaves; ours gets a tree that also has frozen leaves."""
    optimizer = make(factory, factory_fields=fields, **FROZEN)
    grads, learns = of_trainable(FROZEN)
    alone = factory(FALLING, **fields)

    @jax.jit
    def both(params, state, expected, other, step):
        ours = optimizer.tx.update(grads, state, params, step=step, key=jax.random.key(0))
        theirs = alone.update(grads, other, expected)
        return *ours, *theirs

    params = expected = learns
    state, other = optimizer.init(PARAMS), alone.init(learns)
    for step in range(3):
        structure = jax.tree.structure(state)
        updates, state, theirs, other = both(params, state, expected, other, jnp.int32(step))
        assert jax.tree.structure(state) == structure
        params, expected = (
            optax.apply_updates(params, updates),
            optax.apply_updates(expected, theirs),
        )
        chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    assert distance(params, learns) > 1e-3


@pytest.mark.parametrize(
    ("factory", "fields", "message"),
    [
        (
            lambda rate: rate,
            {},
            r"expected an optax\.GradientTransformation, got an object of the",
        ),
        (
            lambda rate: optax.sgd(rate(0)),
            {},
            "calls the schedule while the optimizer is made.*one step only",
        ),
        (momentum_sgd, {"momentum": 0.9}, r"with \(learning_rate_schedule, momentum=\) but takes"),
        ("sgd", {}, "expected a function, got an object of the class str"),
    ],
)
def test_what_is_no_factory(factory, fields, message):
    with pytest.raises(UserError, match=rf"^optimizer\.name: .*{message}"):
        make(factory, factory_fields=fields)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (optax.polyak_sgd, "its update gets only gradients, state and params: .*'value'"),
        (
            lambda rate: optax.GradientTransformation(
                lambda p: {}, lambda g, s, p: (g, {"n": 1.0})
            ),
            "state: expected a tree .* has an extra 'n'",
        ),
        (
            lambda rate: optax.stateless(lambda g, p: {"head": g["head"]}),
            "updates: expected a tree like its argument; the tree it returned lacks 'stage1",
        ),
    ],
)
def test_what_a_step_finds_wrong_with_it(factory, message):
    optimizer = make(factory)
    with pytest.raises(UserError, match=rf"^optimizer\.name: .*{message}"):
        jax.eval_shape(lambda: move(optimizer, GRADS))


def test_a_step_with_all_that_works_around_it_and_its_state_from_a_checkpoint(tmp_path):
    """With SAM, EMA, max-norm and frozen leaves; four devices resume from the state of one."""
    config = tiny.config(
        **{
            "optimizer.sam": 0.1,
            "optimizer.max_norm": (0.5,),
            "optimizer.trainable": (("params/norm/bias", False), (".*", True)),
            "train.ema": 0.9,
            "train.sync_batchnorm": True,
        }
    )
    given = dict(factory=two_parts, factory_fields={"slow": 0.5})
    runs = {n: tiny.setup(config, devices=n, **given) for n in (1, 4)}

    def take(devices, state, at):
        _, step, _, mesh = runs[devices]
        key = parallel.replicate(jax.random.key(5), mesh)
        for i in at:
            state, sums = step(state, parallel.shard_batch(tiny.examples(8, i), mesh), key)
        return state, sums

    halfway, _ = take(1, runs[1][0], [0, 1])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, halfway, host={})
        target = jax.tree.map(
            lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
            jax.eval_shape(lambda: jax.device_get(runs[4][0])),
            runs[4][0],
        )
        restored, _, _ = checkpoints.restore(target)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(halfway))
    on_four, sums = jax.device_get(take(4, restored, [2]))
    on_one, _ = jax.device_get(take(1, halfway, [2]))
    assert sums["bad"] == 0
    assert distance(on_four.params, on_one.params) < 1e-5
    assert distance(on_four.ema, on_one.ema) < 1e-5
    chex.assert_trees_all_equal(on_one.params["norm"]["bias"], np.zeros(4, np.float32))
    kernel = on_one.params["conv"]["kernel"].reshape(-1, 4)
    assert np.max(np.linalg.norm(kernel, axis=0)) <= 0.5 * (1 + 1e-6)
