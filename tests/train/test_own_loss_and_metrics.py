"""A user's loss and metrics, soft labels and multilabel data, against NumPy."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cnns.data.mix import make_mix
from flax_cnns.errors import UserError
from flax_cnns.evaluation.exact import evaluate, summarize
from flax_cnns.train import evaluation_step, losses, metrics, parallel
from tests.train import tiny
from tests.train.test_steps import distance

RNG = np.random.default_rng(0)
K = tiny.CLASSES


def focal(logits, labels):
    """The focal loss of Lin et al. 2017, for one-hot labels."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(labels * (1 - jnp.exp(log_p)) ** 2 * log_p, axis=-1)


def recall(logits, labels, mask):
    """The sums and counts of each class: the metric is the mean over the classes."""
    right = labels * jax.nn.one_hot(jnp.argmax(logits, -1), K) * mask[:, None]
    return jnp.sum(right, 0), jnp.sum(labels * mask[:, None], 0)


def confidence(logits, labels, mask):
    del labels
    return {"sum": jnp.sum(mask * jnp.max(jax.nn.softmax(logits), -1)), "count": jnp.sum(mask)}


OWN = {"recall": recall, "confidence": confidence}


def numbers(logits, labels, loss):
    """Computes the metrics of integer labels [N] by NumPy."""
    guess, p = logits.argmax(-1), np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    seen = [k for k in range(K) if np.any(labels == k)]
    return {
        "loss": np.mean(loss(logits, np.eye(K)[labels])),
        "accuracy": np.mean(guess == labels),
        "recall": np.mean([np.mean(guess[labels == k] == k) for k in seen]),
        "confidence": np.mean(p.max(-1)),
    }


# ---------------------------------------------------------------------------- sums and counts


def test_sigmoid_cross_entropy_is_the_sum_over_the_labels():
    logits = jnp.asarray(9 * RNG.normal(size=(5, 4)), jnp.float32)
    labels = jnp.asarray(RNG.uniform(size=(5, 4)), jnp.float32)
    expected = optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1)
    np.testing.assert_allclose(losses.sigmoid_cross_entropy(logits, labels), expected, rtol=1e-6)


def test_metrics_of_multilabel_data():
    logits = jnp.array([[1.0, -1.0, 3.0], [1.0, 1.0, -2.0], [np.nan, 0.0, 0.0]])
    labels = jnp.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    each, mask = jnp.array([2.0, 4.0, np.nan]), jnp.array([1.0, 1.0, 0.0])
    found = metrics.compute(metrics.sum_task_metrics(each, logits, labels, mask, task="multilabel"))
    assert list(found) == metrics.list_names(3, task="multilabel")
    np.testing.assert_allclose(found["label_accuracy"], (3 + 1) / 6)
    assert (found["loss"], found["subset_accuracy"]) == (3.0, 0.5)


