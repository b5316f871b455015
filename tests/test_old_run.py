"""A run that commit b388230 left unfinished: resumed, evaluated, used for prediction, grafted."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from flax_cnns import create_model, init_variables, run
from flax_cnns import tree as pytree
from flax_cnns.checkpoint import reading
from flax_cnns.checkpoint.graft.graft import graft
from flax_cnns.data.load import read_fingerprint
from flax_cnns.runs import evaluate, predict, session, workdir
from tests.fixtures import old_run

pytestmark = pytest.mark.usefixtures("no_pictures")
EXPECTED = json.loads((old_run.FOLDER / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Returns the current folder, which holds the run and its images."""
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

    # The run is complete: its numbers belong to the data that it was trained on.
    (folder / "images").rename(folder / "moved")
    config = old_run.make_config()
    assert run(config, "run") == summary  # the data cannot be read, so the numbers stay
    config.data.dir = "moved"
    assert run(config, "run") == summary
    assert workdir.read_config("run").data.dir == "moved"
    add_an_image(folder / "moved")
    with pytest.raises(workdir.ChangedData, match="train/ring had 20 images, has 21"):
        run(config, "run")
    assert run(config, "run", accept_changed_data=True) == summary


def add_an_image(images):
    shutil.copy(images / "train/ring/0.png", images / "train/ring/new.png")


def test_it_is_evaluated_to_the_same_counts_and_predicts_the_same(folder):
    found, expected = evaluate.evaluate_run("run"), EXPECTED["evaluation"]
    for name in ("split", "step", "examples", "accuracy", "confusion"):
        assert found[name] == expected[name]
    for now, then in zip(found["classes"], expected["classes"], strict=True):
        assert then.items() <= now.items()  # newer versions add intervals
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    was = read_fingerprint(old_run.make_config().data)
    assert json.loads((folder / "run/dataset.json").read_text())["fingerprint"] == was
    add_an_image(folder / "images")
    with pytest.raises(workdir.ChangedData, match="train/ring had 20 images, has 21"):
        evaluate.evaluate_run("run")
    found = evaluate.evaluate_run("run", accept_changed_data=True)
    written = json.loads((folder / "run/evaluation_test_20.json").read_text())
    assert written["changed_data"]["was"] == found["changed_data"]["was"] == was
    assert written["changed_data"]["is"] == read_fingerprint(old_run.make_config().data)

    guesses = predict.predict(predict.make_predictor_from_run("run"), old_run.PHOTOS)
    for now, then in zip(guesses, EXPECTED["predictions"], strict=True):
        assert [name for name, _ in now] == [name for name, _ in then]
        np.testing.assert_allclose([p for _, p in now], [p for _, p in then], atol=1e-5)


def rename_a_class(folder):
    for split in ("train", "test"):
        (folder / "images" / split / "ring").rename(folder / "images" / split / "circle")


def test_a_class_that_is_renamed_is_noticed_and_predictions_keep_its_old_name(folder):
    facts = (folder / "run/dataset.json").read_text()
    rename_a_class(folder)
    said = "class 0 was 'left', is 'circle'; class 1 was 'ring', is 'left'"
    for start in (
        lambda: run(old_run.make_config(), "run"),
        lambda: evaluate.evaluate_run("run"),
    ):
        with pytest.raises(workdir.ChangedData, match=said):
            start()
    assert (folder / "run/dataset.json").read_text() == facts
    assert predict.make_predictor_from_run("run").class_names == list(old_run.CLASSES)


def test_its_data_may_move_and_change_where_that_is_accepted(folder, monkeypatch):
    """The run has no fingerprint of its data; its first start adds one."""
    monkeypatch.setattr(session.Session, "run", lambda self: {})
    config = old_run.make_config()
    run(config, "run")
    was = json.loads((folder / "run/dataset.json").read_text())["fingerprint"]
    assert was == read_fingerprint(config.data)
    (folder / "images").rename(folder / "moved")
    config.data.dir = "moved"
    run(config, "run")
    add_an_image(folder / "moved")
    with pytest.raises(
        workdir.ChangedData, match="train/ring had 20 images, has 21; restore the data"
    ):
        run(config, "run")
    run(config, "run", accept_changed_data=True)
    run(config, "run")  # the change is recorded
    facts = json.loads((folder / "run/dataset.json").read_text())
    (change,) = facts["accepted_changes"]
    assert (change["step"], change["was"], change["is"]) == (20, was, facts["fingerprint"])
    assert facts["fingerprint"] == read_fingerprint(config.data)


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
    assert len(grafted) == 37  # 7 kernels, 7 norms with 4 leaves, 2 leaves of the head
    for path, leaf in grafted.items():
        source = fresh[path] if path.startswith("params/head/") else there[path]
        np.testing.assert_array_equal(leaf, source, err_msg=path)
