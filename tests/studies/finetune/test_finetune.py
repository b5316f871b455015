"""Fine-tuning strategies: what each loads and trains, features computed once, the comparison."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import re
import types

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from configs.finetune.fashion_digits import get_config
from flax_cnns import config as configs
from flax_cnns import create_model
from flax_cnns import tree as pytree
from flax_cnns.checkpoint import manager
from flax_cnns.data import images
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import Split
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import build_components
from flax_cnns.runs.network import get_model_fields
from flax_cnns.studies.finetune import compare, probe, report, strategies
from flax_cnns.weights import preprocessing
from tests.test_configs import modes
from tests.test_scripts import finish
from tests.tiny_runs import ROOT, arrays

FILES = sorted(p.stem for p in (ROOT / "configs/finetune").glob("[a-z]*.py"))


def make_config(digits_dir, steps=20):
    """Digits 0 to 4 as the source, 5 to 9 as the target: a stem, a block and a classifier."""
    config = get_config("smoke")
    for one in (config.pretrain, config.targets.similar):
        one.data.dir = digits_dir
        one.model.depths, one.model.widths = (1,), (4,)
        one.data.augment.pad_crop = 0
        one.train.duration = f"{steps} steps"
        one.schedule.warmup = "0 steps"
    # Without these rules, the value for runs and for classifiers on features.
    config.targets.similar.optimizer.bn = ((r"stem/.*", "frozen"), (r".*", "frozen"))
    return config


def make_task(model="cifar_resnet20", **fields):
    """A target of noise, which needs no files."""
    config = get_config("smoke")
    target = config.targets.similar
    target.data.mock, target.data.image_size, target.model.name = 40, 32, model
    with target.unlocked():
        for name in ("depths", "widths"):
            del target.model[name]
        target.model.update(fields)
    return strategies.make_task(target, "runs/source", config.strategy)


@pytest.fixture(scope="module")
def task():
    return make_task(depths=(1, 1, 1), widths=(4, 8, 8))


def test_fields_without_effect_are_refused_before_anything_runs(tmp_path):
    config = get_config("smoke")
    config.targets.similar.graft.averaged = True  # has effect, because the phases set a source
    config.targets.similar.optimizer.b1 = 0.8
    with pytest.raises(UserError, match=r"targets\.similar: config\.optimizer\.b1=0\.8"):
        compare.compare_strategies(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_slower_phase_has_no_last_rate_above_its_first(task):
    config = ConfigDict(task.config.to_dict())
    config.schedule.update(dict(learning_rate=0.1, end=0.05))
    (phase,) = strategies.all_slowly(task._replace(config=config))
    assert phase.config.schedule.end == phase.config.schedule.learning_rate
    assert configs.find_problems(phase.config) == []


def leaves(task):
    """Paths of the network's leaves: "params/stem/conv/kernel" ..."""
    components = build_components(task.config)
    return list(pytree.flatten(jax.eval_shape(components.init_variables)))


def tops(paths):
    return {path.split("/")[1] for path in paths}


def planned(task, name):
    """Describes each phase of a strategy: (loaded parts, trained parts, rate, steps)."""
    paths, phases = leaves(task), []
    for phase in strategies.STRATEGIES[name](task):
        config = phase.config
        configs.validate(config)
        loaded = set()
        if config.graft.source:
            assert config.graft.source == "runs/source"
            chosen = pytree.match(config.graft.rules, paths, what="graft")
            loaded = {path for path, there in chosen.items() if there is not None}
        params = [path for path in paths if path.startswith("params/")]
        rules = config.optimizer.trainable or ((".*", True),)
        trained = {
            p for p, learns in pytree.match(rules, params, what="trainable").items() if learns
        }
        # A part is loaded as a whole or not at all.
        assert not tops(set(paths) - loaded) & tops(loaded)
        assert not tops(set(params) - trained) & tops(trained)
        steps = float(config.train.duration.split()[0])
        phases.append((tops(loaded), tops(trained), config.schedule.learning_rate, steps))
    return phases


