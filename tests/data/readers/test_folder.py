"""Folders of images: layouts, sizes, modes, and damaged, empty or missing parts."""

import os
import types

import numpy as np
import pytest
from PIL import Image

from flax_cnns.data import pipeline
from flax_cnns.data.load import load_dataset
from flax_cnns.data.readers import folder as reader
from flax_cnns.errors import UserError

COLORS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def fill(root, count, size=(40, 30), suffix=".jpg"):
    """One folder per color, with `count` images each."""
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, color).save(root / name / f"{i:02d}{suffix}")


@pytest.fixture
def folder(tmp_path, config):
    config.name, config.dir, config.image_size = "folder", str(tmp_path), 8
    return tmp_path


def counts(dataset):
    return {name: np.bincount(split.labels).tolist() for name, split in dataset.splits.items()}


def test_classes_without_splits_are_cut_with_the_seed(folder, config):
    fill(folder, 10)
    dataset = load_dataset(config)
    assert dataset.class_names == ("blue", "green", "red")
    assert dataset.image_shape == (8, 8, 3)
    assert counts(dataset)["test"] == [2, 2, 2]
    # A tenth of the remaining 24 images, each class to within one.
    assert sorted(np.bincount(dataset.splits["validation"].labels, minlength=3)) == [0, 1, 1]
    assert len(dataset.splits["train"]) == 22
    for split in dataset.splits.values():  # each image has the color of its label
        colors = np.array([COLORS[name] for name in dataset.class_names])[split.labels]
        np.testing.assert_allclose(split.images[:, 4, 4], colors, atol=6)


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_folders_of_splits(folder, config, validation):
    fill(folder / "train", 4)
    fill(folder / validation, 2, suffix=".PNG")
    fill(folder / "test", 1, suffix=".webp")
    (folder / "train" / "red" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    assert counts(load_dataset(config)) == {
        "train": [4, 4, 4],
        "validation": [2, 2, 2],
        "test": [1, 1, 1],
    }


def test_images_of_every_mode(folder, config):
    fill(folder / "train", 2)
    fill(folder / "test", 1)
    red = folder / "test" / "red"
    gray = np.full((9, 9), 100, np.uint8)
    Image.fromarray(gray).save(red / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 256).save(red / "sixteen.png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(red / "transparent.png")
    Image.new("RGB", (9, 9), (100, 100, 100)).convert("P").save(red / "palette.bmp")
    Image.new("CMYK", (9, 9), (0, 0, 0, 155)).save(red / "ink.jpg")
    config.validation = 0
    images = load_dataset(config).splits["test"].images[2:]  # red, sorted by file name
    middle = images[:, 4, 4].astype(int)
    # 00.jpg gray.png ink.jpg palette.bmp sixteen.png transparent.png
    np.testing.assert_allclose(middle[[1, 2, 4]], 100, atol=3)
    np.testing.assert_allclose(middle[3], 100, atol=6)  # the nearest color of the palette
    np.testing.assert_array_equal(middle[5], 255)  # on white


def test_the_center_is_seen_undistorted_and_large_jpegs_are_decoded_small(folder, config):
    fill(folder, 5, size=(8, 8))
    wide = np.zeros((512, 1024, 3), np.uint8)
    wide[:, 256:768] = 200  # the central square
    Image.fromarray(wide).save(folder / "red" / "wide.jpg", quality=95)
    config.validation = 0
    dataset = load_dataset(config)
    images = np.concatenate([split.images for split in dataset.splits.values()])
    light = [i for i in images if (abs(i[4, 4].astype(int) - 200) < 3).all()]
    assert len(light) == 1
    # At the edge the resampling filter sees the black outside, as if resizing came first.
    assert (light[0][:, 1:-1] > 195).all()
    assert (light[0][:, 0] > 150).all()


def truncate(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_a_truncated_image_is_named(folder, config):
    fill(folder, 5)
    truncate(folder / "green" / "03.jpg")
    with pytest.raises(UserError, match=r"cannot decode .*green.03\.jpg: .*data\.skip_damaged"):
        load_dataset(config)


def test_a_truncated_image_is_skipped_and_counted_if_the_config_says_so(folder, config):
    fill(folder, 5)
    truncate(folder / "green" / "03.jpg")
    (folder / "red" / "00.jpg").write_bytes(b"")
    config.skip_damaged = True
    dataset = load_dataset(config)
    assert sum(map(len, dataset.splits.values())) == 13
    assert sorted(dataset.damaged) == [
        str(folder / "green" / "03.jpg"),
        str(folder / "red" / "00.jpg"),
    ]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_streamed_a_truncated_image_is_named(folder, config, workers):
    fill(folder / "train", 6)
    fill(folder / "test", 1)
    config.in_memory, config.validation, config.batch_size, config.workers = "no", 0, 18, workers
    truncate(folder / "train" / "blue" / "01.jpg")  # not one that is probed before a run
    dataset = load_dataset(config)
    batches = pipeline.train_batches(dataset, config, seed=0)
    with pytest.raises(UserError, match=r"cannot decode .*train.*01\.jpg: .*data\.skip_damaged"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_streamed_a_truncated_image_is_skipped_and_counted(folder, config, workers):
    fill(folder / "train", 2)
    fill(folder / "test", 1)
    truncate(folder / "train" / "green" / "00.jpg")
    truncate(folder / "test" / "red" / "00.jpg")
    os.remove(folder / "train" / "red" / "01.jpg")
    pictures = [Image.new("RGB", (9, 9), (80 * k, 0, 0)) for k in range(2)]
    moving = folder / "train" / "red" / "01.gif"
    pictures[0].save(moving, save_all=True, append_images=pictures[1:])
    config.in_memory, config.validation, config.batch_size, config.workers = "no", 0, 6, workers
    config.skip_damaged = True
    dataset = load_dataset(config)
    dataset.multi_frame_files.clear()  # found by the probe before the run
    batches = pipeline.train_batches(dataset, config, seed=0)
    batch = next(batches)
    batches.close()
    assert list(batch) == ["image", "label"]
    # In an epoch, the other green image comes next and replaces the damaged one.
    assert np.bincount(batch["label"]).tolist() == [2, 2, 2]
    (test,) = pipeline.eval_batches(dataset, "test", config)
    assert test["mask"].sum() == 2
    assert len(dataset.damaged) == 2
    assert dataset.multi_frame_files == {str(moving)}


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("in_memory", ["yes", "no"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_with_only_damaged_images_is_refused(folder, config, in_memory, split):
    for one in ("train", "val", "test"):
        fill(folder / one, 6)
    for file in (folder / split).glob("*/*.jpg"):
        file.write_text(LFS)
    config.skip_damaged, config.in_memory = True, in_memory
    with pytest.raises(UserError, match=r"none of the 18 .*blue.00\.jpg: .*run git lfs pull"):
        load_dataset(config)
    for one in ("green", "blue"):  # one image is enough, wherever it is; train wants two classes
        Image.new("RGB", (9, 9)).save(folder / split / one / "03.jpg")
    assert len(load_dataset(config).splits) == 3


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_class_folders_is_named(folder, config, split):
    fill(folder / "train", 3)
    (folder / split).mkdir()
    with pytest.raises(UserError, match=rf"{split} holds no class folders; .*\(blue, green, red\)"):
        load_dataset(config)
    for i in range(5):  # as in raw ImageNet
        Image.new("RGB", (9, 9)).save(folder / split / f"{i}.jpg")
    with pytest.raises(UserError, match=rf"{split} holds 5 images but no class folders"):
        load_dataset(config)


def test_images_of_every_type(folder, config):
    """Only the first frame of a file is used. It is black here."""
    fill(folder, 1)
    for i, suffix in enumerate(reader.SUFFIXES):
        pictures = [Image.new("RGB", (9, 9), (80 * k, 0, 0)) for k in range(3)]
        first = pictures[0].convert({".pgm": "L", ".pbm": "1"}.get(suffix, "RGB"))
        more = dict(save_all=True, append_images=pictures[1:])
        several = suffix in (".gif", ".tiff", ".webp", ".avif")
        suffix = suffix.upper() if i % 2 else suffix
        first.save(folder / "red" / f"new{i}{suffix}", **(more if several else {}))
    (folder / "red" / "phone.heic").write_bytes(b"x")
    (folder / "red" / "README").write_bytes(b"x")
    config.validation = 0
    dataset = load_dataset(config)
    images = np.concatenate([split.images for split in dataset.splits.values()])
    assert (images[:, 4, 4].max(-1) < 5).sum() == len(reader.SUFFIXES) == len(images) - 3
    assert dataset.left_out == {".heic": 1, "files without a suffix": 1}
    assert len(dataset.multi_frame_files) == 4
    assert "left out: .heic: 1, files without a suffix: 1" in dataset.describe()


def test_a_type_that_this_pillow_cannot_decode_is_left_out(monkeypatch, folder, config):
    fill(folder, 5)
    Image.new("RGB", (9, 9)).save(folder / "red" / "new.avif")
    monkeypatch.setattr(reader.features, "check", lambda name: name != "avif")
    assert load_dataset(config).left_out == {".avif, which this Pillow cannot decode": 1}


def test_hidden_and_system_folders_are_not_entered(folder, config):
    fill(folder, 5)
    for inside in ("red/.ipynb_checkpoints", "red/deep/@eaDir", "__MACOSX/red", ".cache"):
        (folder / inside).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / inside / "00-checkpoint.png")
    (folder / "red" / "._00.jpg").write_bytes(b"x")
    Image.new("RGB", (9, 9)).save(folder / "loose.png")
    dataset = load_dataset(config)
    assert sum(map(len, dataset.splits.values())) == 15
    assert dataset.left_out == {
        "hidden folders": 4,
        "hidden files": 1,
        "images outside the class folders": 1,
    }


def test_links_are_followed_and_each_file_counts_once(folder, config):
    fill(folder / "data", 5)
    fill(folder / "else", 3)
    config.dir, red = str(folder / "data"), folder / "data" / "red"
    os.symlink(folder / "else" / "red", red / "batch2")
    os.symlink(".", red / "loop")
    os.symlink("00.jpg", red / "again.jpg")
    os.link(red / "01.jpg", red / "hard.jpg")
    os.symlink("nowhere.jpg", red / "broken.jpg")
    os.symlink("nowhere", folder / "data" / "pink")
    dataset = load_dataset(config)
    assert sum(map(len, dataset.splits.values())) == 15 + 3
    assert dataset.left_out == {
        "broken links": 2,
        "folders that are linked twice": 1,
        "links to images that are already counted": 2,
    }
    os.symlink("../blue", red / "more")
    with pytest.raises(
        UserError, match=r"blue.00.jpg and .*more.00.jpg are the same file in two clas"
    ):
        load_dataset(config)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_in_two_splits_is_an_error_that_names_both(folder, config, link):
    fill(folder / "train", 2)
    fill(folder / "test", 1)
    link(folder / "train" / "red" / "01.jpg", folder / "test" / "red" / "02.jpg")
    with pytest.raises(
        UserError, match=r"red.0\d.jpg and .*red.0\d.jpg are the same file in two sp"
    ):
        load_dataset(config)


def test_files_that_a_network_drive_numbers_alike_are_not_one_file(folder, config, monkeypatch):
    fill(folder / "train", 2)
    fill(folder / "test", 1)
    entries = reader._find_images

    def alike(*given):
        return [image._replace(inode=7) for image in entries(*given)]

    status = os.stat(folder / "train" / "red" / "01.jpg")
    drive = types.SimpleNamespace(**vars(os) | {"stat": lambda path: status})
    monkeypatch.setattr(reader, "_find_images", alike)
    monkeypatch.setattr(reader, "os", drive)
    assert counts(load_dataset(config))["test"] == [1, 1, 1]


def test_the_way_to_the_folder_may_go_up_from_a_link(folder, config):
    fill(folder / "far" / "data", 5)
    (folder / "far" / "other").mkdir()
    os.symlink(folder / "far" / "other", folder / "link")
    config.dir = f"{folder}/link/../data/"
    assert sum(map(len, load_dataset(config).splits.values())) == 15


def test_a_folder_given_a_level_too_high_is_not_a_class(folder, config):
    fill(folder / "deep" / "flowers", 2)
    with pytest.raises(UserError, match=r"one class folder, .*did you mean data.dir=.*flowers\?"):
        load_dataset(config)
    fill(folder / "set" / "train", 2)
    with pytest.raises(UserError, match=r"not a class; did you mean data.dir=.*set\?"):
        load_dataset(config)


def test_splits_by_other_names_are_splits_and_each_is_there_once(folder, config):
    fill(folder / "Training", 4)
    fill(folder / "TEST", 2)
    (folder / "masks").mkdir()
    dataset = load_dataset(config)
    assert counts(dataset)["test"] == [2, 2, 2]
    assert dataset.left_out == {"folders that are not splits (masks)": 1}
    fill(folder / "testing", 1)
    with pytest.raises(UserError, match=r"TEST and .*testing are both the test split"):
        load_dataset(config)


def test_relative_paths_start_below_the_root(folder, config):
    """Equal relative paths show that a data set has only moved."""
    fill(folder / "train", 1)
    source = reader.read(f"{folder}/", "folder").sources["train"]
    assert source.relative_paths == ["train/blue/00.jpg", "train/green/00.jpg", "train/red/00.jpg"]


def test_folders_that_are_wrong(folder, config):
    with pytest.raises(UserError, match="holds no class folders"):
        load_dataset(config)
    fill(folder / "val", 1)
    with pytest.raises(UserError, match=r"has val but no train folder$"):
        load_dataset(config)
    fill(folder / "invalid", 1)
    with pytest.raises(UserError, match=r"no train folder; if invalid, val are classes, move them"):
        load_dataset(config)
    fill(folder / "train", 1)
    (folder / "val" / "pink").mkdir()
    with pytest.raises(UserError, match=r"pink: no class of that name"):
        load_dataset(config)
    (folder / "val" / "pink").rmdir()
    (folder / "train" / "white").mkdir()
    with pytest.raises(UserError, match=r"white holds no image"):
        load_dataset(config)
    config.dir = str(folder / "nowhere")
    with pytest.raises(UserError, match="is not a folder"):
        load_dataset(config)
    config.dir = ""
    with pytest.raises(UserError, match=r"needs data\.dir"):
        load_dataset(config)
