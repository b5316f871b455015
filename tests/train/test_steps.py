from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cnns import create_model, init_variables
from flax_cnns import tree as pytree
from flax_cnns.data.augment import make_augment
from flax_cnns.data.mix import make_mix
from flax_cnns.errors import UserError
from flax_cnns.evaluation.exact import evaluate, per_class_metrics, summarize
from flax_cnns.train import losses, metrics, optimizers, parallel, schedules, steps
from flax_cnns.train.state import TrainState
from tests.train import tiny

AUGMENT = {
    "data.augment.pad_crop": 1,
    "data.augment.flip": True,
    "mix.mixup": 0.4,
    "mix.label_smoothing": 0.1,
    "train.ema": 0.9,
}


def variables(state):
    return {"params": state.params, "batch_stats": state.batch_stats, "ema": state.ema}


def distance(a, b):
    return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


SYNCHRONIZED = tiny.config(**AUGMENT, **{"train.sync_batchnorm": True})


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_four_devices_equal_one(mode):
    one, expected = tiny.train(SYNCHRONIZED)
    state, sums = tiny.train(SYNCHRONIZED, devices=4, mode=mode)
    assert distance(variables(state), variables(one)) < 1e-5
    np.testing.assert_allclose(sums["loss"], expected["loss"], rtol=1e-5)
    assert sums["count"] == 8


def test_local_batchnorm_differs_and_averages_what_each_device_saw():
    state, _ = tiny.train(tiny.config(), devices=4)
    assert distance(state.params, tiny.train(tiny.config())[0].params) > 1e-5
    # Means are linear, so after one step their average over devices is the mean of the whole batch.
    one, _ = tiny.train(tiny.config(), n=1)
    four, _ = tiny.train(tiny.config(), n=1, devices=4)
    np.testing.assert_allclose(
        four.batch_stats["norm"]["mean"], one.batch_stats["norm"]["mean"], atol=1e-6
    )
    assert np.all(four.batch_stats["norm"]["var"] <= one.batch_stats["norm"]["var"] + 1e-7)


class Plain(nn.Module):
    """Without BatchNorm and dropout, the pieces' gradients average to the batch's."""

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        return nn.Dense(tiny.CLASSES, name="head")(images.reshape(images.shape[0], -1))


def plain_setup(config, **kwargs):
    class WithStats:
        def init(self, key, images):
            return {"params": Plain().init(key, images)["params"], "batch_stats": {}}

        apply = staticmethod(Plain().apply)

    return tiny.setup(config, model=WithStats(), **kwargs)


def test_accumulation_equals_the_whole_batch():
    found = []
    for pieces in (1, 4):
        state, step, _, mesh = plain_setup(tiny.config(**{"train.accumulate": pieces}))
        data = parallel.shard_batch(tiny.examples(8), mesh)
        state, sums = step(state, data, jax.random.key(0))
        found.append((jax.device_get(state.params), float(sums["loss"]), float(sums["count"])))
    for params, loss, count in found[1:]:
        assert distance(params, found[0][0]) < 1e-6
        np.testing.assert_allclose(loss, found[0][1], rtol=1e-6)
        assert count == 8


def test_pieces_that_do_not_divide():
    state, step, _, mesh = plain_setup(tiny.config(**{"train.accumulate": 3}))
    with pytest.raises(
        UserError, match="8 examples per device cannot be split into 3 equal pieces"
    ):
        step(state, parallel.shard_batch(tiny.examples(8), mesh), jax.random.key(0))


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_recursion_over_params_and_statistics(warmup):
    config = tiny.config(**{"train.ema": 0.75, "train.ema_warmup": warmup})
    state, _ = tiny.train(config, n=0)
    average = {"params": state.params, "batch_stats": state.batch_stats}
    for i in range(3):
        state, _ = tiny.train(config, n=i + 1)
        now = {"params": state.params, "batch_stats": state.batch_stats}
        decay = min(0.75, (1 + i) / (10 + i)) if warmup else 0.75
        average = jax.tree.map(lambda a, n: decay * a + (1 - decay) * n, average, now)  # noqa: B023
    assert distance(state.ema, average) < 1e-6
    assert state.variables is state.ema