def test_the_parts_of_a_network_and_its_classifier(task):
    assert task.parts == ("stem", "stage1", "stage2", "stage3")
    assert task.classifier == ("head",)


@pytest.mark.parametrize(
    ("model", "first", "last", "classifier"),
    [
        ("lenet5", "c1", "f6", {"head"}),
        pytest.param("mobilenet_v2", "stem", "top", {"head"}, marks=pytest.mark.slow),
    ],
)
def test_the_classifier_is_what_depends_on_the_number_of_classes(model, first, last, classifier):
    task = make_task(model)
    assert (task.parts[0], task.parts[-1]) == (first, last)
    assert set(task.classifier) == classifier
    assert not set(task.parts) & classifier


ALL = {"stem", "stage1", "stage2", "stage3", "head"}
BODY = ALL - {"head"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scratch", [(set(), ALL, 0.1, 20)]),
        ("linear", [(BODY, {"head"}, 0.1, 20)]),
        ("features", [(BODY, {"head"}, 0.1, 20)]),
        ("linear_stages", [(BODY, {"head"}, 0.1, 20)]),
        ("last_k", [(BODY, {"stage3", "head"}, 0.01, 20)]),
        ("all_slowly", [(BODY, ALL, 0.01, 20)]),
        ("head_then_all", [(BODY, {"head"}, 0.1, 5), (BODY, ALL, 0.01, 15)]),
        (
            "gradual",
            [
                (BODY, {"head"}, 0.1, 4),
                (BODY, {"stage3", "head"}, 0.01, 4),
                (BODY, {"stage2", "stage3", "head"}, 0.01, 4),
                (BODY, ALL - {"stem"}, 0.01, 4),
                (BODY, ALL, 0.01, 4),
            ],
        ),
        ("layer_decay", [(BODY, ALL, 0.1, 20)]),
        ("upper_only", [({"stage2", "stage3"}, ALL, 0.1, 20)]),
        ("lower_only", [({"stem", "stage1"}, ALL, 0.1, 20)]),
    ],
)
def test_what_a_strategy_loads_and_trains(task, name, expected):
    phases = planned(task, name)
    assert [phase[:2] for phase in phases] == [phase[:2] for phase in expected]
    np.testing.assert_allclose([p[2:] for p in phases], [p[2:] for p in expected])


def test_of_an_odd_number_of_parts_the_lower_half_has_one_more(task):
    odd = task._replace(parts=task.parts[:3])
    (upper,), (lower,) = (strategies.STRATEGIES[f"{half}_only"](odd) for half in ("upper", "lower"))
    fresh = [{regex for regex, value in p.config.graft.rules if not value} for p in (upper, lower)]
    of_head = "(params|batch_stats)/(head)/.*"
    assert fresh[0] == {of_head, "(params|batch_stats)/(stem|stage1)/.*"}
    assert fresh[1] == {of_head, "(params|batch_stats)/(stage2)/.*"}


def test_every_strategy_is_planned_above():
    cases = test_what_a_strategy_loads_and_trains.pytestmark[0].args[1]
    assert [name for name, _ in cases] == list(strategies.STRATEGIES)
    assert all(function.__doc__ for function in strategies.STRATEGIES.values())


def test_layers_for_the_classifiers_and_the_decay(task):
    (features,), (stages,) = strategies.features(task), strategies.linear_stages(task)
    assert (features.layers, stages.layers) == ((probe.LAST_LAYER,), task.parts)
    (phase,) = strategies.layer_decay(task)
    assert phase.config.optimizer.layer_decay == task.hyperparameters.layer_decay


# ---------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def compared(digits_dir, tmp_path_factory):
    """(folder, result, lines) of a source and four strategies, small enough to train in a test."""
    folder, lines = tmp_path_factory.mktemp("finetune"), []
    config = make_config(digits_dir)
    names = ("linear", "features", "linear_stages")
    result = compare.compare_strategies(config, folder, strategies=names, seeds=1, say=lines.append)
    return folder, result, lines


