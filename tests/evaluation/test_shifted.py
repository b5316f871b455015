"""Layouts of shifted sets: tiny copies whose labels and orders are known by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_cnns.errors import UserError
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.evaluation.shifted import measure, rows
from flax_cnns.evaluation.shifted.opened import NetworkClasses
from flax_cnns.evaluation.shifted.opening import open_set
from flax_cnns.weights.preprocessing import imagenet_classes, imagenet_wnids

WNIDS = imagenet_wnids()
IMAGENET = NetworkClasses("net", imagenet_classes(), imagenet_classes(), WNIDS)
CIFAR = NetworkClasses("net", rows.CIFAR10)


def write_images(folder, count=1, value=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (4, 4), (value, i, 0)).save(folder / f"{i}.png")


def find_timm(path):
    """Returns a file of timm, which need not be importable."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    return Path(spec.submodule_search_locations[0]) / path


def labels_of(opened):
    return opened.cells[0].open((4, 4, 3)).labels.tolist()


def test_ids_of_classes_are_in_timms_order():
    assert len(WNIDS) == 1000
    assert list(WNIDS) == find_timm("data/_info/imagenet_synsets.txt").read_text().split()
    assert len(rows.CIFAR100) == 100
    assert list(rows.CIFAR100) == sorted(rows.CIFAR100)


@pytest.mark.parametrize("name", ["a", "r"])
def test_the_200_classes_are_those_of_timm(name, tmp_path):
    for wnid in find_timm(f"data/_info/imagenet_{name}_synsets.txt").read_text().split():
        write_images(tmp_path / wnid)
    opened = open_set(f"imagenet_{name}", tmp_path, IMAGENET)
    indices = find_timm(f"data/_info/imagenet_{name}_indices.txt").read_text().split()
    assert opened.classes.tolist() == [int(index) for index in indices]
    # All classes are there, so only the images are too few.
    assert "it has 200 images, not" in opened.describe_difference()
    assert "classes, not" not in opened.describe_difference()


def test_v2_is_in_the_order_of_numbers(tmp_path):
    for number, count in {"10": 1, "2": 2, "0": 1, "999": 1}.items():
        write_images(tmp_path / number, count)
    opened = open_set("imagenet_v2", tmp_path, IMAGENET)
    assert labels_of(opened) == [0, 2, 2, 10, 999]
    # A run that was trained on folders in another order: numbers mean ImageNet's classes.
    reversed_classes = NetworkClasses("net", WNIDS[::-1], imagenet_classes(), WNIDS)
    assert labels_of(open_set("imagenet_v2", tmp_path, reversed_classes)) == [999, 997, 997, 989, 0]
    write_images(tmp_path / "n01440764")
    with pytest.raises(UserError, match="expected folders of images named 0 to 999; found also n0"):
        open_set("imagenet_v2", tmp_path, IMAGENET)


def test_sketch_has_ids(tmp_path):
    for k in (3, 1, 20):
        write_images(tmp_path / "sketch" / WNIDS[k])
    assert labels_of(open_set("imagenet_sketch", tmp_path / "sketch", IMAGENET)) == [1, 3, 20]
    with pytest.raises(UserError, match=r"did you mean --set-dir=.*sketch\?"):
        open_set("imagenet_sketch", tmp_path, IMAGENET)
    ten = NetworkClasses("net", WNIDS[:10], imagenet_classes(), WNIDS)
    with pytest.raises(UserError, match="'n01601694' is no class of net"):
        open_set("imagenet_sketch", tmp_path / "sketch", ten)


def write_real(folder):
    """Four images whose paths are not in the order of their numbers. The second has no label."""
    (folder / "real.json").write_text(json.dumps([[0], [], [5, 7], [3]]))
    for number, inner in {1: "val/z", 2: "val/b", 3: "val/a", 4: "val"}.items():
        (folder / inner).mkdir(parents=True, exist_ok=True)
        path = folder / inner / f"ILSVRC2012_val_{number:08d}.JPEG"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)


