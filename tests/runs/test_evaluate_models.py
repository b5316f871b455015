"""Ensembles, grids and soups of runs: files, kept predictions, saved soups, refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_cnns import load_run, tree
from flax_cnns.checkpoint.graft.sources import open_source
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation.predictions import Predictions, average, measure
from flax_cnns.runs import classifier as classifiers
from flax_cnns.runs import evaluate_ensemble as ensembles
from flax_cnns.runs import evaluate_soup as soups
from flax_cnns.runs import members, prediction_cache, reestimation
from flax_cnns.runs.prediction_cache import CacheEntry, PredictionCache
from flax_cnns.train import parallel
from tests.test_scripts import finish
from tests.train import tiny


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Returns a copy of the finished run at steps 10 and 12, with room for files."""
    copy = tmp_path_factory.mktemp("models") / "run"
    shutil.copytree(finished[0], copy)
    return [f"{copy}@12", f"{copy}@10"]


@pytest.fixture(scope="module")
def predicted(runs):
    return [classifiers.predict_split(classifiers.make_classifier_from_run(run)) for run in runs]


def folder(runs):
    return Path(runs[0].removesuffix("@12"))


def test_an_ensemble_of_checkpoints_is_the_mean_of_their_probabilities(
    runs, predicted, monkeypatch, capsys
):
    found = ensembles.evaluate_ensemble(runs)
    wanted = np.mean([each.probabilities for each in predicted], 0)
    right = np.argmax(wanted, -1) == predicted[0].labels
    assert found["accuracy"] == right.mean()
    assert found["protocol"]["members"] == [
        {
            "run": run,
            "step": int(run.partition("@")[2]),
            "checkpoint": "named",
            "model": "lenet5",
            "accuracy": each.is_correct().mean(),
            "interval": pytest.approx(found["protocol"]["members"][i]["interval"]),
        }
        for i, (run, each) in enumerate(zip(runs, predicted))
    ]
    best = max(predicted, key=lambda each: each.is_correct().mean())
    difference = right.mean() - best.is_correct().mean()
    assert found["difference"]["accuracy"] == pytest.approx(difference)
    written = (folder(runs) / "evaluation_test_12_ensemble2.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(found))
    assert "ensemble of 2" in capsys.readouterr().out

    # The predictions were kept: nothing is predicted again.
    monkeypatch.setattr(members, "predict_split", None)
    logits = ensembles.evaluate_ensemble(runs, average="logits")
    wanted = measure(average(predicted, of="logits"))["loss"]
    assert logits["loss"] == pytest.approx(wanted, rel=1e-5)
    assert logits["protocol"]["average"] == "logits"
    assert (folder(runs) / "evaluation_test_12_ensemble2_logits.json").is_file()


def test_files_about_other_members_are_kept(runs, tmp_path):
    def describe(*steps):
        return [{"run": f"{folder(runs)}@{step}", "step": step} for step in steps]

    for number, steps in enumerate([(12, 10), (12, 11), (12, 9)], 1):
        path = members.choose_members_file(tmp_path, "evaluation", describe(*steps))
        assert path.name == f"evaluation{'' if number == 1 else f'_{number}'}.json"
        path.write_text(json.dumps({"protocol": {"members": describe(*steps)}}))
    again = members.choose_members_file(tmp_path, "evaluation", describe(11, 12))
    assert again.name == "evaluation_2.json"


def test_a_killed_grid_goes_on(runs, predicted, monkeypatch, capsys):
    """The second run is killed at its second number of crops; the next call predicts only that."""
    asked = []

    def predict_crops(classifier, protocol, split):
        asked.append((classifier.run.step, protocol.name))
        if asked == [(12, "crops5"), (10, "crops5")]:
            raise KeyboardInterrupt
        which = predicted[classifier.run.step == 10]
        return which._replace(logits=which.logits * 0.5)

    monkeypatch.setattr(members, "predict_crops", predict_crops)
    with pytest.raises(KeyboardInterrupt):
        ensembles.evaluate_grid(runs, ["1", "5"])
    cells = ensembles.evaluate_grid(runs, ["1", "5"])
    assert asked == [(12, "crops5"), (10, "crops5"), (10, "crops5")]
    assert [(cell.models, cell.crops, cell.cost) for cell in cells] == [
        (1, "1", 1),
        (1, "5", 5),
        (2, "1", 2),
        (2, "5", 10),
    ]
    assert cells[0].base is None
    assert cells[0].accuracy == predicted[0].is_correct().mean()
    both = average(predicted).is_correct()
    assert cells[2].accuracy == both.mean()
    assert cells[2].base.difference == pytest.approx(both.mean() - cells[0].accuracy)
    table = folder(runs) / "evaluation_test_12_grid2.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["cost"] for row in rows] == ["1", "5", "2", "10"]
    assert float(rows[2]["accuracy"]) == pytest.approx(both.mean(), abs=1e-6)
    text = table.with_suffix(".md").read_text()
    assert f"| 2 | 1 | 2 | {100 - 100 * both.mean():.2f} [" in text
    assert "4 files of predictions" in capsys.readouterr().out
    # The same table replaces itself; one of other crops does not.
    ensembles.evaluate_grid(runs, ["1", "5"])
    ensembles.evaluate_grid(runs, ["1"])
    assert table.with_suffix(".md").read_text() == text
    names = sorted(path.name for path in folder(runs).glob("*grid*"))
    assert names == [f"evaluation_test_12_grid2{end}" for end in (".csv", ".md", "_2.csv", "_2.md")]


def test_kept_predictions_are_those_of_the_same_weights_data_and_crops(runs, tmp_path, monkeypatch):
    classifier = classifiers.make_classifier_from_run(runs[0])
    run, dataset = classifier.run, classifier.dataset
    cache = PredictionCache(tmp_path)

    def key_of(split="test", protocol="plain", *, run=run, dataset=dataset):
        return cache.find_entry(classifier._replace(run=run, dataset=dataset), split, protocol).key

    def change(**fields):
        return key_of(dataset=dataclasses.replace(dataset, **fields))

    other = tmp_path / "run"
    manifest = other / "checkpoints/12/manifest/metadata"
    manifest.parent.mkdir(parents=True)
    text = (run.folder / manifest.relative_to(other)).read_text()
    manifest.write_text(text)
    assert key_of(run=run._replace(folder=other)) == key_of()
    assert "crc32" in text  # so that other weights have another manifest
    manifest.write_text(f"{text} ")
    config = run.components.config.copy_and_resolve_references()
    config.model.width_mult = 0.5
    keys = [
        key_of(),
        key_of("validation"),
        key_of(protocol="crops10"),
        key_of(run=run._replace(folder=other)),
        key_of(run=run._replace(components=run.components._replace(config=config))),
        change(fingerprint={**dataset.fingerprint, "splits": {}}),
        change(mean=(0.25,)),
        change(image_shape=(28, 28, 1)),
    ]
    monkeypatch.setattr(prediction_cache.metadata, "version", lambda package: "next")
    keys.append(key_of())
    assert len(set(keys)) == len(keys)


def test_kept_predictions_are_bounded_and_damage_is_no_error(tmp_path):
    cache = PredictionCache(tmp_path, limit=3000)
    some = Predictions(np.zeros((50, 3), np.float32), np.zeros(50, np.int32))
    entries = [CacheEntry(cache.folder / f"{i}.npz", str(i)) for i in range(3)]
    for time, each in enumerate(entries):
        cache.write(each, some)
        os.utime(each.path, (time, time))
    assert cache.read(entries[0]) is None
    np.testing.assert_array_equal(cache.read(entries[2]).logits, some.logits)
    assert cache.read(entries[2]._replace(key="other")) is None
    entries[2].path.write_bytes(b"PK damaged")
    assert cache.read(entries[2]) is None
    large = Predictions(np.zeros((500, 3), np.float32), np.zeros(500, np.int32))
    cache.write(entries[2], large)
    assert cache.read(entries[2]) is None
    assert len(list(cache.folder.iterdir())) <= 2


def test_a_soup_of_checkpoints_is_the_mean_of_their_averaged_weights(runs, tmp_path, capsys):
    """The run evaluates its EMA weights, so these are averaged. LeNet-5 has no BatchNorm."""
    out = tmp_path / "soup"
    found = soups.evaluate_soup(runs, "uniform", save=out)
    arrays = [tree.flatten(load_run(run).variables) for run in runs]
    loaded = load_run(out)
    for path, leaf in tree.flatten(loaded.variables).items():
        wanted = np.mean([np.asarray(each[path], np.float64) for each in arrays], 0)
        np.testing.assert_array_equal(leaf, wanted.astype(np.float32))
    assert (loaded.step, loaded.checkpoint) == (12, "soup")
    assert loaded.config.train.ema == 0.0
    right = classifiers.predict_split(classifiers.make_classifier_from_run(out)).is_correct()
    assert found["accuracy"] == right.mean()
    assert open_source(out).leaves.keys() == tree.flatten(loaded.variables).keys()
    kept = json.loads((out / "soup.json").read_text())
    assert [each["run"] for each in kept["members"]] == runs
    assert kept == json.loads(json.dumps(found["protocol"]))
    text = capsys.readouterr().out
    assert "has no BatchNorm: nothing is re-estimated" in text
    assert "uniform soup of 2 of 2" in text
    with pytest.raises(UserError, match="exists already"):
        soups.evaluate_soup(runs, "uniform", save=out)


@pytest.mark.slow
def test_a_greedy_soup_is_chosen_on_validation(runs, capsys):
    found = soups.evaluate_soup(runs, "greedy")
    rows = found["protocol"]["members"]
    validation = [
        classifiers.predict_split(classifiers.make_classifier_from_run(run), "validation")
        for run in runs
    ]
    assert [row["validation"] for row in rows] == [v.is_correct().mean() for v in validation]
    order = np.argsort([-row["validation"] for row in rows], kind="stable")
    assert rows[order[0]]["with"] == rows[order[0]]["validation"]
    assert rows[order[0]]["kept"]
    assert rows[order[1]]["kept"] == (rows[order[1]]["with"] >= rows[order[0]]["with"])
    one = soups.evaluate_soup(runs[:1], "greedy")
    wanted = classifiers.predict_split(classifiers.make_classifier_from_run(runs[0]))
    assert one["accuracy"] == wanted.is_correct().mean()
    assert one["difference"]["accuracy"] == 0


def test_statistics_are_the_moments_of_the_averaged_network():
    """One epoch of unaugmented images: the moments of the convolution's outputs, by NumPy."""
    config = tiny.config(**{"data.batch_size": 8, "data.eval_batch_size": 8})
    batches = [tiny.examples(8, i) for i in range(3)]
    images = np.concatenate([each["image"] for each in batches])
    labels = np.concatenate([each["label"] for each in batches])
    data = load_dataset(
        config.data,
        data=classifiers.Dataset.from_arrays(
            (images, labels), (images, labels), (images, labels), num_classes=tiny.CLASSES
        ),
    )
    model = tiny.Tiny()
    components = reestimation.build.RunComponents(
        config, model, data, parallel.make_mesh(), None, tiny.CLASSES
    )
    members_ = [model.init(jax.random.key(i), np.zeros((1, *tiny.SHAPE))) for i in (0, 1)]
    modes = reestimation.find_updated_layers(components, members_[0])
    assert modes == {"norm": "train"}
    refresh, count = reestimation.make_reestimation(components, modes, 20)
    assert count == 24
    pairs = [("a", members_[0]), ("b", members_[1])]
    soup = soups.make_uniform_soup(pairs, refresh=refresh).variables
    conv = soup["params"]["conv"]
    mean = np.mean([each["params"]["conv"]["kernel"] for each in members_], 0)
    np.testing.assert_allclose(conv["kernel"], mean, rtol=1e-6)
    normalized = (images / 255 - data.mean) / data.std
    outputs = nn.Conv(4, (3, 3)).apply({"params": conv}, normalized.astype(np.float32))
    stats = soup["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], np.mean(outputs, (0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["var"], np.var(outputs, (0, 1, 2)), rtol=1e-4)
    again = soups.make_uniform_soup(pairs, refresh=refresh).variables
    jax.tree.map(np.testing.assert_array_equal, soup, again)

    config.optimizer.bn = ((".*", "frozen"),)
    assert reestimation.find_updated_layers(components, members_[0]) == {"norm": "frozen"}


def test_refusals(runs, tmp_path):
    with pytest.raises(UserError, match="expected 2 or more runs"):
        ensembles.evaluate_ensemble(runs[:1])
    with pytest.raises(UserError, match=r"--ensemble: .*@12 and .*run are the same"):
        ensembles.evaluate_ensemble([runs[0], str(folder(runs))])
    with pytest.raises(UserError, match="has no checkpoint '7'; it has best, latest, 10, 12"):
        ensembles.evaluate_ensemble([runs[0], f"{folder(runs)}@7"])
    with pytest.raises(UserError, match="each once; got '1,1'"):
        ensembles.evaluate_grid(runs, ["1", "1"])
    with pytest.raises(UserError, match="expected uniform or greedy, got 'gredy'; did you mean"):
        soups.evaluate_soup(runs, "gredy")
    other = tmp_path / "other"
    shutil.copytree(folder(runs), other)
    facts = json.loads((other / "dataset.json").read_text())
    for key, value, said in (
        ("class_names", [*facts["class_names"][:9], "nine"], "has the class 'nine' where .* '9'"),
        ("mean", [0.25], r"was trained with mean \(0.25,\), .* with \("),
    ):
        (other / "dataset.json").write_text(json.dumps({**facts, key: value}))
        with pytest.raises(UserError, match=said):
            soups.evaluate_soup([runs[0], str(other)], "uniform")


def test_a_soup_of_another_network_is_refused_before_anything_is_evaluated(runs, monkeypatch):
    def load_another(name, **_):
        found = load_run(name)
        narrow = jax.tree.map(lambda leaf: leaf[..., :1], found.variables)
        return found._replace(variables=narrow) if name == runs[1] else found

    monkeypatch.setattr(soups, "load_run", load_another)
    monkeypatch.setattr(soups._Kitchen, "measure", lambda self, variables: 0.5)
    said = r"params/c1/bias is \[6\] in .*@12 and \[1\] in .*@10"
    with pytest.raises(UserError, match=said):
        soups.evaluate_soup(runs, "uniform")


@pytest.mark.slow
def test_flags_that_do_nothing_are_refused():
    for given, said in (
        ([], "expected --workdir=RUN, or several runs"),
        (
            ["--workdir=a", "--ensemble=b,c"],
            "--workdir has an effect only without --ensemble; name",
        ),
        (["--grid"], "--grid is for several runs: --ensemble="),
        (["--ensemble=a,b", "--grid", "--soup=uniform"], "--grid and --soup: give one of them"),
        (["--ensemble=a,b", "--grid", "--average=logits"], "--average has an effect only"),
        (["--ensemble=a,b", "--calibrate"], "--calibrate and --ensemble: give one of them"),
    ):
        code, _, err = finish("evaluate", *given)
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err