@pytest.mark.slow
def test_features_computed_once_give_the_classifier_of_the_frozen_network(compared):
    folder, result, _ = compared
    cell = folder / "similar/1/seed0"
    trained = arrays(cell / "linear")
    with np.load(cell / "features/classifiers.npz") as kept:
        for name in ("kernel", "bias"):
            ours = kept[f"{probe.LAST_LAYER}/{name}"]
            np.testing.assert_allclose(ours, trained[f"params/head/{name}"], atol=1e-4)
        assert np.abs(kept[f"{probe.LAST_LAYER}/bias"]).max() > 0.01  # it was 0 before training
    linear, features = (result.select("similar", 1.0, name)[0] for name in ("linear", "features"))
    assert (linear.test, linear.validation) == (features.test, features.validation)
    # The run's frozen weights and statistics still equal the source's at the end.
    source = arrays(folder / "pretrain", "best")
    for path in source:
        if path.startswith(("params/", "batch_stats/")) and "/head/" not in path:
            np.testing.assert_array_equal(trained[path], source[path], err_msg=path)


@pytest.mark.slow
def test_the_best_classifier_on_stages_is_chosen_by_validation(compared):
    folder, result, _ = compared
    (record,) = result.select("similar", 1.0, "linear_stages")
    assert list(record.layers) == ["stem", "stage1"]
    best = max(record.layers.values(), key=lambda metrics: metrics["validation/accuracy"])
    assert record.validation == best["validation/accuracy"]
    assert record.test == best["test/accuracy"]
    assert record.test > 0.4  # far above chance (five classes) after a few steps
    with np.load(folder / "similar/1/seed0/features.npz") as kept:  # all layers, from one pass
        assert {"train/stem", "train/stage1", f"test/{probe.LAST_LAYER}"} <= set(kept.files)
        assert kept["train/stem"].shape == (result.records[0].images, 4)


@pytest.mark.slow
def test_started_again_it_repeats_nothing(compared, digits_dir, monkeypatch):
    folder, result, lines = compared
    assert lines[-1].startswith("3/3 similar, 1 of the examples, seed 0, linear_stages: ")

    def never(*args, **kwargs):
        raise AssertionError("this has been computed")

    monkeypatch.setattr(probe, "build_components", never)
    monkeypatch.setattr("flax_cnns.runs.train.build_components", never)
    names = ("linear_stages", "features", "linear")
    again = compare.compare_strategies(make_config(digits_dir), folder, strategies=names, seeds=1)
    assert again == result
    changed = make_config(digits_dir)
    changed.targets.similar.optimizer.b1 = 0.8
    with pytest.raises(UserError, match=r"another config \(optimizer.b1: 0.9 there, 0.8 here\)"):
        compare.compare_strategies(changed, folder, strategies=names, seeds=1)


def test_features_of_other_weights_or_examples_are_computed_anew(task, tmp_path, monkeypatch):
    """The config is the same, but the source was trained again, or the folder has other images."""
    components, cache = build_components(task.config), tmp_path / "features.npz"
    variables = components.init_variables()

    def computed(components, variables):
        cached, seconds = probe.load_or_compute_features(
            components, variables, [probe.LAST_LAYER], cache
        )
        assert (
            probe.load_or_compute_features(components, variables, [probe.LAST_LAYER], cache)[1]
            == seconds
        )
        return cached["test"][probe.LAST_LAYER]

    first = computed(components, variables)
    cache.write_bytes(cache.read_bytes()[:-100])  # a damaged file is computed again
    np.testing.assert_array_equal(computed(components, variables), first)
    moved = ConfigDict(components.config.to_dict())
    moved.data.dir = "elsewhere"
    monkeypatch.setattr(probe, "compute_features", lambda *_: pytest.fail("computed again"))
    probe.load_or_compute_features(
        components._replace(config=moved), variables, [probe.LAST_LAYER], cache
    )
    monkeypatch.undo()
    stem = {"conv": {"kernel": 2 * variables["params"]["stem"]["conv"]["kernel"]}}
    stem = variables["params"]["stem"] | stem
    others = variables | {"params": variables["params"] | {"stem": stem}}
    assert np.abs(computed(components, others) - first).max() > 1e-3
    splits = dict(components.dataset.splits)
    splits["test"] = dataclasses.replace(splits["test"], images=255 - splits["test"].images)
    dataset = dataclasses.replace(components.dataset, splits=splits)
    assert np.abs(computed(components._replace(dataset=dataset), variables) - first).max() > 1e-3


