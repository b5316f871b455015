"""Folders of images: layouts, sizes and modes, and what is damaged, empty or missing."""

import numpy as np
import pytest
from PIL import Image

from flax_cnns.data import datasets, pipeline
from flax_cnns.errors import UserError

COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def fill(root, count, size=(40, 30), suffix=".jpg"):
    """One folder per colour, with `count` images each."""
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, colour).save(root / name / f"{i:02d}{suffix}")


@pytest.fixture
def folder(tmp_path, config):
    config.name, config.dir, config.image_size = "folder", str(tmp_path), 8
    return tmp_path


def counts(dataset):
    return {name: np.bincount(split.labels).tolist() for name, split in dataset.splits.items()}


def test_classes_without_splits_are_cut_with_the_seed(folder, config):
    fill(folder, 10)
    dataset = datasets.load(config)
    assert dataset.class_names == ("blue", "green", "red")
    assert dataset.image_shape == (8, 8, 3)
    assert counts(dataset)["test"] == [2, 2, 2]
    # A tenth of the 24 that are left, each class to within one.
    assert sorted(np.bincount(dataset.splits["validation"].labels, minlength=3)) == [0, 1, 1]
    assert len(dataset.splits["train"]) == 22
    for split in dataset.splits.values():  # each image is the colour of its label
        colours = np.array([COLOURS[name] for name in dataset.class_names])[split.labels]
        np.testing.assert_allclose(split.images[:, 4, 4], colours, atol=6)


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_folders_of_splits(folder, config, validation):
    fill(folder / "train", 4)
    fill(folder / validation, 2, suffix=".PNG")
    fill(folder / "test", 1, suffix=".webp")
    (folder / "train" / "red" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    assert counts(datasets.load(config)) == {
        "train": [4, 4, 4],
        "validation": [2, 2, 2],
        "test": [1, 1, 1],
    }


def test_images_of_every_mode(folder, config):
    fill(folder / "train", 2)
    fill(folder / "test", 1)
    red = folder / "test" / "red"
    grey = np.full((9, 9), 100, np.uint8)
    Image.fromarray(grey).save(red / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save(red / "sixteen.png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(red / "transparent.png")
    Image.new("RGB", (9, 9), (100, 100, 100)).convert("P").save(red / "palette.bmp")
    Image.new("CMYK", (9, 9), (0, 0, 0, 155)).save(red / "ink.jpg")
    config.validation = 0
    images = datasets.load(config).splits["test"].images[2:]  # red, sorted by file name
    middle = images[:, 4, 4].astype(int)
    # 00.jpg grey.png ink.jpg palette.bmp sixteen.png transparent.png
    np.testing.assert_allclose(middle[[1, 2, 4]], 100, atol=3)
    np.testing.assert_allclose(middle[3], 100, atol=6)  # the nearest of the palette
    np.testing.assert_array_equal(middle[5], 255)  # on white


def test_the_centre_is_seen_undistorted_and_large_jpegs_are_decoded_small(folder, config):
    fill(folder, 5, size=(8, 8))
    wide = np.zeros((512, 1024, 3), np.uint8)
    wide[:, 256:768] = 200  # the central square
    Image.fromarray(wide).save(folder / "red" / "wide.jpg", quality=95)
    config.validation = 0
    dataset = datasets.load(config)
    images = np.concatenate([split.images for split in dataset.splits.values()])
    light = [i for i in images if (abs(i[4, 4].astype(int) - 200) < 3).all()]
    assert len(light) == 1
    # At its edge the resampling filter sees the black beside it, as when one resizes first.
    assert (light[0][:, 1:-1] > 195).all()
    assert (light[0][:, 0] > 150).all()


def truncate(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_a_truncated_image_is_named(folder, config):
    fill(folder, 5)
    truncate(folder / "green" / "03.jpg")
    with pytest.raises(UserError, match=r"cannot decode .*green.03\.jpg: .*data\.skip_damaged"):
        datasets.load(config)


def test_a_truncated_image_is_skipped_and_counted_if_the_config_says_so(folder, config):
    fill(folder, 5)
    truncate(folder / "green" / "03.jpg")
    (folder / "red" / "00.jpg").write_bytes(b"")
    config.skip_damaged = True
    dataset = datasets.load(config)
    assert sum(map(len, dataset.splits.values())) == 13
    assert sorted(dataset.damaged) == [
        str(folder / "green" / "03.jpg"),
        str(folder / "red" / "00.jpg"),
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_a_truncated_image_is_named(folder, config, workers):
    fill(folder / "train", 2)
    fill(folder / "test", 1)
    for file in (folder / "train").glob("*/00.jpg"):
        truncate(file)
    truncate(folder / "test" / "red" / "00.jpg")
    config.in_memory, config.validation, config.batch_size, config.workers = "no", 0, 6, workers
    dataset = datasets.load(config)
    batches = pipeline.train_batches(dataset, config, seed=0)
    with pytest.raises(UserError, match=r"cannot decode .*train.*00\.jpg: .*data\.skip_damaged"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_a_truncated_image_is_skipped_and_counted(folder, config, workers):
    fill(folder / "train", 2)
    fill(folder / "test", 1)
    truncate(folder / "train" / "green" / "00.jpg")
    truncate(folder / "test" / "red" / "00.jpg")
    config.in_memory, config.validation, config.batch_size, config.workers = "no", 0, 6, workers
    config.skip_damaged = True
    dataset = datasets.load(config)
    batches = pipeline.train_batches(dataset, config, seed=0)
    batch = next(batches)
    batches.close()
    assert list(batch) == ["image", "label"]
    # An epoch: the next image, green's other one, took the place.
    assert np.bincount(batch["label"]).tolist() == [2, 2, 2]
    (test,) = pipeline.eval_batches(dataset, "test", config)
    assert test["mask"].sum() == 2
    assert len(dataset.damaged) == 2


def test_folders_that_are_wrong(folder, config):
    with pytest.raises(UserError, match="holds no class folders"):
        datasets.load(config)
    fill(folder / "val", 1)
    with pytest.raises(UserError, match="has validation but no train folder"):
        datasets.load(config)
    fill(folder / "train", 1)
    (folder / "val" / "pink").mkdir()
    with pytest.raises(UserError, match=r"pink: no class of that name"):
        datasets.load(config)
    (folder / "val" / "pink").rmdir()
    (folder / "train" / "white").mkdir()
    with pytest.raises(UserError, match=r"white holds no image"):
        datasets.load(config)
    config.dir = str(folder / "nowhere")
    with pytest.raises(UserError, match="is not a folder"):
        datasets.load(config)
    config.dir = ""
    with pytest.raises(UserError, match=r"needs data\.dir"):
        datasets.load(config)
