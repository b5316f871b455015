"""What the sanity checks measure, against closed forms, NumPy, SciPy, scikit-learn and Optax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.errors import UserError
from flax_cnns.studies.search.sanity import bench, check, initial, inputs, trainings
from tests.runs import own_parts

HERE = "tests.studies.search.sanity.parts"
CONFIG = {
    "model": {"name": f"{HERE}:Net"},
    "data": {"name": f"{HERE}:digits", "batch_size": 40, "eval_batch_size": 200},
    "optimizer": {"momentum": 0.0},
    "schedule": {"learning_rate": 0.05, "name": "constant"},
    "train": {"duration": "100 steps"},
}


def make_config(**changes):
    config = configs.complete(CONFIG)
    for path, value in changes.items():
        configs.set_config_field(config, path.replace("__", "."), value)
    return config


# ---- images and labels


def test_nearest_neighbors_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(50, 6)), rng.normal(size=(80, 6))
    labels = np.arange(80)
    reference = KNeighborsClassifier(1).fit(others, labels).predict(points)
    np.testing.assert_array_equal(inputs.find_nearest_rows(points, others), reference)
    own = inputs.find_nearest_rows(others, others, own=True)
    reference = KNeighborsClassifier(2).fit(others, labels).kneighbors(others)[1][:, 1]
    np.testing.assert_array_equal(own, reference)


def test_chance_is_what_independent_labels_give():
    rng = np.random.default_rng(1)
    guessed, true = rng.integers(0, 3, 300), rng.choice(3, 300, p=(0.7, 0.2, 0.1))
    found = inputs.compare_labels(guessed, true)
    expected = sum((guessed == k).mean() * (true == k).mean() for k in range(3))
    assert found["chance"] == pytest.approx(expected, abs=0.003)
    reference = stats.permutation_test(
        (guessed, true),
        lambda a, b: (a == b).mean(),
        permutation_type="pairings",
        n_resamples=999,
        alternative="greater",
        rng=2,
    )
    assert found["p"] == pytest.approx(reference.pvalue, abs=0.06)  # 3 deviations of the difference
    assert inputs.compare_labels(true, true)["p"] == 1 / (1 + inputs.PERMUTATIONS)


def test_images_are_shrunk_by_averaging():
    images = np.arange(2 * 32 * 48 * 1, dtype=np.float32).reshape(2, 32, 48, 1)
    small = inputs.shrink(images)
    assert small.shape == (2, 16 * 16)
    assert small[1, 17] == images[1, 2:4, 3:6].mean()
    assert inputs.shrink(images[:, :8, :8]).shape == (2, 64)


@pytest.fixture(scope="module")
def plain():
    """A bench of the plain config, and its examples."""
    made = bench.SanityBench(make_config())
    return made, made.collect("train"), made.collect("validation")


def test_examples_come_from_train_and_validation_only(plain, monkeypatch):
    made, train, validation = plain
    assert len(train["label"]) == 800
    assert len(validation["label"]) == 200
    read = []
    monkeypatch.setattr(
        bench.pipeline, "eval_batches", lambda data, split, *a, **k: read.append(split) or iter([])
    )
    with pytest.raises(AttributeError):  # an iterator cannot be closed: the split was asked for
        made.collect("validation")
    assert read == ["validation"]


def test_inputs_of_sound_data(plain):
    made, train, validation = plain
    numbers = inputs.measure_inputs(made, train, validation)
    images = train["image"] / 255
    assert numbers["mean"] == pytest.approx(
        [(images.mean() - made.dataset.mean[0]) / made.dataset.std[0]], abs=1e-4
    )
    assert numbers["mean"] == pytest.approx([0.0], abs=1e-3)
    assert numbers["std"] == pytest.approx([1.0], abs=1e-3)
    assert numbers["counts"] == np.bincount(train["label"]).tolist()
    assert numbers["in_both"] == numbers["contradicting"] == 0
    # With 10 equally frequent classes, 40 draws miss a class with probability 0.9^40.
    assert numbers["order"]["expected"] == pytest.approx(10 * (1 - 0.9**40), abs=0.02)
    assert numbers["order"]["classes"] == pytest.approx(numbers["order"]["expected"], abs=0.3)


# ---- the loss


def test_the_initial_loss_is_that_of_numpy(plain):
    made, train, _ = plain
    meter = bench.Meter(made.components, made.optimizer.batchnorm_modes, 400)
    found = meter.measure(made.variables, train)
    images, labels = made.normalize(train["image"]), train["label"]
    forward = jax.jit(
        lambda images: made.components.model.apply(
            made.variables, images, train=True, mutable=["batch_stats"]
        )[0]
    )
    losses, right = [], []
    # On four devices, BatchNorm normalizes each device's part of a batch of 400.
    for first in range(0, 800, 100):
        logits = np.asarray(forward(images[first : first + 100]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(-log_p[np.arange(100), labels[first : first + 100]])
        right.append(logits.argmax(1) == labels[first : first + 100])
    assert made.devices == 4
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["accuracy"] == np.mean(right)
    assert found["guessing"] == pytest.approx(np.log(10), rel=1e-6)
    assert found["count"] == 800


def test_each_penalty_is_that_of_numpy():
    config = make_config(
        optimizer__l2=(0.01,),
        optimizer__weight_decay=((r".*/kernel", 0.1), (r".*", 0.0)),
        mix__label_smoothing=0.2,
        train__regularizers=(f"{HERE}:Decay",),
        model__aux=True,
        train__aux_weight=(0.5,),
    )
    configs.set_config_field(config, "own.Decay.rate", 0.3)
    made = bench.SanityBench(config)
    meter = bench.Meter(made.components, made.optimizer.batchnorm_modes, 400)
    numbers = initial.measure_loss(made, meter, made.collect("train"))
    params = made.variables["params"]
    squares = {p: float((np.asarray(x) ** 2).sum()) for p, x in flatten(params).items()}
    terms = {name.partition(" (")[0]: (value, counts) for name, value, counts in numbers["terms"]}
    assert terms["L2"][0] == pytest.approx(0.005 * sum(squares.values()), rel=1e-5)
    kernels = sum(x for path, x in squares.items() if path.endswith("kernel"))
    assert terms["weight decay"] == (pytest.approx(0.05 * kernels, rel=1e-5), True)
    head = sum(float(np.abs(x).sum()) for x in params["head"].values())
    assert terms["Decay"][0] == pytest.approx(0.3 * head, rel=1e-5)
    assert terms["auxiliary heads"][0] == pytest.approx(0.5 * np.log(10), rel=1e-5)  # logits 0
    # Cross-entropy is linear in the labels: 0.8 of the loss, and 0.2 of that of even labels.
    assert terms["label smoothing"][0] > -0.2 * numbers["loss"]
    decoupled = make_config(optimizer__name="adamw", optimizer__weight_decay=(0.1,))
    decoupled.optimizer.momentum = 0.9
    ((_, _, counts),) = initial.list_penalties(bench.SanityBench(decoupled))
    assert not counts


def test_multilabel_data_start_at_k_ln_2(plain):
    made, train, _ = plain
    hot = np.asarray(jax.nn.one_hot(train["label"], 10))
    components = made.components._replace(
        dataset=dataclasses.replace(made.dataset, task="multilabel")
    )
    meter = bench.Meter(components, made.optimizer.batchnorm_modes, 400)
    found = meter.measure(made.variables, {"image": train["image"], "label": hot})
    assert found["guessing"] == pytest.approx(10 * np.log(2), rel=1e-5)


def flatten(tree):
    return {"/".join(k.key for k in p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


# ---- trainings


def test_a_step_at_a_rate_is_optaxs_step_at_that_rate(plain):
    """One program serves all rates."""
    made, train, _ = plain
    trainer = bench.Trainer(made.components, made.variables, quiet=True)
    few = {name: x[:20] for name, x in train.items()}
    images, labels = jnp.asarray(made.normalize(few["image"])), few["label"]

    @jax.jit
    def mean_gradient(params):
        def loss(params, images, labels):
            variables = {"params": params, "batch_stats": made.variables["batch_stats"]}
            logits, _ = made.components.model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        # Each of four devices normalizes its five images.
        parts = images.reshape(4, 5, *images.shape[1:]), labels.reshape(4, 5)
        grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, *parts)
        return jax.tree.map(lambda g: g.mean(0), grads)

    grads = mean_gradient(made.variables["params"])
    for rate in (0.5, 0.01):
        batch = trainer.components.shard(few)
        state, found = trainer.step(trainer.start(), batch, rate)
        for path, new in flatten(jax.device_get(state.params)).items():
            old = np.asarray(flatten(made.variables["params"])[path])
            expected = old - rate * np.asarray(flatten(grads)[path])
            np.testing.assert_allclose(new, expected, rtol=2e-4, atol=1e-5)
    assert found["bad"] == 0


def test_rates_of_a_short_training():
    rates = trainings.list_rates(40, 0.8)
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)
    assert rates[22] == pytest.approx(0.4)  # half of the cosine
    assert len(rates) == 40
    assert trainings.list_rates(1, 0.8) == [0.8]


def test_smoothing_keeps_lines_and_ranks_overflow_last():
    line = np.linspace(3, 1, 50)
    np.testing.assert_allclose(trainings.smooth(line)[10:-10], line[10:-10], rtol=1e-6)
    assert np.argmax(trainings.smooth([*line, np.inf])) == 50
    assert np.isfinite(trainings.smooth([np.inf])).all()


def test_widths_are_scaled_and_stay_whole():
    assert trainings.scale_width(8, 0.5) == 4
    assert trainings.scale_width(1, 0.5) == 1
    assert trainings.scale_width((16, 33), 2.0) == (32, 66)
    assert trainings.scale_width(0.25, 2.0) == 0.5


def test_a_network_is_built_at_each_width(plain):
    made, *_ = plain
    widths, macs, steps = trainings.plan_capacity(made)
    assert [(width, each.model.width) for width, each in widths] == [(0.5, 4), (1, 8), (2, 16)]
    # 16 positions of 3x3 kernels, from 1 channel to w, and the head on them.
    assert macs == [16 * 9 * w + 16 * w * 10 for w in (4, 8, 16)]
    assert steps == 100  # no more than the config's
    assert trainings.find_width_field(made.components) == "width"
    bare = made.components._replace(model=own_parts.Bare())
    assert trainings.find_width_field(bare) is None


def test_a_change_of_an_own_network_makes_the_numbers_old(plain, tmp_path):
    made, *_ = plain
    record = check._make_record(made, 0)
    (network,) = record["own"]["model"]
    assert network["name"] == f"{HERE}:Net"
    path, said = tmp_path / "sanity.json", []
    files.write_json(path, record | {"parts": {"loss": {"loss": 2.3}}})
    assert check._read_parts(path, record, said.append) == {"loss": {"loss": 2.3}}
    network["digest"] = "another"
    assert check._read_parts(path, record, said.append) == {}
    assert "own part" in said[0]


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(bench.jax, "process_count", lambda: 2)
    monkeypatch.setattr(bench, "initialize_jax", lambda config: None)
    with pytest.raises(UserError, match="one process"):
        bench.SanityBench(make_config())