def test_features_of_photographs_that_another_reader_saw_are_computed_anew(monkeypatch):
    source = ArraySource(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int32), "two")
    splits = {"train": Split(labels=source.labels, source=source)}
    components = types.SimpleNamespace(dataset=types.SimpleNamespace(splits=splits, fingerprint={}))
    before = probe._digest(components, {})
    assert probe._digest(components, {}) == before
    monkeypatch.setattr(images, "READER_VERSION", images.READER_VERSION + 1)
    assert probe._digest(components, {}) != before


@pytest.mark.slow
def test_features_of_a_network_that_scans_are_those_of_its_blocks():
    given = dict(depths=(3,), widths=(4,))
    results = []
    for more in ({}, dict(scan=True, remat=True)):
        components = build_components(make_task(**given, **more).config)
        features, _ = probe.compute_features(
            components, components.init_variables(), ["stage1", probe.LAST_LAYER]
        )
        results.append(features["test"])
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
    assert np.abs(results[0]["stage1"]).max() > 0.1


@pytest.mark.parametrize(
    "name", ["features", pytest.param("linear_stages", marks=pytest.mark.slow)]
)
def test_classifiers_on_features_leave_auxiliary_heads_alone(name):
    task = make_task("googlenet_2014_aux")
    assert {layer.split("/")[0] for layer in task.classifier} > {"head"}
    (phase,) = strategies.STRATEGIES[name](task)
    params = [path for path in leaves(task) if path.startswith("params/")]
    learns = pytree.match(phase.config.optimizer.trainable, params, what="trainable")
    assert {path for path in params if learns[path]} == {"params/head/kernel", "params/head/bias"}
    fresh = pytree.match(phase.config.graft.rules, params, what="graft")
    assert tops(path for path in params if fresh[path] is None) > {"head"}


def test_a_classifier_that_is_no_dense_layer():
    head = {"conv10": {"kernel": np.zeros((1, 1, 4, 5)), "bias": np.zeros(5)}}
    with pytest.raises(
        UserError, match=r"expected one dense layer .*, got conv10/bias, conv10/ker"
    ):
        probe._make_head(head, probe.LAST_LAYER, np.zeros((3, 4)))


# ---------------------------------------------------------------------------- the comparison


@pytest.fixture
def ran(monkeypatch):
    """Replaces runs and records [(config, workdir)]; accuracy grows with data, seed and loading."""
    seen = []

    def run(config, workdir, *args, **kwargs):
        seen.append((configs.to_plain(config), str(workdir)))
        grafted = 0.1 * bool(config.graft.source)
        accuracy = 0.3 + 0.4 * config.data.fraction + 0.01 * config.seed + grafted
        summary = {"test/accuracy": accuracy, "validation/best_accuracy": accuracy - 0.01}
        times = {"step": 10, "images_per_second": 640.0, "seconds": 2.0}
        return summary | times | {"layers": {}}

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(probe, "run_probe", run)
    monkeypatch.setattr(compare, "_check_source", lambda *_: None)  # there is no source
    return seen


def two_targets():
    config = get_config("smoke")
    other = ConfigDict(config.targets.similar.to_dict())
    for one in (config.targets.similar, other):
        one.data.mock = 200
    config.source, config.targets.dissimilar = "runs/source", other
    return config


