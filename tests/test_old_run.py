"""A run that commit b388230 left unfinished: resumed, evaluated, used for prediction, grafted."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from flax_cnns import create_model, experiment, init_variables, prediction, pytree, run
from flax_cnns.checkpoint import reading
from flax_cnns.checkpoint.graft import graft
from tests.fixtures import old_run

EXPECTED = json.loads((old_run.FOLDER / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the run and its images."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(old_run.FOLDER / "run", "run")
    old_run.draw_images(tmp_path)
    return tmp_path


def test_it_goes_on_as_the_version_that_made_it_went_on(folder):
    summary = run(old_run.make_config(), "run")
    expected = EXPECTED["finished"]
    for name in ("step", "test/examples", "test/accuracy"):
        assert summary[name] == expected[name]
    assert summary["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-4)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    logged = {(line["step"], name): value for line in lines for name, value in line.items()}
    for line in expected["log"]:
        for name, value in line.items():
            assert logged[line["step"], name] == pytest.approx(value, rel=1e-4), (line, name)


def test_it_is_evaluated_to_the_same_counts_and_predicts_the_same(folder):
    found, expected = experiment.evaluate_run("run"), EXPECTED["evaluation"]
    for name in ("split", "step", "examples", "accuracy", "classes", "confusion"):
        assert found[name] == expected[name]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    guesses = prediction.predict(prediction.from_run("run"), old_run.PHOTOS)
    for now, then in zip(guesses, EXPECTED["predictions"], strict=True):
        assert [name for name, _ in now] == [name for name, _ in then]
        np.testing.assert_allclose([p for _, p in now], [p for _, p in then], atol=1e-5)


def test_it_is_grafted_whole_but_for_another_head(folder):
    model = create_model(
        "cifar_resnet20",
        depths=(1, 1, 1),
        widths=(4, 8, 16),
        num_classes=7,
        input_size=(old_run.SIZE, old_run.SIZE, 3),
    )
    fresh = init_variables(model, jax.random.key(1))
    rules = ((r"params/head/.*", None), (r"(.*)", r"\1"))
    grafted = pytree.flatten(graft("run", fresh, rules)[0])
    there = reading.read_leaves("run@20", list(reading.read_metadata("run@20")))
    fresh = pytree.flatten(fresh)
    assert len(grafted) == 37  # 7 kernels, 7 norms of 4, the head
    for path, leaf in grafted.items():
        source = fresh[path] if path.startswith("params/head/") else there[path]
        np.testing.assert_array_equal(leaf, source, err_msg=path)