def test_soft_labels_count_by_their_largest():
    logits = jnp.eye(3)
    labels = jnp.array([[0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    found = metrics.compute(metrics.sum_task_metrics(jnp.ones(3), logits, labels))
    np.testing.assert_allclose(found["accuracy"], 2 / 3)


def test_masked_rows_reach_no_metric_of_the_user():
    """A masked row is seen neither as NaN nor as 0, whose logarithm is infinite."""

    def entropy(logits, labels, mask):
        return jnp.sum(mask * jnp.sum(labels * jnp.log(jnp.abs(logits)), -1)), jnp.sum(mask)

    logits = jnp.array([[np.nan, 1.0], [2.0, 4.0], [0.0, np.inf]])
    labels, mask = jnp.array([[np.nan, 1.0], [0.5, 0.5], [1.0, 1.0]]), jnp.array([0.0, 1.0, 0.0])
    found = metrics.sum_own_metrics({"entropy": entropy}, logits, labels, mask)
    np.testing.assert_allclose(metrics.compute(found)["entropy"], np.log(8) / 2, rtol=1e-6)
    nothing = metrics.sum_own_metrics({"entropy": entropy}, logits, labels, jnp.zeros(3))
    assert [float(value) for value in nothing.values()] == [0.0, 0.0]
    assert np.isnan(metrics.compute(nothing)["entropy"])


def test_ratios_are_added_before_they_are_divided_and_survive_json():
    total = {}
    for first, second in ((1, 4), (2, 0)):
        part = {
            "metric/a/b/sum": np.array([first, 3.0, 5.0]),
            "metric/a/b/count": np.array([4.0, second, 0.0]),
            "loss": np.float32(2.0),
            "count": np.float32(4),
        }
        total = json.loads(json.dumps(metrics.add_sums(total, part)))
    assert total["metric/a/b/sum"] == [3.0, 6.0, 10.0]
    found = metrics.compute(total, "train/")
    assert found == {"train/loss": 0.5, "train/a/b": (3 / 8 + 6 / 4) / 2}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (jnp.ones(()), r"expected \(sum, count\) or a dict .* got float32 \[\]"),
        ({"sum": 1.0}, "got a dict of 'sum'"),
        ((1.0, None), r"got \(float32 \[\], None\)"),
        (
            (jnp.ones(3), jnp.ones(2)),
            r"one shape, \[\] or \[M\], got \(float32 \[3\], float32 \[2\]",
        ),
        ((jnp.ones((2, 2)), jnp.ones((2, 2))), r"one shape"),
    ],
)
def test_what_is_no_sum_and_count(found, message):
    with pytest.raises(UserError, match=f"^metric 'mine': .*{message}"):
        metrics.sum_own_metrics({"mine": lambda *given: found}, jnp.ones((2, 3)), jnp.ones((2, 3)))


def test_numbers_of_single_examples_are_no_sums():
    logits = jnp.ones((3, 3))
    with pytest.raises(
        UserError, match=r"got float32 \[3\], one number per example; return its .sum"
    ):
        metrics.sum_own_metrics({"mine": lambda logits, labels, mask: (mask, mask)}, logits, logits)
    each = {"mine": lambda logits, labels, mask: (logits.sum(0), labels.sum(0))}  # 3 classes
    assert metrics.sum_own_metrics(each, logits, logits)["metric/mine/sum"].shape == (3,)


def test_an_error_of_a_loss_says_what_it_was_given():
    of_numbers = optax.softmax_cross_entropy_with_integer_labels
    with pytest.raises(TypeError) as caught:
        losses.select_loss(of_numbers, "classes")(jnp.ones((3, 4)), jnp.ones((3, 4)))
    assert "labels [N K], one row per example" in caught.value.__notes__[0]


def test_a_count_of_all_ratios():
    found = metrics.sum_own_metrics(
        {"m": lambda *_: (jnp.array([True, False]), 4)}, jnp.eye(2), jnp.eye(2)
    )
    assert metrics.compute(jax.device_get(found)) == {"m": 0.125}


@pytest.mark.parametrize("name", ["loss", "top5", "subset_accuracy", "l2", "step"])
def test_a_name_that_is_taken(name):
    config = tiny.config(**{"optimizer.l2": (0.1,)})
    with pytest.raises(UserError, match=f"metric {name!r}: the name is taken"):
        tiny.setup(config, metrics={name: recall})


def test_an_unknown_task():
    with pytest.raises(UserError, match="unknown 'multi'; did you mean 'multilabel'"):
        losses.select_loss(None, "multi")


def test_a_function_that_takes_other_arguments():
    with pytest.raises(UserError, match=r"metric 'm': it is called with .*mask\) but takes \(a\)"):
        tiny.setup(tiny.config(), metrics={"m": lambda a: a})
    with pytest.raises(UserError, match=r"train\.loss: .* with \(logits, labels\) but takes \(a\)"):
        tiny.setup(tiny.config(), loss=lambda a: a)


# ---------------------------------------------------------------------------- labels


def mixed(labels, **fields):
    config = tiny.config(**{f"mix.{name}": value for name, value in fields.items()}).mix
    images = jnp.ones((len(labels), 2, 2, 1))
    return make_mix(config, K)(images, jnp.asarray(labels), jax.random.key(0))[1]


def test_soft_labels_are_mixed_as_classes_are():
    labels = np.array([1, 3, 0, 6], np.int32)
    soft = np.eye(K, dtype=np.float32)[labels]
    fields = dict(label_smoothing=0.1)
    np.testing.assert_array_equal(mixed(soft, **fields), mixed(labels, **fields))
    np.testing.assert_array_equal(mixed(soft[:, :4]), np.pad(soft[:, :4], ((0, 0), (0, K - 4))))
    for labels in (np.eye(9, dtype=np.float32),):
        with pytest.raises(UserError, match="labels have 9 columns, but the network has 7 classes"):
            mixed(labels)
        with pytest.raises(UserError, match="labels have 9 columns, but the network has 7 classes"):
            losses.soft_labels(labels, K)


# ---------------------------------------------------------------------------- the steps


def padded(data, n):
    """Two batches of 8 in which all rows after the first n are masked."""
    more = 16 - n
    soft = data["label"].ndim > 1
    full = {
        "image": np.concatenate([data["image"], np.zeros((more, *tiny.SHAPE), np.uint8)]),
        "label": np.pad(data["label"], ((0, more), (0, 0)) if soft else (0, more)),
        "mask": np.arange(16) < n,
    }
    full["mask"] = full["mask"].astype(np.float32)
    return [{k: v[i : i + 8] for k, v in full.items()} for i in (0, 8)]


def logits_of(state, data):
    normal = (data["image"].astype(np.float32) / 255 - 0.5) / 0.25
    return np.asarray(jax.jit(tiny.Tiny().apply)(jax.device_get(state.variables), normal))


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_evaluation_by_own_loss_and_metrics_counts_every_example_once(mode):
    def poisoned(logits, labels):  # NaN in a masked row
        return jnp.where(jnp.any(labels > 0, -1), focal(logits, labels), jnp.nan)

    state, _, evaluation, mesh = tiny.setup(
        tiny.config(), devices=4, mode=mode, loss=poisoned, metrics=OWN
    )
    data = tiny.examples(13)
    soft = data | {"label": np.eye(K, dtype=np.float32)[data["label"]]}
    batches = (parallel.shard_batch(batch, mesh, mode) for batch in padded(soft, 13))
    total = evaluate(evaluation, state.variables, batches)
    found = summarize(total)
    expected = numbers(logits_of(state, data), data["label"], focal)
    assert set(found) == set(metrics.list_names(K, own_metrics=OWN))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(
        total["metric/recall/count"], np.bincount(data["label"], minlength=K)
    )
    assert total["confusion"].sum() == 13


def many_labels(n, seed=0):
    data = tiny.examples(n, seed)
    rng = np.random.default_rng(seed)
    return data | {"label": rng.integers(0, 2, (n, K)).astype(np.float32)}


def test_a_step_on_multilabel_data_descends_by_the_loss_of_all_heads():
    """The step's sums, over two devices with two pieces each, are equal to NumPy's. A step with NaN
    labels is then a bad step."""
    config = tiny.config(
        **{
            "optimizer.momentum": 0.0,
            "train.accumulate": 2,
            "optimizer.bn": (("norm", "frozen"),),
        }
    )
    model = tiny.Tiny(aux=True)
    state, step, _, mesh = tiny.setup(
        config, devices=2, model=model, task="multilabel", metrics=OWN
    )
    before, data = jax.device_get(state.params), many_labels(8)
    stats = jax.device_get(state.batch_stats)
    normal = (data["image"].astype(np.float32) / 255 - 0.5) / 0.25

    def loss(params):
        # Statistics are frozen, as in evaluation, where the auxiliary head is not sown.
        features = model.clone(aux=True)
        logits = features.apply({"params": params, "batch_stats": stats}, normal)
        of = optax.sigmoid_binary_cross_entropy
        return jnp.mean(of(logits, data["label"]).sum(-1)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(before)
    state, sums = step(state, parallel.shard_batch(data, mesh), jax.random.key(0))
    found = metrics.compute(jax.device_get(sums))
    after = jax.device_get(state.params)
    head = before["head"]["kernel"] - 0.1 * gradient["head"]["kernel"]
    np.testing.assert_allclose(after["head"]["kernel"], head, atol=1e-6)
    assert distance(after["aux_head"], before["aux_head"]) > 1e-4
    right = (np.asarray(logits) > 0) == (data["label"] > 0.5)
    np.testing.assert_allclose(found["label_accuracy"], right.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["subset_accuracy"], right.all(-1).mean(), rtol=1e-6)
    np.testing.assert_allclose(sums["loss"] / 8, loss(before)[0], rtol=1e-5)
    assert sums["metric/recall/count"].shape == (K,)
    assert "accuracy" not in found
    assert not np.isnan(found["recall"])
    data["label"][0] = np.nan
    _, sums = step(state, parallel.shard_batch(data, mesh), jax.random.key(0))
    assert sums["bad"] == 1
    assert not any(np.any(sums[f"metric/recall/{what}"]) for what in ("sum", "count"))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda logits, labels: jnp.mean(logits),
            r"returned float32 \[\], expected float32 \[4\]: one",
        ),
        (lambda logits, labels: logits, r"returned float32 \[4 7\], expected float32 \[4\]"),
        (
            lambda logits, labels: (logits[:, 0], {}),
            r"returned \(float32 \[4\], a dict of nothing\)",
        ),
        (lambda logits, labels: labels[:, 0] > 0, r"returned bool \[4\]"),
    ],
)
def test_a_loss_that_is_not_one_number_an_example(loss, message):
    state, step, evaluation, _ = tiny.setup(tiny.config(), devices=2, loss=loss)
    data = tiny.examples(8) | {"mask": np.ones(8, np.float32)}
    with pytest.raises(UserError, match=rf"^train\.loss: <lambda> {message}"):
        jax.eval_shape(step, state, data, jax.random.key(0))
    with pytest.raises(UserError, match=rf"^train\.loss: <lambda> {message}"):
        jax.eval_shape(evaluation, state.variables, data, None)


@pytest.mark.parametrize(
    ("logits", "came"),
    [
        (jnp.ones((8, 3)), r"float32 \[8 3\]"),
        (jnp.ones((8, 2, 7)), r"float32 \[8 2 7\]"),
        ((jnp.ones((8, 7)), None), r"\(float32 \[8 7\], None\)"),
    ],
)
def test_a_network_that_gives_no_logits(logits, came):
    step = evaluation_step.make_eval_step(
        lambda *given, **named: logits, normalize=jnp.asarray, num_classes=7
    )
    mapped = parallel.parallelize(step, parallel.make_mesh(jax.devices()[:1]))
    data = tiny.examples(8) | {"mask": np.ones(8, np.float32)}
    expected = rf"the network returned {came}, expected logits float32 \[8 7\]"
    with pytest.raises(UserError, match=expected):
        jax.eval_shape(mapped, {}, data, None)


def test_many_labels_have_no_confusion_matrix():
    with pytest.raises(UserError, match="not multilabel data"):
        evaluation_step.make_eval_step(
            tiny.Tiny().apply,
            normalize=jnp.asarray,
            num_classes=K,
            task="multilabel",
            confusion=True,
        )