@pytest.mark.slow
def test_each_seed_draws_its_own_examples_and_phases_follow_each_other(ran, tmp_path):
    config = two_targets()
    given = dict(strategies=["gradual", "scratch"], fractions=(1, 0.2), seeds=2)
    result = compare.compare_strategies(config, tmp_path, **given, say=lambda line: None)
    assert result.strategies == ("scratch", "gradual")
    assert result.targets == ("similar", "dissimilar")
    assert len(result.records) == 2 * 2 * 2 * 2
    assert {r.images for r in result.records} == {40, 200}
    ours = [(c, w) for c, w in ran if "/similar/0.2/seed1/" in w]
    assert [pathlib.Path(w).name for _, w in ours] == [
        *("scratch", "1-head", "2-stage3", "3-stage2", "4-stage1", "5-stem")
    ]
    for one, _ in ours:
        assert (one["seed"], one["data"]["split_seed"], one["data"]["fraction"]) == (1, 1, 0.2)
    sources = [one["graft"]["source"] for one, _ in ours]
    gradual = [f"{w}@latest" for _, w in ours[1:-1]]
    assert sources == ["", "runs/source", *gradual]
    for one, _ in ours[2:]:
        assert one["graft"]["rules"] == [["(.*)", r"\1"]]  # also the previous phase's classifier


def test_a_warmup_longer_than_the_run_on_the_fewest_images_is_reported_first(ran, tmp_path):
    config = two_targets()
    config.targets.similar.data.batch_size = 20
    config.targets.similar.train.duration = "2 epochs"  # 10 steps
    config.targets.similar.schedule.warmup = "5 steps"
    given = dict(strategies=["scratch"], seeds=1, say=lambda line: None)
    with pytest.raises(UserError, match=r"--fractions=0\.2: config\.schedule\.warmup='5 steps'"):
        compare.compare_strategies(config, tmp_path, **given, fractions=(1, 0.2))
    assert not ran
    compare.compare_strategies(config, tmp_path, **given, fractions=(1, 0.5))
    assert len(ran) == 4


def test_a_strategy_whose_data_changed_is_renamed_and_runs_again(ran, monkeypatch, tmp_path):
    stand_in, accepts = compare.run, []

    def run(config, workdir, *, accept_changed_data, fingerprint):
        accepts.append((accept_changed_data, fingerprint))
        if (workdir / "of-other-data").exists() and not accept_changed_data:
            raise workdirs.ChangedData(workdir, "train had 4 images, has 5")
        return stand_in(config, workdir)

    monkeypatch.setattr(compare, "run", run)
    at = tmp_path / "similar/1/seed0/head_then_all"
    (at / "1-head/of-other-data").mkdir(parents=True)
    config, lines = two_targets(), []
    del config.targets["dissimilar"]
    given = dict(strategies=["head_then_all"], seeds=1, say=lines.append)
    compare.compare_strategies(config, tmp_path, **given, accept_changed_data=True)
    assert len(ran) == 2
    compare.compare_strategies(config, tmp_path, **given)
    assert len(ran) == 4  # both phases ran again
    assert (at.with_name("old-data-1-head_then_all") / "1-head/of-other-data").exists()
    assert not (at / "1-head/of-other-data").exists()
    (moved,) = [line for line in lines if "it is renamed to" in line]
    assert "1-head changed since it began: train had 4 images, has 5" in moved
    assert lines[1].startswith("1/1 similar, 1 of the examples, seed 0, head_then_all: ")
    assert accepts == [(True, {})] * 2 + [(False, {})] * 3  # {}: noise has no fingerprint


def test_tables_picture_and_file(ran, tmp_path):
    given = dict(strategies=["all"], fractions=(0.2, 1), seeds=2)
    result = compare.compare_strategies(two_targets(), tmp_path, **given, say=lambda line: None)
    console = Console(width=120, record=True)
    for table in report.make_tables(result):
        console.print(table)
    text = console.export_text()
    assert "similar: test accuracy in %, mean ± sd, n=2" in text
    assert "38.5 ± 0.7" in text  # scratch, fraction 0.2: 38 and 39
    assert "80.5 ± 0.7" in text  # loaded, fraction 1
    assert "linear 48.5 ± 0.7" in text  # best by validation, the first of equal ones
    assert "CS231n: linear classifier on the top" in text
    assert "difference from scratch" in " ".join(text.split())
    assert "│ linear        │ +10.0 │ +10.0 │" in text  # equal for both seeds, so no interval
    (line, _) = report.describe_speed(result)
    assert line == "0.2 of the examples: features 1.00 s, linear 1.00 s, 1.0 times as long"
    report.draw(result, tmp_path / "finetune.png")
    assert (tmp_path / "finetune.png").read_bytes()[:4] == b"\x89PNG"
    report.save(result, tmp_path / "finetune.json", {"seeds": 2})
    saved = json.loads((tmp_path / "finetune.json").read_text())
    assert saved["best_by_validation"]["similar"] == {"0.2": "linear", "1": "linear"}
    assert len(saved["records"]) == 2 * 2 * 2 * len(strategies.STRATEGIES)