def test_gradients_that_are_not_finite_change_nothing_but_the_step():
    def poison(images, keys):
        images = images.astype(jnp.float32)
        first = images[:1, :1, :1, :1]
        return jnp.select([first == 255, first == 254], [np.nan, np.inf], 1.0) * images / 255

    config = tiny.config(**{"train.ema": 0.9, "optimizer.name": "adam"})
    state, step, _, mesh = tiny.setup(config, augment=poison)
    before = jax.device_get(state)
    good, key = parallel.shard_batch(tiny.examples(8), mesh), jax.random.key(0)
    for taken, pixel in enumerate((255, 254), start=1):
        bad = tiny.examples(8)
        bad["image"][0] = pixel
        state, sums = step(state, parallel.shard_batch(bad, mesh), key)
        assert sums["bad"] == 1
        assert sums["count"] == 0
        assert np.isfinite(sums["loss"])
        after = jax.device_get(state)
        assert after.step == taken
        chex.assert_trees_all_equal(after.replace(step=before.step), before)
    state, sums = step(state, good, key)
    assert sums["bad"] == 0
    assert distance(jax.device_get(state.params), before.params) > 0


def test_auxiliary_heads_are_weighed_by_name():
    labels = jax.nn.one_hot(jnp.array([1, 2]), 3)
    # One head is sown by the network, one by the module of the head, in the form flax keeps.
    heads = {"a": (jnp.ones((2, 3)),), "b": {"logits": (jnp.eye(3)[:2] * 5,)}}
    weights = [("a", lambda step: 0.3), ("b", lambda step: 0.1 * step)]
    found = float(losses.aux_loss(heads, labels, weights, 4))
    one = [float(losses.cross_entropy(head, labels).mean()) for head in jax.tree.leaves(heads)]
    np.testing.assert_allclose(found, 0.3 * one[0] + 0.4 * one[1], rtol=1e-6)
    with pytest.raises(UserError, match=r"train\.aux_weight: no rule decides b"):
        losses.aux_loss(heads, labels, weights[:1], 4)


def test_an_auxiliary_head_learns_in_training():
    (before, _), (after, _) = (
        tiny.train(tiny.config(), n=n, model=tiny.Tiny(aux=True)) for n in (0, 1)
    )
    assert distance(after.params["aux_head"], before.params["aux_head"]) > 1e-4


def test_dropout_differs_by_device_and_step_and_shared_does_not():
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, images, *, train: bool = False):
            w = nn.Dense(tiny.CLASSES, name="head")(images.reshape(images.shape[0], -1))
            if train:
                # Passed out through the statistics, which the step averages over devices.
                for name in ("dropout", "shared"):
                    value = jax.random.uniform(self.make_rng(name))
                    mean = self.variable("batch_stats", name, jnp.zeros, ())
                    square = self.variable("batch_stats", name + "2", jnp.zeros, ())
                    mean.value, square.value = value, value**2
            return w

    class Model:
        def init(self, key, images):
            names = ("dropout", "dropout2", "shared", "shared2")
            return {
                "params": Noise().init(key, images)["params"],
                "batch_stats": {n: jnp.zeros(()) for n in names},
            }

        apply = staticmethod(Noise().apply)

    state, step, _, mesh = tiny.setup(tiny.config(), model=Model(), devices=4)
    seen = []
    for i in range(2):
        data = parallel.shard_batch(tiny.examples(8, i), mesh)
        state, _ = step(state, data, jax.random.key(0))
        s = jax.device_get(state.batch_stats)
        spread = {n: s[n + "2"] - s[n] ** 2 for n in ("dropout", "shared")}
        assert spread["dropout"] > 1e-4
        assert abs(spread["shared"]) < 1e-6
        seen.append((float(s["dropout"]), float(s["shared"])))
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_evaluation_counts_every_example_once(mode):
    state, _, evaluation, mesh = tiny.setup(tiny.config(), devices=4, mode=mode)
    data = tiny.examples(13)
    padded = {
        "image": np.concatenate([data["image"], np.zeros((3, *tiny.SHAPE), np.uint8)]),
        "label": np.concatenate([data["label"], np.zeros(3, np.int32)]),
        "mask": np.array([1.0] * 13 + [0.0] * 3, np.float32),
    }
    halves = [{k: v[i : i + 8] for k, v in padded.items()} for i in (0, 8)]
    batches = (parallel.shard_batch(half, mesh, mode) for half in halves)
    total = evaluate(evaluation, state.variables, batches)
    normal = (data["image"].astype(np.float32) / 255 - 0.5) / 0.25
    logits = np.asarray(jax.jit(tiny.Tiny().apply)(jax.device_get(state.variables), normal))
    found = summarize(total)
    guess = logits.argmax(-1)
    top5 = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    assert total["count"] == 13
    np.testing.assert_allclose(found["accuracy"], np.mean(guess == data["label"]))
    np.testing.assert_allclose(found["top5"], np.mean((top5 == data["label"][:, None]).any(-1)))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, data["label"]).mean()
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert total["confusion"].sum() == 13
    counts = per_class_metrics(total["confusion"])
    np.testing.assert_array_equal(
        counts["count"], np.bincount(data["label"], minlength=tiny.CLASSES)
    )


