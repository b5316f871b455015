"""Patches that excite the units of a run's network, and the images of a run's own data."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from flax_cnns.analysis.explain import features
from flax_cnns.analysis.plots import maps
from flax_cnns.analysis.plots import patches as plots
from flax_cnns.errors import UserError
from flax_cnns.runs import subject as subjects
from flax_cnns.runs.visualize import loss, patches


@pytest.fixture(scope="module")
def subject(finished):
    return subjects.make_subject_from_run(finished[0], count=3)


def test_patches_of_a_whole_split(subject, tmp_path, monkeypatch):
    """All test images are seen, though the subject shows three. Behind LeNet-5's tanh, the
    deconvnet is not defined."""
    drawn, said = [], []
    monkeypatch.setattr(plots, "draw_patches", lambda *a: drawn.append(a))
    tops = patches.draw_patches(subject, tmp_path / "x.png", "c1", [2], say=said.append)
    with contextlib.closing(subject.open_split()) as batches:
        images = np.concatenate([batch["image"][batch["mask"] > 0] for batch in batches])
    inputs = subject.normalize(images)
    found = features.features(subject.model, subject.variables, inputs, ["c1"])["c1"]
    best = np.asarray(found[..., 2]).max((1, 2))
    np.testing.assert_allclose(tops[0].activations, np.sort(best)[:-10:-1], rtol=1e-4)
    assert tops[0].numbers.max() >= 3
    (((unit,), method, *_),) = drawn
    assert unit.patches.shape == unit.projections.shape == (9, 5, 5, 1)
    assert method == "deconvnet"
    kernel = np.asarray(subject.variables["params"]["c1"]["kernel"])[..., 2]
    ratio = unit.projections / kernel
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-3)
    assert (unit.label, unit.label in said[-1]) == ("unit 2", True)
    nowhere = dict(
        activations=np.zeros(9), numbers=np.zeros(9, int), positions=np.zeros((9, 2), int)
    )
    dead = tops[0]._replace(**nowhere)
    monkeypatch.setattr(patches, "find_top_images", lambda *a, **k: [dead])
    patches.draw_patches(subject, tmp_path / "x.png", "c3", [2], say=said.append)
    assert drawn[1][1] == "gradient"
    assert "the gradient is drawn instead of the deconvnet" in said[-2]
    assert said[-1].startswith("unit 2 (never above 0): activations 0 to 0; images")


def test_a_picture_of_patches(tmp_path):
    values = np.random.default_rng(0).random((9, 4, 6, 1)).astype(np.float32)
    sheet = plots.arrange(values)
    assert sheet.shape == (3 * 4 + 2, 3 * 6 + 2, 3)
    np.testing.assert_array_equal(sheet[5:9, 14:, 1], values[5, ..., 0])
    unit = plots.UnitPatches("unit 3", values, values - 0.5)
    plots.draw_patches([unit] * 3, "deconvnet", tmp_path / "x.png", "title")
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 300


def test_the_title_says_that_tiles_are_left_out(monkeypatch):
    figures = []
    monkeypatch.setattr(maps, "save_picture", lambda figure, png: figures.append(figure))
    maps.draw_tiles([np.zeros((2, 2))] * 70, ["a"] * 70, "x.png", "filters")
    assert figures[0].get_suptitle() == "filters, 64 of 70"


OWN_DATA = """
import numpy as np
import flax_cnns

IMAGES = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 1), np.uint8)
LABELS = np.arange(30) % 10

def arrays(seed=0):
    return flax_cnns.Dataset.from_arrays(
        train=(IMAGES, LABELS), test=(IMAGES[seed:][:7], LABELS[seed:][:7])
    )

def batches(split, start_step, process_index, process_count):
    for _ in range(100 if split == "train" else 1):
        yield {"image": IMAGES[:7], "label": LABELS[:7]}

def stream():
    return flax_cnns.Dataset.from_batches(
        batches, sizes={"train": 30, "test": 7}, image_shape=(32, 32, 1), num_classes=10
    )
"""


def test_own_data_of_a_run(finished, tmp_path, monkeypatch):
    """The images are those of the user's own module; as in `evaluate`, trust is needed and a change
    of the data is refused."""
    (tmp_path / "own_images_of_a_run.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("arrays", "stream"):
        run = tmp_path / name
        shutil.copytree(finished[0], run)
        config = json.loads((run / "config.json").read_text())
        config["data"] |= {"name": f"own_images_of_a_run:{name}", "validation": 0}
        config["data"]["eval_batch_size"] = 4 if name == "arrays" else 7
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"imports own_images_of_a_run:.*add --trust"):
            subjects.make_subject_from_run(run)
        with pytest.raises(UserError, match=r"the data of .* changed since it began"):
            subjects.make_subject_from_run(run, trust=True)
        if name == "arrays":
            with pytest.raises(UserError, match=r"the data of .* changed since it began"):
                loss.load_checkpoint(run, trust=True)
        found = subjects.make_subject_from_run(run, count=3, trust=True, accept_changed_data=True)
        images = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 1), np.uint8)
        np.testing.assert_allclose(found.pixels, images[:3] / 255, atol=1e-6)
        assert list(found.names) == [f"image {n} ({n})" for n in range(3)]
        with contextlib.closing(found.open_split()) as batches:
            assert sum(batch["mask"].sum() for batch in batches) == 7
