"""A user's regularizers: valid objects, their keys, and that they act as built-in ones."""

from __future__ import annotations

import types
import zlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.train import batchnorm_modes, optimizers, parallel, regularizers, schedules
from flax_cnns.train.regularizers import make_regularizer
from tests.train import tiny
from tests.train.test_steps import distance, variables

IMAGES, LABELS = jnp.ones((4, 8, 8, 1)), jnp.eye(4, 7)
PARAMS = {"a": jnp.arange(4.0), "b": {"c": jnp.ones((2, 3))}}
KEY = jax.random.key(3)


def having(**hooks):
    return types.SimpleNamespace(**hooks)


class Cutting:
    """Cuts a row out of each image, chosen by its key."""

    def augment(self, images, keys):
        size = images.shape[1]
        rows = jax.vmap(lambda key: jax.random.randint(key, (), 0, size))(keys)
        return images * (jnp.arange(size) != rows[:, None])[:, :, None, None]


class Turning:
    """Blends each image and its labels with its neighbor."""

    def mix(self, images, labels, key):
        share = jax.random.uniform(key)

        def blend(x):
            pairs = x.reshape(-1, 2, *x.shape[1:])
            return (share * pairs + (1 - share) * pairs[:, ::-1]).reshape(x.shape)

        return blend(images), blend(labels)


class Halving:
    """Halves the outputs of convolutions in training."""

    def intercept(self, next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        is_conv = isinstance(context.module, nn.Conv) and context.method_name == "__call__"
        return 0.5 * y if is_conv else y


class Decaying:
    def penalty(self, params, step):
        del step
        return 0.005 * sum(
            jnp.sum(w**2) for w in (params["conv"]["kernel"], params["head"]["kernel"])
        )


def test_an_object_has_the_hooks_that_are_its_methods():
    found = make_regularizer("Cutting", Cutting())
    assert [hook for hook, one in found._asdict().items() if one is not None] == ["augment"]
    both = make_regularizer(
        "two", having(penalty=lambda params, step: 0.0, constrain=None, rate=3.0)
    )
    assert both.constrain is None
    assert both.penalty(PARAMS, 0) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            having(penality=lambda params, step: 0.0),
            "'penality' is not a hook; did you mean 'penalty'",
        ),
        (having(mix=Turning().mix, gradient=lambda *a: a), "'gradient' .* mean 'gradients'"),
        (
            having(strength=3.0),
            "has no hook; expected at least one of the methods augment, mix, intercept",
        ),
        (lambda params, step: 0.0, "has no hook"),
        (Cutting, "Cutting is a class; give an instance of it"),
        (having(penalty=0.1), r"penalty: expected a function, got float32 \[\]"),
        (
            having(penalty=lambda params: 0.0),
            r"penalty: it is called with \(params, step\) but takes \(params\)",
        ),
    ],
)
def test_what_is_no_regularizer(given, message):
    with pytest.raises(UserError, match=rf"^regularizer 'Mine'.*{message}"):
        make_regularizer("Mine", given)


@pytest.mark.parametrize(
    ("hook", "method", "message"),
    [
        (
            "augment",
            lambda i, k: i[:, :4],
            r"expected float32 \[4 8 8 1\], got float32 \[4 4 8 1\]",
        ),
        ("augment", lambda i, k: i > 0, r"got bool \[4 8 8 1\]"),
        ("mix", lambda i, y, k: i, r"expected \(images, labels\), got float32 \[4 8 8 1\]"),
        ("mix", lambda i, y, k: (i, y.argmax(-1)), r"labels: expected float32 \[4 7\], got int32"),
        ("penalty", lambda p, s: p["a"], r"expected one number, float32 \[\], got float32 \[4\]"),
        ("penalty", lambda p, s: None, "got None"),
        ("gradients", lambda g, p, k, s: {"a": g["a"]}, "returned lacks 'b/c'"),
        ("perturb", lambda p, g: p | {"d": g["a"]}, "returned has an extra 'd'"),
        ("constrain", lambda p: p | {"a": p["a"][:2]}, r"a: expected float32 \[4\], got .* \[2\]"),
    ],
)
def test_what_a_hook_gives_is_checked_while_tracing(hook, method, message):
    arguments = {
        "augment": (IMAGES, jax.random.split(KEY, 4)),
        "mix": (IMAGES, LABELS, KEY),
        "penalty": (PARAMS, 0),
        "gradients": (PARAMS, PARAMS, KEY, 0),
        "perturb": (PARAMS, PARAMS),
        "constrain": (PARAMS,),
    }[hook]
    checked = getattr(make_regularizer("Mine", having(**{hook: method})), hook)
    with pytest.raises(UserError, match=rf"^regularizer 'Mine', {hook}.*{message}"):
        jax.eval_shape(checked, *arguments)