def test_a_nan_in_a_masked_row_counts_nowhere():
    each = jnp.array([1.0, jnp.nan])
    total = metrics.sum_task_metrics(each, jnp.eye(2), jnp.array([0, 1]), jnp.array([1.0, 0.0]))
    assert metrics.compute(total) == {"loss": 1.0, "accuracy": 1.0}


def test_a_step_is_traced_once():
    chex.clear_trace_counter()
    config = tiny.config()
    model = tiny.Tiny()

    def apply(variables, images, **kwargs):
        return model.apply(variables, images, **kwargs)

    class Counted:
        init = staticmethod(model.init)

    Counted.apply = staticmethod(chex.assert_max_traces(apply, n=1))
    tiny.train(config, n=4, model=Counted())


def test_partition_keeps_the_state_tree():
    (before, _), (state, _) = (tiny.train(tiny.config(), n=n) for n in (0, 1))
    assert list(pytree.flatten(state)) == list(pytree.flatten(before))


def equations(jaxpr):
    """Yields all equations of a jaxpr and of its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_bfloat16_computes_and_float32_keeps():
    """Traces a ResNet-8: convolutions are in bfloat16; the head, the loss, every sum, and values
    that are sent between devices or kept are in float32."""
    shape, classes = (32, 32, 3), 11  # 11 occurs only in the head
    fields = dict(depths=(1, 1, 1), num_classes=classes, dtype="bfloat16")
    model = create_model("cifar_resnet20", **fields)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (1, *shape)))
    config = tiny.config(**{"train.ema": 0.9})
    schedule = schedules.make_schedule(config.schedule, total_steps=9, steps_per_epoch=1.0)
    optimizer = optimizers.make_optimizer(config.optimizer, variables["params"], schedule)
    state = jax.eval_shape(
        lambda v: TrainState.create(v, optimizer.init(v["params"]), ema=True), variables
    )
    step = steps.make_train_step(
        model.apply,
        optimizer,
        augment=make_augment(config.data.augment, image_shape=shape, mean=(0.5,), std=(0.2,)),
        mix=make_mix(config.mix, classes),
        ema_decay=0.9,
    )
    batch = {
        "image": jax.ShapeDtypeStruct((4, *shape), np.uint8),
        "label": jax.ShapeDtypeStruct((4,), np.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    trace = jax.make_jaxpr(step, axis_env=[("batch", 1)], return_shape=True)
    jaxpr, (new, sums) = trace(state, batch, key)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    kept = jax.tree.leaves((new.params, new.batch_stats, new.ema, new.opt_state, sums))
    assert {str(leaf.dtype) for leaf in kept} <= {"float32", "int32"}
    products, totals = [], []
    for equation in equations(jaxpr.jaxpr):
        inputs = [v.aval for v in equation.invars]
        if equation.primitive.name.startswith(("conv_", "conv2d", "dot_")):
            head = any(classes in x.shape for x in inputs)
            products.append((head, {str(x.dtype) for x in inputs}))
        elif equation.primitive.name.startswith(("reduce_sum", "psum")):
            totals += [str(x.dtype) for x in inputs]
    assert [dtypes for head, dtypes in products if head] == [{"float32"}] * 3
    convolutions = [dtypes for head, dtypes in products if not head]
    assert len(convolutions) >= 3 * 7 - 1
    assert all(dtypes == {"bfloat16"} for dtypes in convolutions)
    assert totals
    assert set(totals) <= {"float32", "int32"}


def test_accumulation_is_unrolled_for_a_cpu_alone(monkeypatch):
    """The platform is that of the mesh's devices, here of a TPU that this machine does not have."""
    config = tiny.config(**{"train.accumulate": 4})
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "parallelize", lambda step, mesh, **_: step)
        state, step, _, mesh = plain_setup(config)
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    far = jax.sharding.AbstractMesh((1,), ("batch",), abstract_device=tpu)
    state, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, tiny.examples(8))
    )
    for where, platform, loops in ((mesh, "cpu", False), (far, "tpu", True)):
        traced = parallel.parallelize(step, where).trace(state, batch, jax.random.key(0))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == loops, platform
