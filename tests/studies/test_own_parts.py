"""Own parts in ablations, fine-tuning and searches: what works and what is refused at the start."""

from __future__ import annotations

import json

import chex
import flax.linen as nn
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.datasets import load_digits

from configs.finetune.fashion_digits import get_config
from flax_cnns import Dataset
from flax_cnns.config import complete
from flax_cnns.errors import UserError
from flax_cnns.runs import child
from flax_cnns.studies.ablation import ablate, forecast, plan
from flax_cnns.studies.finetune import compare, strategies
from flax_cnns.studies.search import scaling
from tests.runs import own_parts
from tests.tiny_runs import arrays

PARTS, HERE = "tests.runs.own_parts", "tests.studies.test_own_parts"
CONFIG = {
    "model": {"name": f"{PARTS}:Net", "width": 2},
    "data": {"name": f"{PARTS}:digits", "batch_size": 16, "eval_batch_size": 64, "validation": 0},
    "schedule": {"name": "constant"},
    "train": {
        "duration": "4 steps",
        "eval_every": "0 steps",
        "metrics": (f"{PARTS}:recall",),
        "regularizers": (f"{PARTS}:Shrink",),
    },
    "own": {"digits": {"examples": 64}, "Shrink": {"rate": 0.1}},
    "checkpoint": {"every": "0 steps"},
    "log": {"tensorboard": False},
}
WITHOUT = {"train.regularizers": ()}


class Scaled(nn.Module):
    """A network with fields for its width and depth."""

    num_classes: int
    width_mult: float = 1.0
    depth_mult: float = 1.0

    @nn.compact
    def __call__(self, images, *, train):
        for i in range(round(2 * self.depth_mult)):
            images = nn.Conv(round(8 * self.width_mult), (1, 1), name=f"conv{i}")(images)
        return nn.Dense(self.num_classes, name="head")(images.mean((1, 2)))