def test_real_is_in_the_order_of_file_names_and_skips_images_without_labels(tmp_path):
    write_real(tmp_path)
    opened = open_set("imagenet_real", tmp_path, IMAGENET)
    source = opened.cells[0].open((4, 4, 3)).source
    assert [source.location(i)[-8:] for i in range(3)] == ["001.JPEG", "003.JPEG", "004.JPEG"]
    assert opened.answers == (frozenset({0}), frozenset({5, 7}), frozenset({3}))
    assert opened.left_out == {"images without a label in real.json": 1}
    logits = np.zeros((3, 1000), np.float32)
    logits[0, 0] = logits[1, 7] = logits[2, 8] = 1  # right, right, wrong; 3 is the fifth of ties
    assert measure.count_answers(logits, opened.answers) == {"accuracy": 2, "top5": 3}
    (tmp_path / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    with pytest.raises(
        UserError, match=r"has 3 images .*; ILSVRC2012_val_00000004.JPEG is missing"
    ):
        open_set("imagenet_real", tmp_path, IMAGENET)


class Scores:
    """The part of a torch tensor [N K] that timm's evaluator uses."""

    def __init__(self, array):
        self.array = array

    def topk(self, k, dim, largest, ordered):
        order = np.argsort(-self.array, axis=dim)[:, :k]
        return np.take_along_axis(self.array, order, dim), Scores(order)

    def cpu(self):
        return self

    def numpy(self):
        return self.array


def test_real_counts_as_timm_does(tmp_path):
    spec = importlib.util.spec_from_file_location("real", find_timm("data/real_labels.py"))
    timm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm)
    rng = np.random.default_rng(0)
    listed = [sorted(set(rng.integers(0, 30, rng.integers(0, 4)).tolist())) for _ in range(60)]
    (tmp_path / "real.json").write_text(json.dumps(listed))
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 61)]
    logits = rng.normal(size=(60, 30)).astype(np.float32)
    oracle = timm.RealLabelsImagenet(names, str(tmp_path / "real.json"))
    oracle.add_result(Scores(logits))
    kept = [i for i in range(60) if listed[i]]
    found = measure.count_answers(logits[kept], [frozenset(listed[i]) for i in kept])
    assert 0 < found["accuracy"] < found["top5"] < len(kept)
    assert 100 * found["accuracy"] / len(kept) == pytest.approx(oracle.get_accuracy(1))
    assert 100 * found["top5"] / len(kept) == pytest.approx(oracle.get_accuracy(5))


def test_a_network_may_choose_only_among_the_classes_of_the_set():
    logits = np.array([[9, 1, 5, 2], [9, 7, 1, 8]], np.float32)
    predictions = measure.choose_among(Predictions(logits, np.array([2, 1])), np.array([1, 2, 3]))
    assert predictions.logits.tolist() == [[1, 5, 2], [7, 1, 8]]
    assert predictions.labels.tolist() == [1, 0]
    assert predictions.is_correct().tolist() == [True, False]


@pytest.mark.parametrize("version", ["", "_v4"])
def test_cifar_10_1(version, tmp_path):
    tag = version.strip("_") or "v6"
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 32, 32, 3), np.uint8)
    np.save(tmp_path / f"cifar10.1_{tag}_data.npy", images)
    with pytest.raises(UserError, match=f"cifar10.1_{tag}_labels.npy is missing"):
        open_set(f"cifar10_1{version}", tmp_path, CIFAR)
    np.save(tmp_path / f"cifar10.1_{tag}_labels.npy", np.array([9, 0, 3], np.int64))
    split = open_set(f"cifar10_1{version}", tmp_path, CIFAR).cells[0].open((32, 32, 3))
    assert split.labels.tolist() == [9, 0, 3]
    assert split.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    # A network for images of 16 pixels reads them through the resize.
    small = open_set(f"cifar10_1{version}", tmp_path, CIFAR).cells[0].open((16, 16, 3))
    assert small.images is None
    assert len(small.source) == 3
    # A run whose classes have another order, and a run without their names.
    turned = NetworkClasses("net", rows.CIFAR10[::-1])
    assert labels_of(open_set(f"cifar10_1{version}", tmp_path, turned)) == [0, 9, 6]
    numbered = NetworkClasses("net", tuple("0123456789"))
    assert labels_of(open_set(f"cifar10_1{version}", tmp_path, numbered)) == [9, 0, 3]
    with pytest.raises(UserError, match=r"'airplane', .* and 7 more are no classes of net"):
        open_set(f"cifar10_1{version}", tmp_path, NetworkClasses("net", ("a", "b")))