@pytest.mark.parametrize("name", ["l2", "accuracy", "count"])
def test_a_name_that_is_taken(name):
    with pytest.raises(UserError, match=f"{name!r}: the name is taken"):
        optimizers.make_optimizer(
            tiny.config().optimizer,
            PARAMS,
            schedules.constant(0.1),
            own_regularizers={name: make_regularizer(name, Decaying())},
        )


def test_keys_are_those_of_the_stream_folded_with_the_name():
    keys, folded = jax.random.split(KEY, 4), zlib.crc32(b"Mine")
    seen = {}

    def note(hook, *given):
        seen[hook] = jax.random.key_data(given[-1])
        return given[:-1] if hook == "mix" else given[0]

    mine = make_regularizer(
        "Mine",
        having(
            augment=lambda images, keys: note("augment", images, keys),
            mix=lambda images, labels, key: note("mix", images, labels, key),
            gradients=lambda grads, params, key, step: note("gradients", grads, key),
        ),
    )
    mine.augment(IMAGES, keys)
    mine.mix(IMAGES, LABELS, KEY)
    mine.gradients(PARAMS, PARAMS, KEY, 0)
    each = jax.vmap(lambda key: jax.random.fold_in(key, folded))(keys)
    np.testing.assert_array_equal(seen["augment"], jax.random.key_data(each))
    for hook in ("mix", "gradients"):
        one = jax.random.fold_in(KEY, folded)
        np.testing.assert_array_equal(seen[hook], jax.random.key_data(one))


def test_a_layer_that_runs_as_another_one_is_intercepted_once():
    calls = []

    def count(next_function, args, kwargs, context):
        calls.append(("/".join(context.module.path), context.method_name))
        return next_function(*args, **kwargs)

    model = tiny.Tiny()
    given = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES))
    own = {"Mine": make_regularizer("Mine", having(intercept=count))}

    def apply(given):
        with regularizers.intercept(own), batchnorm_modes.intercept({"norm": "frozen_stats"}):
            return model.apply(given, IMAGES, train=True, mutable=["batch_stats"])

    jax.eval_shape(apply, given)
    assert calls.count(("norm", "__call__")) == 1
    assert ("", "__call__") in calls


BUILT_IN = tiny.config(
    **{
        "optimizer.l2": ((r".*/kernel", 0.01), (r".*", 0.0)),
        "optimizer.sam": 0.1,
        "optimizer.max_norm": (0.5,),
    }
)


def test_own_hooks_do_what_built_in_ones_do():
    """L2, SAM and max-norm as one object with three hooks take the same steps, up to rounding."""
    found = regularizers.make_built_in_regularizers(
        BUILT_IN.optimizer,
        jax.device_get(tiny.train(BUILT_IN, n=0)[0].params),
        {"conv": dict.fromkeys(("kernel", "bias"), True), "head": {"kernel": True, "bias": True}}
        | {"norm": dict.fromkeys(("scale", "bias"), True)},
    )
    all_three = having(
        penalty=Decaying().penalty,
        perturb=found["sam"].perturb,
        constrain=found["max_norm"].constrain,
    )
    state, step, _, mesh = tiny.setup(tiny.config(), own={"Decaying": all_three})
    key = jax.random.key(5)
    for i in range(2):
        state, sums = step(state, parallel.shard_batch(tiny.examples(8, i), mesh), key)
    expected, expected_sums = tiny.train(BUILT_IN, n=2)
    assert distance(jax.device_get(state.params), expected.params) < 1e-6
    np.testing.assert_allclose(sums["Decaying"], expected_sums["l2"], rtol=1e-6)
    np.testing.assert_allclose(sums["norm"], expected_sums["norm"], rtol=1e-5)


ALL = {"Cutting": Cutting(), "Turning": Turning(), "Halving": Halving(), "Decaying": Decaying()}


def run(devices, mode, own, n=2):
    config = tiny.config(**{"train.sync_batchnorm": True, "data.augment.flip": True})
    state, step, _, mesh = tiny.setup(config, devices=devices, mode=mode, own=own)
    key = parallel.replicate(jax.random.key(5), mesh)
    for i in range(n):
        data = parallel.shard_batch(tiny.examples(8, i), mesh, mode)
        state, sums = step(state, data, key)
    return jax.device_get((variables(state), sums))


@pytest.fixture(scope="module")
def on_one_device():
    return run(1, "shard_map", ALL)


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_the_number_of_devices_does_not_matter(mode, on_one_device):
    found, sums = run(4, mode, ALL)
    assert distance(found, on_one_device[0]) < 1e-5
    chex.assert_trees_all_close(sums, on_one_device[1], rtol=1e-5)