def test_without_a_validation_split_no_strategy_is_called_the_best(ran, tmp_path):
    given = dict(strategies=["scratch", "linear"], fractions=(1,), seeds=1)
    result = compare.compare_strategies(two_targets(), tmp_path, **given, say=lambda line: None)
    assert len(report.make_tables(result)) == 3
    records = [record._replace(validation=None) for record in result.records]
    result = result._replace(records=records)
    titles = [table.title for table in report.make_tables(result)]
    assert titles == ["similar: test accuracy in %", "dissimilar: test accuracy in %"]
    report.save(result, tmp_path / "finetune.json", {})
    assert json.loads((tmp_path / "finetune.json").read_text())["best_by_validation"] == {}


# ---------------------------------------------------------------------------- configs and mistakes


@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_valid(name):
    module = importlib.import_module(f"configs.finetune.{name}")
    for mode in modes(f"finetune.{name}"):
        config = module.get_config(mode) if mode else module.get_config()
        compare.validate_config(config)
        for target in config.targets.values():
            create_model(**get_model_fields(target))
        assert f"configs/finetune/{name}.py{mode and ':'}{mode}" in module.__doc__
    with pytest.raises(ValueError, match="it has smoke"):
        module.get_config("smok")


def test_one_field_names_the_folder_of_all():
    config = get_config()
    config.dir = "here"
    assert config.pretrain.data.dir == config.targets.similar.data.dir == "here"
    assert config.targets.dissimilar.data.dir == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.strategy.update(rate=0.0), r"config.strategy.rate: expected .* above 0"),
        (lambda c: c.targets.similar.train.update(duration="3"), r"targets.similar: config.train"),
        (lambda c: c.pretrain.data.update(fraction=2.0), r"pretrain: config.data.fraction"),
        (lambda c: c.__delitem__("strategy"), "'strategy' is missing"),
    ],
)
def test_a_config_that_makes_no_sense(tmp_path, change, message):
    config = get_config("smoke")
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=message):
        compare.compare_strategies(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_results_of_a_source_that_is_gone_are_not_mixed_with_others(ran, tmp_path):
    config = two_targets()
    config.source = ""
    (tmp_path / "similar/1/seed0/linear").mkdir(parents=True)
    with pytest.raises(UserError, match=r"from a source that is gone .*; remove them, or use"):
        compare.compare_strategies(config, tmp_path, seeds=1, say=lambda line: None)
    assert not ran


@pytest.mark.parametrize(
    ("classes", "fractions", "message"),
    [
        ((), (0.1, 0.0), r"--fractions: expected numbers in \(0, 1\], got \[0.0, 0.1\]"),
        ((), (1.5,), r"--fractions: expected numbers in \(0, 1\]"),
        ((5, 99), (1.0,), "data.classes: digits has no class 99"),
    ],
)
def test_mistakes_are_reported_before_anything_is_trained(
    ran, tmp_path, classes, fractions, message
):
    config = two_targets()
    config.source, config.targets.similar.data.classes = "", classes
    with pytest.raises(UserError, match=message):
        compare.compare_strategies(config, tmp_path, fractions=fractions, say=lambda line: None)
    assert not ran


@pytest.fixture
def source(tmp_path):
    """Writes a checkpoint that fits the smoke config's network except for its classifier."""

    def write(about, **fields):
        config = two_targets()
        config.targets.similar.model.update(fields)
        shapes = strategies.make_task(config.targets.similar, "", config.strategy).shapes
        tree = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
        tree["params"]["head"] = {"kernel": np.ones((2, 2), np.float32)}
        return str(manager.write_tree(tmp_path / "source", tree, about))

    return write


def compare_untrained(monkeypatch, config, folder, **given):
    """Returns the lines that `compare` prints before it trains, without those about data sets."""
    lines = []
    monkeypatch.setattr(compare._Runner, "run_strategies", lambda *_: [])
    compare.compare_strategies(config, folder, **given, say=lines.append)
    return [line for line in lines if not line.startswith("targets.")]


def test_targets_are_described_and_a_batch_above_the_smallest_fraction_is_noted(ran, tmp_path):
    config, lines = two_targets(), []
    config.targets.similar.data.batch_size = 64
    given = dict(strategies=["scratch"], fractions=(0.2, 1), seeds=1)
    compare.compare_strategies(config, tmp_path, **given, say=lines.append)
    one, note, other, *_ = lines
    for line, name in ((one, "similar"), (other, "dissimilar")):
        assert re.match(rf"targets.{name}: \w+: \d+ classes; images: train 200, ", line)
    assert "data.batch_size=64 is more than the 40 training images" in note


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/sorce", r"there is no checkpoint or run .*; did you mean 'source'"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
        ("{folder}/source", r"targets\.similar: graft: .*norm1/mean is \[8\] in the network and"),
    ],
)
def test_a_mistake_in_the_source_is_reported_before_anything_is_trained(
    monkeypatch, tmp_path, source, name, message
):
    source({}, widths=(4, 8, 8))
    config = two_targets()
    config.source = name.format(folder=tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        compare_untrained(monkeypatch, config, tmp_path / "runs")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()
    # A strategy that loads nothing needs no source.
    assert compare_untrained(monkeypatch, config, tmp_path / "runs", strategies=["scratch"]) == []


def test_the_sources_training_images_are_described(monkeypatch, tmp_path, source):
    """The important fact is that the images were BGR, which no field of a run can express."""
    seen = preprocessing("vgg16", "keras")._asdict()
    config = two_targets()
    config.source = source(dict(model="vgg16", source="keras", preprocessing=seen))
    (line,) = compare_untrained(monkeypatch, config, tmp_path / "runs")
    assert line.startswith(
        "note: keras's vgg16 was trained on BGR images of 224 pixels with data.m"
    )
    assert line.endswith("if that layer is frozen, the network sees red as blue")


@pytest.mark.slow
def test_a_classifier_that_is_a_convolution_leaves_classifiers_on_features_out(
    monkeypatch, tmp_path
):
    config = two_targets()
    squeezed = config.targets.similar
    squeezed.model.name, squeezed.data.image_size, squeezed.data.channels = "squeezenet1_1", 32, 3
    with squeezed.unlocked():
        del squeezed.model["depths"], squeezed.model["widths"]
    monkeypatch.setattr(compare, "_check_source", lambda *_: None)
    why = r"the classifier of targets.similar \(squeezenet1_1: head\) is not a dense layer on"
    why += " features"
    (line,) = compare_untrained(monkeypatch, config, tmp_path)
    assert re.fullmatch(f"left out: features, linear_stages: {why}", line)
    with pytest.raises(UserError, match=f"--strategies: remove features: {why}"):
        compare_untrained(monkeypatch, config, tmp_path, strategies=["all", "features"])
    given = ("scratch", "linear")
    assert compare_untrained(monkeypatch, config, tmp_path, strategies=given) == []


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path):
    for flag, message in (
        (
            "--strategies=scratch,linaer",
            "--strategies: no strategy is called 'linaer'; did you mean 'linear",
        ),
        ("--fractions=0.1,many", "--fractions: expected numbers, got ['0.1', 'many']"),
        (
            "--config.targets.similar.schedule.leraning_rate=1",
            "unknown field 'schedule.leraning_rate'; did you mean 'schedule.learning_rate'",
        ),
    ):
        code, _, err = finish("finetune", f"--workdir={tmp_path / 'run'}", flag)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert not (tmp_path / "run").exists()