def test_severities_of_cifar_c_are_stacked(tmp_path):
    n = 4
    np.save(tmp_path / "labels.npy", np.tile([3, 1, 4, 1], 5))
    numbers = np.arange(5 * n, dtype=np.uint8)[:, None, None, None]
    for name, first in {"snow": 0, "fog": 100, "saturate": 200}.items():
        np.save(tmp_path / f"{name}.npy", numbers + np.full((1, 32, 32, 3), first, np.uint8))
    opened = open_set("cifar10_c", tmp_path, CIFAR)
    # The paper's order, then the extra corruptions.
    assert [(c.corruption, c.severity) for c in opened.cells] == [
        (name, s) for name in ("snow", "fog", "saturate") for s in (1, 2, 3, 4, 5)
    ]
    for cell, first in zip(opened.cells, (*range(0, 20, 4), *range(100, 120, 4))):
        split = cell.open((32, 32, 3))
        assert split.images[:, 5, 5, 1].tolist() == list(range(first, first + n))
        assert split.labels.tolist() == [3, 1, 4, 1]
    assert "it has 4 images, not 10,000 and 3 classes, not 10 and no gaussian_noise" in (
        opened.describe_difference()
    )
    np.save(tmp_path / "fogg.npy", np.zeros((20, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="'fogg' is no corruption; did you mean 'fog'"):
        open_set("cifar10_c", tmp_path, CIFAR)
    (tmp_path / "fogg.npy").unlink()
    np.save(tmp_path / "fog.npy", np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"fog.npy: expected uint8 \[20 32 32 3\].*got uint8 \[4 "):
        open_set("cifar10_c", tmp_path, CIFAR)


def test_cifar_100_c_needs_its_100_classes(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(5) * 20)
    np.save(tmp_path / "fog.npy", np.zeros((5, 32, 32, 3), np.uint8))
    opened = open_set("cifar100_c", tmp_path, NetworkClasses("net", rows.CIFAR100))
    assert [cell.open((32, 32, 3)).labels.tolist() for cell in opened.cells] == [
        [0], [20], [40], [60], [80],
    ]  # fmt: skip
    with pytest.raises(UserError, match="expected labels from 0 to 9"):
        open_set("cifar10_c", tmp_path, CIFAR)


def test_imagenet_c_has_corruptions_severities_and_ids(tmp_path):
    for severity in range(1, 6):
        for k in (7, 2):
            write_images(tmp_path / "weather" / "fog" / str(severity) / WNIDS[k], severity)
            write_images(tmp_path / "snow" / str(severity) / WNIDS[k])
    opened = open_set("imagenet_c", tmp_path, IMAGENET)
    assert [(c.corruption, c.severity) for c in opened.cells[:6]] == [
        ("snow", 1), ("snow", 2), ("snow", 3), ("snow", 4), ("snow", 5), ("fog", 1),
    ]  # fmt: skip
    assert opened.cells[7].open((4, 4, 3)).labels.tolist() == [2, 2, 2, 7, 7, 7]
    (tmp_path / "snow" / "3").rename(tmp_path / "snow" / "three")
    with pytest.raises(UserError, match="snow/3: expected folders CORRUPTION/SEVERITY/WNID"):
        open_set("imagenet_c", tmp_path, IMAGENET)


def test_the_mean_corruption_error_is_relative_to_alexnet():
    alexnet = {name: 1 - error for name, error in measure.ALEXNET_ERRORS.items()}
    assert measure.mean_corruption_error(alexnet) == pytest.approx(1)
    # An error of half of AlexNet's for each of 14, and of none for fog: 14 / 15 / 2.
    better = {name: 1 - error / 2 for name, error in measure.ALEXNET_ERRORS.items()} | {"fog": 1.0}
    assert measure.mean_corruption_error(better | {"spatter": 0.0}) == pytest.approx(14 / 30)
    with pytest.raises(UserError, match="needs fog"):
        measure.mean_corruption_error({k: v for k, v in better.items() if k != "fog"})


def test_wrong_sets_and_folders(tmp_path):
    with pytest.raises(UserError, match="there is no set 'imagenet-a'; did you mean"):
        open_set("imagenet-a", tmp_path, IMAGENET)
    write_images(tmp_path / "imagenet-a" / WNIDS[0])
    with pytest.raises(
        UserError, match=r"is not a folder \(ImageNet-A: https.*\); did you mean 'imagenet-a'"
    ):
        open_set("imagenet_a", tmp_path / "imagenet_a", IMAGENET)
    with pytest.raises(UserError, match=r"ImageNet ReaL needs real.json.*download it from https"):
        open_set("imagenet_real", tmp_path, IMAGENET)
    write_images(tmp_path / "data" / "val" / "cat")
    with pytest.raises(UserError, match=r"holds splits, not classes: val; did you mean .*/val\?"):
        open_set("folder", tmp_path / "data", IMAGENET)
