"""Evaluation on sets in folders: numbers by hand, with a network that reads an image's class."""

from __future__ import annotations

import csv
import json
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_cnns import config as configs
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation.shifted import rows
from flax_cnns.evaluation.uncertainty import wilson_interval
from flax_cnns.runs import evaluate_cells as cells
from flax_cnns.runs.classifier import (
    Classifier,
    LibraryReader,
    make_classifier_from_run,
    predict_split,
)
from flax_cnns.runs.crops import CropOptions
from flax_cnns.runs.evaluate_set import evaluate_set
from flax_cnns.runs.workdir import read_config
from flax_cnns.weights import preprocessing
from flax_cnns.weights.preprocessing import imagenet_classes, imagenet_wnids

WNIDS = imagenet_wnids()


def paint(number, size=4):
    """An image whose color says which class the network below predicts."""
    return Image.new("RGB", (size, size), (number // 32 * 8, number % 32 * 8, 0))


class ReadsColors(nn.Module):
    """Predicts the class whose color `paint` gives; near colors are near classes."""

    num_classes: int

    def __call__(self, images, *, train=False):
        numbers = jnp.arange(self.num_classes)
        colors = jnp.stack([numbers // 32 * 8, numbers % 32 * 8], -1)
        pixels = images[..., :2].mean((1, 2))
        return -jnp.sum((pixels[:, None] - colors) ** 2, -1) / 64


def make_classifier(class_names, size=4):
    config = configs.default_config().data
    config.eval_batch_size = 4
    network = ReadsColors(len(class_names))
    title = "colors, by hand"
    shape = (size, size, 3)
    return Classifier(
        title, "colors", network, {}, lambda x: x.astype(jnp.float32), class_names, shape,
        "classes", config,
    )  # fmt: skip


IMAGENET = make_classifier(imagenet_classes())


def save(folder, *numbers):
    """Saves images that the network takes for these classes."""
    folder.mkdir(parents=True)
    for i, number in enumerate(numbers):
        paint(number).save(folder / f"{i}.png")


def test_a_folder_of_classes(tmp_path, capsys):
    names = tuple(f"class {k}" for k in range(12))
    save(tmp_path / "set" / "10", 10, 10, 2)
    save(tmp_path / "set" / "2", 2)
    save(tmp_path / "set" / "1", 0)
    out = tmp_path / "out.json"
    found = evaluate_set(make_classifier(names), "folder", tmp_path / "set", out=out)
    assert (found["examples"], found["accuracy"], found["top5"]) == (5, 3 / 5, 4 / 5)
    assert found["intervals"]["accuracy"] == list(wilson_interval(3, 5))
    shown = {row["class"]: (row["examples"], row["accuracy"]) for row in found["classes"]}
    assert shown == {
        "class 0": (0, None), "class 1": (1, 0.0), "class 2": (1, 1.0), "class 10": (3, 2 / 3)
    }  # fmt: skip
    assert found["protocol"] == {"set": "folder", "set_dir": str(tmp_path / "set")}
    assert json.loads(out.read_text())["accuracy"] == 0.6
    assert "accuracy 60.00% [23.07, 88.24]" in capsys.readouterr().out
    with pytest.raises(UserError, match="'10' is no class of colors, by hand"):
        evaluate_set(make_classifier(names[:10]), "folder", tmp_path / "set")


def test_a_and_r_are_chosen_among_their_own_classes(tmp_path, capsys):
    # Class 41 is not in the set: of the set's classes, 40 is the nearest color.
    save(tmp_path / WNIDS[40], 40, 41)
    save(tmp_path / WNIDS[80], 41)
    save(tmp_path / WNIDS[0], 0)
    anything = evaluate_set(IMAGENET, "folder", tmp_path)
    assert anything["accuracy"] == 2 / 4
    found = evaluate_set(IMAGENET, "imagenet_a", tmp_path)
    assert found["accuracy"] == 3 / 4
    assert found["protocol"]["chosen_among"] == 3
    assert [row["class"] for row in found["classes"]] == [
        imagenet_classes()[k] for k in (0, 40, 80)
    ]
    text = capsys.readouterr().out
    assert "not the whole of ImageNet-A: it has 4 images, not 7,500 and 3 classes, not 200" in text


def test_real(tmp_path, capsys):
    (tmp_path / "val" / "b").mkdir(parents=True)
    (tmp_path / "val" / "a").mkdir()
    (tmp_path / "real.json").write_text("[[3], [], [5, 7], [400]]")
    for number, (inner, seen) in enumerate([("b", 3), ("b", 0), ("a", 7), ("a", 5)], 1):
        path = tmp_path / "val" / inner / f"ILSVRC2012_val_{number:08d}.JPEG"
        paint(seen, 16).save(path, format="PNG")  # PIL goes by the content; JPEG changes colors
    found = evaluate_set(IMAGENET, "imagenet_real", tmp_path)
    assert (found["examples"], found["accuracy"], found["top5"]) == (3, 2 / 3, 2 / 3)
    assert found["intervals"]["accuracy"] == list(wilson_interval(2, 3))
    assert found["left_out"] == {"images without a label in real.json": 1}
    assert "left out: images without a label in real.json: 1" in capsys.readouterr().out


def test_cells_are_saved_and_continued(tmp_path, monkeypatch, capsys):
    classifier = make_classifier(rows.CIFAR10, 32)
    labels = [3, 1, 4, 1]
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels, 5))
    # At severity s, the first s - 1 images look like class 9; of the other corruption, all do.
    seen = [9 if i < s - 1 else k for s in range(1, 6) for i, k in enumerate(labels)]
    np.save(folder / "fog.npy", np.stack([np.asarray(paint(k, 32)) for k in seen]))
    np.save(folder / "spatter.npy", np.stack([np.asarray(paint(9, 32))] * 20))
    out, count = tmp_path / "c.json", cells._count_hits

    def stop_at_the_third(dataset, predictions):
        if (tmp_path / "c.partial.npz").exists() and len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return count(dataset, predictions)

    done: list[int] = []
    monkeypatch.setattr(cells, "_count_hits", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate_set(classifier, "cifar10_c", folder, out=out)
    assert not out.exists()
    shutil.copyfile(tmp_path / "c.partial.npz", tmp_path / "d.partial.npz")
    done.append(1)
    found = evaluate_set(classifier, "cifar10_c", folder, out=out)
    assert len(done) == 2 + 1 + 8  # two cells are not evaluated again
    assert "2 of 10 cells were finished earlier" in capsys.readouterr().out
    accuracies = [cell["accuracy"] for cell in found["cells"]]
    assert accuracies == [1, 3 / 4, 2 / 4, 1 / 4, 0, 0, 0, 0, 0, 0]
    assert found["corruptions"] == {"fog": 0.5, "spatter": 0}
    assert found["accuracy"] == 0.5  # spatter is not among the 15
    assert found["cells"][1]["intervals"]["accuracy"] == list(wilson_interval(3, 4))
    assert "mce" not in found
    with open(tmp_path / "c.csv") as file:
        written = list(csv.DictReader(file))
    assert [(r["corruption"], r["severity"], float(r["accuracy"])) for r in written[:2]] == [
        ("fog", "1", 1.0), ("fog", "2", 0.75),
    ]  # fmt: skip
    names = ["CIFAR-10-C", "c.csv", "c.json", "d.partial.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    # A network of the same title with other weights begins anew.
    other = classifier._replace(variables={"params": {"unused": jnp.ones(1)}})
    evaluate_set(other, "cifar10_c", folder, out=tmp_path / "d.json")
    assert len(done) == 11 + 10


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path):
    save(tmp_path / "set" / "0", 0, 0)
    classifier = make_classifier(tuple(f"class {k}" for k in range(3)))._replace(model=None)
    with pytest.raises(UserError, match=r"cannot write .*there is no folder"):
        evaluate_set(classifier, "folder", tmp_path / "set", out=tmp_path / "none" / "x.json")


def test_a_damaged_image_is_named_or_counted(tmp_path):
    names = tuple(f"class {k}" for k in range(3))
    save(tmp_path / "0", 0, 0)
    (tmp_path / "0" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot decode .*1.png.*or give --skip-damaged"):
        evaluate_set(make_classifier(names), "folder", tmp_path)
    found = evaluate_set(make_classifier(names), "folder", tmp_path, skip_damaged=True)
    assert (found["examples"], found["accuracy"]) == (1, 1)
    assert found["damaged_images"] == [str(tmp_path / "0" / "1.png")]


def test_crops_of_a_set_and_images_that_need_no_resize(tmp_path):
    """The middle of the image has another color than its border."""
    image = np.asarray(paint(2, 32)).copy()
    image[4:28, 4:28] = np.asarray(paint(1, 24))
    row = preprocessing("resnet50", "torchvision")._replace(size=24, resize=32)
    names = imagenet_classes()
    library = make_classifier(names, 24)._replace(reader=LibraryReader(row))
    for severity in range(1, 6):
        folder = tmp_path / "c" / "fog" / str(severity) / WNIDS[1]
        folder.mkdir(parents=True)
        Image.fromarray(image).save(folder / "0.png")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / WNIDS[1]).symlink_to(tmp_path / "c" / "fog" / "1" / WNIDS[1])
    # The library crops 24 of 32 pixels: only the middle. ImageNet-C's images are seen whole.
    plain = evaluate_set(library, "folder", tmp_path / "plain")
    steps = np.arange(1000) // 32, np.arange(1000) % 32 - 1  # from the color of class 1
    wanted = np.log(np.exp(-(steps[0] ** 2 + steps[1] ** 2.0)).sum())
    assert plain["loss"] == pytest.approx(wanted, rel=1e-5)
    whole = evaluate_set(library, "imagenet_c", tmp_path / "c")
    assert whole["cells"][0]["loss"] > plain["loss"] + 0.05
    crops = CropOptions("1", share=1.0)
    found = evaluate_set(library, "folder", tmp_path / "plain", crops=crops)
    assert found["protocol"]["name"] == "crops1_share1"
    assert found["loss"] == pytest.approx(whole["cells"][0]["loss"], abs=1e-3)


def test_a_run_on_a_folder_of_its_own_images(finished, tmp_path):
    run = finished[0]
    classifier = make_classifier_from_run(run)
    test = load_dataset(read_config(run).data).splits["test"]
    for i in range(40):
        folder = tmp_path / "photos" / str(test.labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.images[i][..., 0]).save(folder / f"{i}.png")
    found = evaluate_set(classifier, "folder", tmp_path / "photos")
    correct = predict_split(classifier).is_correct()[:40]
    assert (found["examples"], found["accuracy"]) == (40, correct.mean())
    path = run / f"evaluation_folder_photos_{classifier.run.step}.json"
    assert json.loads(path.read_text())["protocol"]["set"] == "folder"
    # The same folder replaces its file; another one of the same name does not.
    shutil.copytree(tmp_path / "photos", tmp_path / "other" / "photos")
    evaluate_set(classifier, "folder", tmp_path / "other" / "photos")
    evaluate_set(classifier, "folder", tmp_path / "photos")
    written = sorted(run.glob("evaluation_folder_photos_*"))
    sets = [json.loads(each.read_text())["protocol"]["set_dir"] for each in written]
    assert sets == [str(tmp_path / "photos"), str(tmp_path / "other" / "photos")]
    for each in written:
        each.unlink()