class Headless(own_parts.Net):
    """A network that gives features if `num_classes` is None."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2, name="conv1")(images)).mean((1, 2))
        return x if self.num_classes is None else nn.Dense(self.num_classes, name="head")(x)


def two_labels():
    images, labels = np.zeros((40, 8, 8, 1), np.uint8), np.tile(np.eye(2, dtype=np.int32), (20, 1))
    return Dataset.from_arrays(train=(images, labels), test=(images, labels), task="multilabel")


def soft_digits():
    """Digits with soft labels: a tenth of the weight is on all classes."""
    images, labels = load_digits(return_X_y=True)
    images, soft = (
        images.reshape(-1, 8, 8, 1).astype(np.uint8) * 15,
        0.01 + 0.9 * np.eye(10)[labels],
    )
    return Dataset.from_arrays(train=(images[:64], soft[:64]), test=(images[-64:], soft[-64:]))


def stream():
    """Endless batches of noise."""

    def batches(split, start_step, process_index, process_count):
        while True:
            yield np.zeros((16, 8, 8, 1), np.uint8), np.zeros(16, np.int32)

    shape = dict(image_shape=(8, 8, 1), num_classes=10, mean=(0.5,), std=(0.5,))
    return Dataset.from_batches(batches, {"train": 64, "test": 32}, **shape)


@pytest.fixture
def config():
    return complete(CONFIG)


# ---- ablations


def test_rows_change_own_fields_and_a_removed_part_loses_its_fields(config):
    rows = plan.make_rows(
        config,
        [
            ("base", {}),
            ("off", {"own.Shrink.rate": 0.0}),
            ("wide", {"model.width": 3, "own": {"digits": {"examples": 80}}}),
            ("without", WITHOUT),
            ("loss", {"train.loss": f"{PARTS}:focal", "own.focal.gamma": 1.0}),
        ],
    )
    base, off, wide, without, loss = (row.config for row in rows)
    assert base.to_dict() == config.to_dict()
    assert off.own.to_dict() == {"digits": {"examples": 64}, "Shrink": {"rate": 0.0}}
    assert (wide.model.width, wide.own.digits.examples) == (3, 80)
    assert without.own.to_dict() == {"digits": {"examples": 64}}
    assert loss.own.focal.gamma == 1.0
    sizes = forecast.measure_rows(plan.make_cells([rows[0], rows[3]], "nowhere", 1))
    assert sizes["base"].metrics == ("loss", "accuracy", "top5", "recall")
    assert sizes["base"].macs > 0
    assert forecast.check_metric("test/recall", sizes) == "recall"
    with pytest.raises(
        UserError, match=r"the test of row base logs no 'recal'; did you mean 'reca"
    ):
        forecast.check_metric("recal", sizes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"own.Shrink.rat": 0.1},
            r"row b: config\.own\.Shrink\.rat: .* no such field; did you mean",
        ),
        (
            WITHOUT | {"own.Shrink.rate": 0.1},
            r"row b: config\.own\.Shrink: no own part is",
        ),
        ({"train.loss": f"{PARTS}:foca"}, r"row b: train\.loss=.* has no 'foca'; did you mean"),
        (
            {"train.regularizers": ("<opaque>:Noise",)},
            r"row b: config\.train\.regularizers: Noise exists in one process only, but an"
            r" ablation runs in child processes; give an importable 'package\.module:Noise'",
        ),
        ({"data.name": "digits", "data.mock": 40}, r"--metric: the test of row b logs no 'recall'"),
    ],
)
def test_mistakes_in_own_parts_are_reported_before_anything_runs(
    config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(child, "start", lambda *_, **__: pytest.fail("started"))
    if "data.name" in overrides:
        overrides = overrides | {"train.metrics": ()}
    with pytest.raises(UserError, match=message):
        ablate.ablate(
            config, [("a", {}), ("b", overrides)], tmp_path / "x", seeds=1, metric="recall"
        )
    assert not (tmp_path / "x").exists()


def test_timing_steps_call_no_callbacks(config, monkeypatch):
    config.train.callbacks = (f"{PARTS}:Recorder",)
    seen = []

    def start(config, *_):
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(child, "start", start)
    (row,) = plan.make_rows(config, [("base", {})])
    with pytest.raises(InterruptedError):
        forecast.time_steps(row, child.DeviceSlot())
    assert seen[0].train.callbacks == ()
    assert seen[0].own.Shrink.rate == 0.1


@pytest.mark.slow
def test_an_ablation_of_own_parts(config, tmp_path, monkeypatch, capsys):
    """A rate of 0 equals the run without the regularizer, bit for bit."""
    monkeypatch.delenv("XLA_FLAGS")  # one device is faster
    sweep = [("base", WITHOUT), ("off", {"own.Shrink.rate": 0.0}), ("on", {})]
    given = dict(seeds=1, jobs=2, metric="recall")
    assert ablate.ablate(config, sweep, tmp_path, **given) == {"complete": 3}
    base, off, on = (arrays(tmp_path / name / "seed0") for name in ("base", "off", "on"))
    chex.assert_trees_all_equal(off, base)
    assert any((on[path] != base[path]).any() for path in base if path.startswith("params/"))
    assert "base, seed 0: complete, test recall 0." in capsys.readouterr().out
    markdown = (tmp_path / "report.md").read_text()
    assert "| row | seeds | test recall | difference |" in markdown
    assert "`own.Shrink.rate=0.0`" in markdown
    params = json.loads((tmp_path / "on/seed0/summary.json").read_text())["params"]
    assert f"| {params:,} | - |" in markdown


# ---- fine-tuning


def targets(**sections):
    """A fine-tuning config with one target."""
    config, target = get_config("smoke"), complete(CONFIG | {"own": {}})
    target.train.regularizers = ()
    with target.unlocked(), target.ignore_type():
        if sections.get("model", {}).get("name") == f"{PARTS}:Bare":
            del target.model["width"]
        for section, fields in sections.items():
            target[section].update(fields)
    with config.unlocked():
        config.targets = ConfigDict({"similar": target})
        config.source = "runs/source"
    return config


def make_task(**sections):
    config = targets(**sections)
    return strategies.make_task(config.targets.similar, "runs/source", config.strategy)


def test_an_own_network_is_fine_tuned_by_its_layers():
    task = make_task(model={"name": f"{HERE}:Headless"})
    assert (task.parts, task.classifier, task.why_no_features) == (("conv1",), ("head",), "")
    task = make_task()
    assert (task.parts, task.classifier) == (("conv1", "norm", "conv2"), ("head",))
    assert task.why_no_features.startswith(f"{PARTS}:Net of {{target}} gives no features [N C] if")


@pytest.mark.parametrize(
    ("sections", "given", "message"),
    [
        (
            dict(model={"name": f"{PARTS}:Bare"}),
            {},
            r"needs the network's field 'num_classes', .*; .*:Bare has no such field; add it",
        ),
        (
            dict(data={"name": f"{HERE}:two_labels"}),
            {},
            r"compares accuracies, but an image of arrays has several labels \(multilabel\)",
        ),
        (
            dict(train={"loss": "<opaque>:huber"}),
            {},
            r"targets\.similar: config\.train\.loss: huber exists in one process only, but fine",
        ),
        (
            dict(
                model={"name": f"{HERE}:Headless"},
                train={"regularizers": (f"{PARTS}:Shrink",)},
                own={"Shrink": {"rate": 0.1}},
            ),
            dict(strategies=["features"]),
            r"remove features: Shrink, of the train\.regularizers of targets\.similar, cannot",
        ),
        (
            dict(data={"name": f"{HERE}:stream"}),
            dict(fractions=(0.5, 1)),
            r"--fractions=0\.5: batches has a fixed stream of batches, which cannot be divided",
        ),
    ],
)
def test_what_cannot_be_fine_tuned_is_a_one_line_error(
    tmp_path, monkeypatch, sections, given, message
):
    monkeypatch.setattr(compare._Runner, "run_strategies", lambda *_: pytest.fail("started"))
    config = targets(**sections)
    with pytest.raises(UserError, match=message):
        compare.compare_strategies(config, tmp_path / "x", **given, say=lambda line: None)
    assert not (tmp_path / "x").exists()


def test_strategies_left_out_of_all_are_reported(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(compare._Runner, "run_strategies", lambda *_: [])
    monkeypatch.setattr(compare, "_check_source", lambda *_: None)
    train = {"callbacks": (f"{PARTS}:Recorder",)}
    model, data = {"name": f"{HERE}:Headless"}, {"name": f"{HERE}:stream"}
    compare.compare_strategies(targets(model=model, train=train), tmp_path, say=lines.append)
    assert lines[-1] == "targets.similar: note: features, linear_stages call no train.callbacks"
    lines.clear()
    result = compare.compare_strategies(targets(model=model, data=data), tmp_path, say=lines.append)
    why = "the training images of targets.similar come in batches without end"
    assert lines[-1] == f"left out: features, linear_stages: {why}"
    assert not {"features", "linear_stages"} & set(result.strategies)


@pytest.mark.slow
def test_classifiers_on_features_learn_by_an_own_loss_and_optimizer(tmp_path):
    """The classifier learns the same as in a run in which everything else is frozen."""
    config = targets(
        model={"name": f"{HERE}:Headless"},
        train={"loss": f"{PARTS}:focal", "duration": "12 steps"},
        optimizer={"name": f"{PARTS}:momentum"},
        own={"focal": {"gamma": 1.0}, "momentum": {"beta": 0.8}},
        data={"name": f"{HERE}:soft_digits"},
    )
    config.targets.similar.schedule.learning_rate = 0.1
    with config.unlocked():
        config.source, config.pretrain = "", ConfigDict(config.targets.similar.to_dict())
    lines = []
    given = dict(strategies=["linear", "features"], seeds=1, say=lines.append)
    result = compare.compare_strategies(config, tmp_path, **given)
    at = tmp_path / "similar/1/seed0"
    trained = arrays(at / "linear")
    with np.load(at / "features/classifiers.npz") as kept:
        for name in ("kernel", "bias"):
            ours = kept[f"pre_logits/{name}"]
            np.testing.assert_allclose(ours, trained[f"params/head/{name}"], atol=1e-5)
        assert np.abs(kept["pre_logits/bias"]).max() > 0.01  # it was 0 before training
    linear, features = (result.select("similar", 1.0, name)[0] for name in ("linear", "features"))
    assert linear.test == features.test
    summary = json.loads((at / "linear/summary.json").read_text())
    (metrics,) = features.layers.values()
    assert metrics["test/recall"] == pytest.approx(summary["test/recall"], abs=1e-6)


# ---- the search for scaling


@pytest.fixture
def scaled():
    model = {"name": f"{HERE}:Scaled"}
    return complete({"model": model, "data": {"name": "digits", "mock": 40, "image_size": 8}})


def test_an_own_network_is_scaled(scaled):
    planner = scaling.Planner(scaled)
    base = planner.make_trial("base", scaling.ScalingFactors())
    wide = planner.make_trial("width", scaling.ScalingFactors(width_mult=2.0))
    large = planner.make_trial("resolution", scaling.ScalingFactors(resolution_mult=2.0))
    assert base.macs == 64 * (8 + 8 * 8) + 80
    assert wide.macs == 64 * (16 + 16 * 16) + 160
    assert (large.params, large.macs) == (base.params, 4 * 64 * (8 + 8 * 8) + 80)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("data", {"name": f"{PARTS}:digits", "mock": 0}, "own data have a fixed size"),
        ("train", {"best_by": "validation/loss"}, "the search compares validation accuracies"),
        ("train", {"loss": "<opaque>:huber"}, "but the search starts its runs from configs"),
        ("model", {"name": f"{PARTS}:Net"}, r"Net has no field '(width|depth)_mult'"),
    ],
)
def test_what_cannot_be_scaled_is_a_one_line_error(scaled, tmp_path, section, fields, message):
    scaled[section].update(fields)
    if section == "data":
        scaled.data.image_size = 32
    with pytest.raises(UserError, match=message):
        scaling.search(scaled, tmp_path / "x", say=lambda line: None)
    assert not (tmp_path / "x").exists()
