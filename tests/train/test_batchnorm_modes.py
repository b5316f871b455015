"""The modes of BatchNorm layers in training; frozen layers do not change."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import init_variables, layers
from flax_cnns import tree as pytree
from flax_cnns.data.mix import make_mix
from flax_cnns.errors import UserError
from flax_cnns.models.resnet import BasicBlock, ResNet
from flax_cnns.train import batchnorm_modes, optimizers, parallel, schedules, steps
from flax_cnns.train.state import TrainState
from tests.train import tiny

HEAD = ((r"params/head/.*", True), (r".*", False))


def before_and_after(config, *, devices=1, mode="shard_map", batch=8):
    """Returns the state before and after three steps, with statistics that would show rounding."""
    state, step, _, mesh = tiny.setup(config, devices=devices, mode=mode)
    rng = np.random.default_rng(0)
    odd = jax.tree.map(lambda x: np.float32(rng.uniform(0.1, 0.9, x.shape)), state.batch_stats)
    before = jax.device_get(state.replace(batch_stats=odd))
    if before.ema is not None:
        before = before.replace(ema={"params": before.params, "batch_stats": odd})
    state = parallel.replicate(before, mesh)
    key = parallel.replicate(jax.random.key(5), mesh)
    for i in range(3):
        data = parallel.shard_batch(tiny.examples(batch, i), mesh, mode)
        state, _ = step(state, data, key)
    return before, jax.device_get(state)


# Three devices: the mean of three equal numbers may be rounded.
@pytest.mark.parametrize(
    ("devices", "mode", "sync"),
    [(3, "shard_map", False), (3, "pmap", True)],
)
def test_what_is_frozen_stays_to_the_bit(devices, mode, sync):
    config = tiny.config(
        **{
            "optimizer.trainable": HEAD,
            "optimizer.weight_decay": (0.1,),
            "train.ema": 0.5,
            "train.sync_batchnorm": sync,
        }
    )
    before, after = before_and_after(config, devices=devices, mode=mode, batch=9)
    for layer in ("conv", "norm"):
        chex.assert_trees_all_equal(after.params[layer], before.params[layer])
        chex.assert_trees_all_equal(after.ema["params"][layer], before.params[layer])
    chex.assert_trees_all_equal(after.batch_stats, before.batch_stats)
    chex.assert_trees_all_equal(after.ema["batch_stats"], before.batch_stats)
    assert not np.array_equal(after.params["head"]["kernel"], before.params["head"]["kernel"])
    assert not np.array_equal(
        after.ema["params"]["head"]["kernel"], before.params["head"]["kernel"]
    )


def test_a_frozen_network_trains_on_what_it_computes_in_evaluation():
    config = tiny.config(**{"optimizer.trainable": HEAD, "train.accumulate": 2})
    state, step, evaluation, mesh = tiny.setup(config)
    data = tiny.examples(8)
    masked = parallel.shard_batch(data | {"mask": np.ones(8, np.float32)}, mesh)
    evaluated = evaluation(state.variables, masked, None)
    _, sums = step(state, parallel.shard_batch(data, mesh), jax.random.key(0))
    np.testing.assert_allclose(sums["loss"], evaluated["loss"], rtol=1e-6)


@pytest.mark.parametrize("mode", batchnorm_modes.MODES)
def test_modes_in_a_network_that_learns(mode):
    config = tiny.config(**{"optimizer.bn": (("norm", mode),), "train.ema": 0.5})
    before, after = before_and_after(config)
    moved = lambda a, b: not np.array_equal(a, b)  # noqa: E731
    assert moved(after.params["conv"]["kernel"], before.params["conv"]["kernel"])
    for name in ("scale", "bias"):
        learned = moved(after.params["norm"][name], before.params["norm"][name])
        assert learned == (mode != "frozen")
    for name in ("mean", "var"):
        was = before.batch_stats["norm"][name]
        assert moved(after.batch_stats["norm"][name], was) == (mode == "train")
        assert moved(after.ema["batch_stats"]["norm"][name], was) == (mode == "train")
    memory = {path.split("trace/")[-1] for path in pytree.flatten(after.opt_state)}
    assert ("norm/scale" in memory) == (mode != "frozen")


def test_frozen_weights_with_moving_statistics_are_had_by_asking():
    config = tiny.config(**{"optimizer.trainable": HEAD, "optimizer.bn": ((".*", "train"),)})
    before, after = before_and_after(config)
    chex.assert_trees_all_equal(after.params["norm"], before.params["norm"])
    assert not np.array_equal(after.batch_stats["norm"]["mean"], before.batch_stats["norm"]["mean"])


STATS = {
    "stem": {"norm": {"mean": 0, "var": 0}},
    "stage1": {
        "block1": {"norm1": {"mean": 0, "var": 0}},
        "block2-3": {"norm1": {"mean": np.zeros(2), "var": np.zeros(2)}},
    },
}
TRAINABLE = {
    "stem": {"conv": {"kernel": False}},  # its norm has neither scale nor bias
    "stage1": {
        "block1": {"norm1": {"scale": False, "bias": True}, "conv1": {"kernel": False}},
        "block2-3": {"norm1": {"scale": False, "bias": False}, "conv1": {"kernel": True}},
    },
}
ALL = {"stem/norm": "train", "stage1/block1/norm1": "train", "stage1/block2-3/norm1": "train"}


def test_without_rules_a_layer_is_frozen_with_its_parameters():
    found = batchnorm_modes.decide_modes((), TRAINABLE, STATS)
    assert found == ALL | {"stem/norm": "frozen", "stage1/block2-3/norm1": "frozen"}


def test_rules_see_each_block_of_a_stack():
    rules = ((r"stage1/block[23]/.*", "frozen_stats"), (r".*", "train"))
    found = batchnorm_modes.decide_modes(rules, TRAINABLE, STATS)
    assert found == ALL | {"stage1/block2-3/norm1": "frozen_stats"}
    rules = (("stage1/block2/.*", "frozen"), (".*", "train"))
    with pytest.raises(UserError, match=r"'stage1/block2-3/norm1' differently.*model\.scan=False"):
        batchnorm_modes.decide_modes(rules, TRAINABLE, STATS)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            (("stage2/.*", "frozen"), (".*", "train")),
            "optimizer.bn: .* 'stage2/.*'.*nearest .*stage1",
        ),
        ((("stem/.*", "frozen"),), "no rule decides stage1/block1/norm1"),
    ],
)
def test_rules_that_say_too_much_or_too_little(rules, words):
    with pytest.raises(UserError, match=words):
        batchnorm_modes.decide_modes(rules, TRAINABLE, STATS)


def test_rules_for_a_network_without_batchnorm():
    with pytest.raises(
        UserError, match=r"optimizer.bn: .* 'stem/.*' decides nothing; there are no"
    ):
        batchnorm_modes.decide_modes((("stem/.*", "frozen"), (".*", "train")), TRAINABLE, {})


# ---- a network with stages: scanned, rematerialized, with accumulation

LAST = ((r"params/(head|stage2)/.*", True), (r".*", False))


def residual_network(depths, **fields):
    return ResNet(
        depths=depths,
        block=BasicBlock,
        width=4,
        stem=layers.CifarStem,
        num_classes=tiny.CLASSES,
        input_size=tiny.SHAPE,
        **fields,
    )


def init_residual_network(model):
    """Returns named variables with statistics that differ from the initial ones, so that
    their use matters."""
    variables = init_variables(model, jax.random.key(0), (1, *tiny.SHAPE))
    rng = np.random.default_rng(0)
    variables["batch_stats"] = jax.tree.map(
        lambda s: s + jnp.float32(0.5 * rng.random(s.shape)), variables["batch_stats"]
    )
    return variables


@functools.cache
def shapes_of(model):
    """Modes for the variables as a step takes them: stacked if the network scans."""

    def make():
        variables = init_variables(model, jax.random.key(0), (1, *tiny.SHAPE))
        return pytree.stack_blocks(variables) if model.scan else variables

    return jax.eval_shape(make)


def step_flops(model, trainable):
    """Returns the FLOPs of the lowered step of a residual network."""
    config = tiny.config(**{"optimizer.trainable": trainable})
    variables = shapes_of(model)
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        variables["params"],
        schedules.constant(0.05),
        batch_stats=variables["batch_stats"],
    )
    step = steps.make_train_step(
        model.apply,
        optimizer,
        augment=lambda images, keys: images.astype(jnp.float32) / 255,
        mix=make_mix(config.mix, tiny.CLASSES),
        accumulate=config.train.accumulate,
    )
    mesh = parallel.make_mesh(jax.devices()[:1])
    state = jax.eval_shape(lambda v: TrainState.create(v, optimizer.init(v["params"])), variables)
    lowered = parallel.parallelize(step, mesh).lower(state, tiny.examples(8), jax.random.key(0))
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("depths", "fields"), [((1, 1), {}), ((3, 1), {"scan": True, "remat": True})]
)
def test_nothing_is_computed_backwards_below_the_lowest_layer_that_learns(depths, fields):
    """Compares FLOPs of lowered programs. A step that learns everything costs about three forward
    passes, or four with rematerialized blocks."""
    model = residual_network(depths, **fields)
    everything, last, head = (step_flops(model, trainable) for trainable in ((), LAST, HEAD))
    assert head < 0.4 * everything
    assert 1.4 * head < last < 0.75 * everything


def test_scanned_and_rematerialised_as_unrolled():
    modes = {"stem/norm": "frozen", "stage1/block1/norm1": "frozen_stats"}
    of_blocks = lambda *blocks: modes | {f"stage1/{b}/norm2": "frozen" for b in blocks}  # noqa: E731
    images = tiny.examples(8)["image"].astype(np.float32) / 255

    def run(model, variables, modes):
        @jax.jit
        def training(variables):
            with batchnorm_modes.intercept(modes):
                return model.apply(variables, images, train=True, mutable=["batch_stats"])

        return training(variables)

    model = residual_network((3,))
    variables = init_residual_network(model)
    expected = run(model, variables, of_blocks("block2", "block3"))
    kept = expected[1]["batch_stats"]["stage1"]["block2"]
    was = variables["batch_stats"]["stage1"]["block2"]
    chex.assert_trees_all_equal(kept["norm2"], was["norm2"])
    assert not np.array_equal(kept["norm1"]["mean"], was["norm1"]["mean"])
    scanned = residual_network((3,), scan=True, remat=True)
    found = run(scanned, pytree.stack_blocks(variables), of_blocks("block2-3"))
    chex.assert_trees_all_close(pytree.unstack_blocks(found), expected, rtol=1e-4, atol=1e-5)
