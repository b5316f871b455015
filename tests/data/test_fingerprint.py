"""Fingerprints: what changes them, what does not, and how differences are described."""

import json
import os

import numpy as np
import pytest

from flax_cnns.data import fingerprint
from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.data.readers.arrays import ArraySource


@pytest.fixture
def folder(tmp_path, config):
    """root/{train,test}/{arch,bench}/NUMBER.png, 3 and 2 per class. The files are not images."""
    config.name, config.dir = "folder", str(tmp_path / "images")
    for split, count in (("train", 3), ("test", 2)):
        for name in ("arch", "bench"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "images" / split / name / f"{i}.png").write_bytes(b"x" * i)
    return tmp_path / "images"


def test_it_is_plain_json_and_moving_the_folder_changes_nothing(folder, config, monkeypatch):
    was = read_fingerprint(config)
    assert was["classes"] == ["arch", "bench"]
    counts = {split: (one["images"], one["classes"]) for split, one in was["splits"].items()}
    assert counts == {"train": (6, [3, 3]), "test": (4, [2, 2])}
    assert json.loads(json.dumps(was)) == was
    (folder.parent / "else").mkdir()
    folder.rename(folder.parent / "else/where")
    monkeypatch.chdir(folder.parent)
    for directory in (f"{folder.parent}/else/where/", "else/where", "./else/../else/where"):
        config.dir = directory
        assert read_fingerprint(config) == was


def rename(folder):
    for split in ("train", "test"):
        (folder / split / "arch").rename(folder / split / "vault")


def add(folder):
    (folder / "train/bench/9.png").write_bytes(b"")


def move(folder):
    (folder / "train/arch/2.png").rename(folder / "test/arch/2.png")


def replace(folder):
    (folder / "test/bench/0.png").rename(folder / "test/bench/8.png")


def rewrite(folder):
    (folder / "train/arch/1.png").write_bytes(b"longer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, ["class 0 was 'arch', is 'bench'", "class 1 was 'bench', is 'vault'"]),
        (add, ["train/bench had 3 images, has 4"]),
        (move, ["test/arch had 2 images, has 3", "train/arch had 3 images, has 2"]),
        (replace, ["test/bench has other files (still 2)"]),
        (rewrite, ["train/arch has other files (still 3)"]),
    ],
)
def test_a_difference_names_split_and_class(folder, config, change, message):
    was = read_fingerprint(config)
    change(folder)
    assert fingerprint.find_differences(was, read_fingerprint(config)) == message


def test_classes_that_are_not_selected_do_not_matter(folder, config):
    for split in ("train", "test"):
        (folder / split / "cave").mkdir()
        (folder / split / "cave/0.png").write_bytes(b"")
    config.classes = ("cave", "arch")
    was = read_fingerprint(config)
    assert was["classes"] == ["cave", "arch"]
    add(folder)  # to bench
    assert read_fingerprint(config) == was
    rewrite(folder)  # of arch
    differences = fingerprint.find_differences(was, read_fingerprint(config))
    assert differences == ["train/arch has other files (still 3)"]


def test_the_sizes_of_very_many_files_are_not_read(folder, config, monkeypatch):
    monkeypatch.setattr(fingerprint, "MAX_SIZED_FILES", 9)
    monkeypatch.setattr(fingerprint, "_file_size", lambda path: pytest.fail("a size was read"))
    was = read_fingerprint(config)
    rewrite(folder)
    assert read_fingerprint(config) == was
    replace(folder)
    assert len(fingerprint.find_differences(was, read_fingerprint(config))) == 1
    # Digests with and without sizes are not comparable.
    assert fingerprint.find_differences({**was, "sized": True}, read_fingerprint(config)) == []


def test_names_need_not_be_utf_8(folder, config):
    (folder / "train/arch" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    assert read_fingerprint(config)["splits"]["train"]["classes"] == [4, 3]


def test_arrays_have_a_digest_of_pixels_and_labels():
    pixels = np.zeros((4, 2, 2, 1), np.uint8)
    labels = np.array([0, 1, 0, 1], np.int32)

    def take(pixels, labels):
        sources = {"train": ArraySource(pixels, labels, "x train")}
        return fingerprint.compute(sources, ("a", "b"), {"reader": "archive"})

    was, brighter = take(pixels, labels), pixels.copy()
    brighter[3, 1, 1] = 1
    for other in (take(brighter, labels), take(pixels, labels[::-1].copy())):
        assert fingerprint.find_differences(was, other) == [
            "train has other pixels or labels (still 4 images)"
        ]
    assert fingerprint.find_differences(was, take(pixels.copy(), labels)) == []
    other = was | {"reader": "tfds", "builder": "x/1.0.0"}
    assert fingerprint.find_differences(was, other) == [
        "it was read as archive, now it is read as tfds x/1.0.0"
    ]


def test_a_fingerprint_has_the_builder_of_tfds_and_is_empty_for_noise(config):
    loaded, current = load_dataset(config), read_fingerprint(config)
    assert loaded.fingerprint == current
    assert current["builder"] == "digits/1.0.0"
    assert {split: one["images"] for split, one in current["splits"].items()} == {
        "train": 1077,
        "validation": 360,
        "test": 360,
    }
    assert not any(
        "bytes" in one for one in current["splits"].values()
    )  # the bytes depend on the encoder
    fewer = json.loads(json.dumps(current))
    fewer["splits"]["test"]["images"] = 300
    del fewer["splits"]["validation"]
    assert fingerprint.find_differences(fewer, current) == [
        "test had 300 images, has 360",
        "the split validation is new (360 images)",
    ]
    config.mock = 20
    assert read_fingerprint(config) == load_dataset(config).fingerprint == {}
    assert fingerprint.find_differences({}, current) == []


def test_many_differences_are_a_short_line():
    names = [f"class{i}" for i in range(1000)]
    differences = fingerprint.find_class_differences(names, names[::-1])
    assert differences[0] == "class 0 was 'class0', is 'class999'"
    assert differences[3:] == ["997 more classes have other names"]
    assert fingerprint.find_class_differences(names, names[:-5]) == [
        "it had 1000 classes, has 995 (gone: 'class995', 'class996', 'class997', and 2 more)"
    ]
    assert fingerprint.join_first(map(str, range(9)), 2) == "0; 1; and 7 more"
