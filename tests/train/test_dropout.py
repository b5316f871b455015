"""Dropout after any layer of a network that has no code for it."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import create_model, init_variables
from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.train import batchnorm_modes, dropout

SHAPE = (8, 8, 8, 3)
IMAGES = np.random.RandomState(0).randn(*SHAPE).astype(np.float32)
RNGS = {name: jax.random.key(i) for i, name in enumerate(("dropout", "shared"))}
FIRST = ((r"stem/conv", 0.5), (r".*", 0.0))
rates_of = partial(dropout.decide_rates, images_shape=SHAPE)


def make(**fields):
    fields = dict(depths=(4,), widths=(4,), input_size=SHAPE[1:]) | fields
    return create_model("cifar_resnet20", **fields)


@pytest.fixture(scope="module")
def variables():
    return init_variables(make(), jax.random.key(0), SHAPE)


def train(model, variables, rates, mode="unit", rngs=RNGS, **apply):
    """Returns (logits, state) of a compiled training pass."""
    run = dropout.add_dropout(model.apply, rates, mode)
    mutable = ["batch_stats", *apply.pop("mutable", ())]
    return jax.jit(lambda v: run(v, IMAGES, train=True, mutable=mutable, rngs=rngs, **apply))(
        variables
    )


# ---- which values are dropped

drop = jax.jit(dropout.drop, static_argnums=(1, 3))


@pytest.mark.parametrize("mode", dropout.MODES)
def test_the_share_is_dropped_and_the_rest_scaled(mode):
    x = jnp.asarray(np.random.RandomState(1).uniform(1, 2, (64, 4, 4, 16)), jnp.bfloat16)
    y = drop(x, 0.25, jax.random.key(0), mode)
    assert y.dtype == x.dtype
    zero = np.asarray(y == 0)
    assert abs(zero.mean() - 0.25) < 0.05
    np.testing.assert_allclose(
        np.asarray(y, np.float32)[~zero], np.asarray(x, np.float32)[~zero] / 0.75, rtol=1e-2
    )
    whole = (zero.all((1, 2)) | ~zero.any((1, 2))).mean()  # channels of an image
    assert whole == 1 if mode == "channel" else whole < 0.05
    assert len(np.unique(zero.reshape(64, -1), axis=0)) > 56  # images get different masks


@pytest.mark.parametrize("shape", [(512, 8), (64, 5, 8)])
def test_features_and_tokens(shape):
    """For features [N C], both modes are equal. In tokens [N T C], "channel" drops a feature of all
    tokens of an image."""
    unit, channel = (drop(jnp.ones(shape), 0.5, jax.random.key(0), m) for m in dropout.MODES)
    if len(shape) == 2:
        np.testing.assert_array_equal(unit, channel)
    else:
        np.testing.assert_array_equal(channel, np.broadcast_to(channel[:, :1], shape))
        assert not np.array_equal(unit, np.broadcast_to(unit[:, :1], shape))


# ---- which layers


def test_one_rate_is_for_every_convolution_but_the_classifier(variables):
    rates = rates_of((0.1,), make(depths=(2,)), params=variables["params"])
    blocks = [f"stage1/block{i}/conv{j}" for i in (1, 2) for j in (1, 2)]
    assert rates == dict.fromkeys(["stem/conv", *blocks], 0.1)
    all_cnn = create_model("all_cnn_c", input_size=SHAPE[1:], last_padding=1)
    assert rates_of((0.1,), all_cnn, params={}).keys() == {
        *(f"stage{i}/conv{j}" for i in (1, 2) for j in (1, 2, 3)),
        *(f"stage3/conv{j}" for j in (1, 2)),
    }


def test_rules_see_blocks_norms_and_poolings(variables):
    rules = ((r"stage1/block[34]", 0.2), (r".*/norm1", 0.3), (r".*", 0.0))
    assert rates_of(rules, make(), params=variables["params"]) == {
        "stage1/block3": 0.2,
        "stage1/block4": 0.2,
        **{f"stage1/block{i}/norm1": 0.3 for i in (1, 2, 3, 4)},
    }
    deck = create_model("deck003_cifar100_example")
    pools = ((r"pool\d", 0.2), (r".*", 0.0))
    found = dropout.decide_rates(pools, deck, (1, 32, 32, 3), {})
    assert found == {"pool1": 0.2, "pool2": 0.2}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (((r"stage1/blok2/conv1", 0.1), (".*", 0.0)), "nearest path is 'stage1/block2/conv1'"),
        (((r"stem/.*", 0.1),), "no rule decides stem, stage1"),
    ],
)
def test_rules_that_say_too_much_or_too_little(variables, rules, words):
    with pytest.raises(UserError, match=f"train.dropout: .*{words}"):
        rates_of(rules, make(), params=variables["params"])


def test_blocks_of_a_stack_agree(variables):
    stacked = pytree.stack_blocks(variables["params"])
    given = partial(rates_of, model=make(scan=True), params=stacked)
    rates = given(((r"stage1/block[234](|/conv1)", 0.1), (r".*", 0.0)))
    assert {path: rate for path, rate in rates.items() if "block2-4" in path} == {
        "stage1/block2-4": 0.1,
        "stage1/block2-4/conv1": 0.1,
    }
    with pytest.raises(UserError, match=r"'stage1/block2-4' differently .*model.scan=False"):
        given(((r"stage1/block3/conv1", 0.1), (r".*", 0.0)))


# ---- in a training step


def test_only_that_layer_is_dropped(variables):
    """Half of the activations are kept and doubled, so the norm after them sees a larger variance.
    Nothing else is dropped: with a rate of almost 0 nothing changes."""
    model = make(depths=(1,))
    rates = rates_of(FIRST, model, params={})
    plain, state = train(model, variables, {})
    same, _ = train(model, variables, {"stem/conv": 1e-9})
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)
    dropped, new = train(model, variables, rates)
    assert not np.allclose(dropped, plain, atol=0.01)
    before, after = (s["batch_stats"]["stem"]["norm"]["var"] for s in (state, new))
    moved = (np.asarray(after) - 0.9) / (np.asarray(before) - 0.9)  # 0.9 old + 0.1 batch
    np.testing.assert_allclose(moved, 2, rtol=0.2)


def test_off_is_the_function_itself():
    apply = make().apply
    assert dropout.add_dropout(apply, {}) is apply


def test_own_draws_of_the_network_stay(variables):
    """With a rate of almost 0, the random draws of the network itself do not change."""
    model = make(depths=(1,), drop_path=0.5, drop_path_mode="sample")
    plain, _ = train(model, variables, {})
    found, _ = train(model, variables, {"stem/conv": 1e-9})
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
    other, _ = train(model, variables, {}, rngs=RNGS | {"dropout": jax.random.key(9)})
    assert not np.allclose(other, plain, atol=1e-2)


def test_a_cloned_layer_gets_dropout_once(variables):
    """A BatchNorm with changed fields shares its scope, and so its path, with the original."""
    caught = dict(mutable=["intermediates"], capture_intermediates=lambda m, _: m.name == "stem")
    with batchnorm_modes.intercept({"stem/norm": "frozen"}):
        _, state = train(make(depths=(1,)), variables, {"stem/norm": 0.5}, **caught)
    stem = np.asarray(state["intermediates"]["stem"]["__call__"][0])
    assert 0.7 < (stem == 0).mean() < 0.8  # 0.75 zeros by dropout and ReLU; 0.875 if dropped twice


def test_scanned_blocks_draw_for_themselves(variables):
    """Makes equal blocks whose first norm is the constant 1 and whose second convolution acts as a
    1x1: the mean of the second norm shows which channels were dropped."""
    model = make(scan=True, remat=True)
    flat = pytree.flatten(variables)
    one = np.zeros((3, 3, 4, 4), np.float32)
    one[1, 1] = np.diag([1, 1, 1, 1])
    for i in (2, 3, 4):
        block = f"params/stage1/block{i}"
        flat[f"{block}/norm1/scale"] = np.zeros(4, np.float32)
        flat[f"{block}/norm1/bias"] = np.ones(4, np.float32)
        flat[f"{block}/conv2/kernel"] = one
    stacked = pytree.stack_blocks(pytree.unflatten(flat))
    rules = ((r"stage1/block[234]/conv2", 0.5), (r".*", 0.0))
    rates = rates_of(rules, model, params=stacked["params"])
    _, state = train(model, stacked, rates, "channel")
    means = 10 * np.asarray(state["batch_stats"]["stage1"]["block2-4"]["norm2"]["mean"])
    # Each of 8 images has 0 or 2.
    np.testing.assert_allclose(means * 4, np.round(means * 4), atol=1e-4)
    assert 0 < means.mean() < 2
    assert len(np.unique(np.round(means, 3), axis=0)) == 3


def test_skipped_and_recomputed_branches_draw_the_same(variables):
    """Inside `nn.cond` and `nn.remat`, in the forward and the backward pass."""
    rates = {"stage1/block1/conv1": 0.5}

    def grads(**fields):
        run = dropout.add_dropout(make(depths=(1,), **fields).apply, rates)

        def loss(params):
            given = variables | {"params": params}
            logits, _ = run(given, IMAGES, train=True, mutable=["batch_stats"], rngs=RNGS)
            return jnp.sum(logits**2)

        return jax.jit(jax.grad(loss))(variables["params"])

    expected, found = grads(), grads(drop_path=1e-6, remat=True)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)
