"""The contract of every reader."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from configs.common import get_config
from flax_cnns import config as configs
from flax_cnns.data import load
from flax_cnns.data.decode import read_example
from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.errors import UserError


def make_folder(directory, config):
    config.name = "folder"
    for split, count in {"train": 5, "test": 2}.items():
        for i, name in enumerate(("arch", "bird")):
            (directory / split / name).mkdir(parents=True)
            for j in range(count):
                image = Image.new("RGB", (8, 8), (100 * i, 10 * j, 0))
                image.save(directory / split / name / f"{j}.png")


def make_archive(directory, config):
    config.name = "own"
    for name, count in {"train": 10, "t10k": 4}.items():
        labels = np.arange(count, dtype=np.uint8) % 2
        images = np.arange(64, dtype=np.uint8) * (1 + labels[:, None])
        head = struct.pack(">HBBIII", 0, 8, 3, count, 8, 8)
        (directory / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">HBBI", 0, 8, 1, count)
        (directory / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def make_tfds(directory, config):
    pass  # the config already names the digits


# Each writes a few images into `directory`, and sets the config to read them.
MAKERS = {"folder": make_folder, "archive": make_archive, "tfds": make_tfds}


def test_every_reader_is_tried():
    assert MAKERS.keys() == load.READERS.keys()


@pytest.mark.parametrize("source", ["auto", *load.READERS])
def test_a_config_may_choose_it(source):
    config = get_config()
    config.data.source = source
    configs.validate(config)


@pytest.mark.parametrize("source", load.READERS)
def test_a_reader(source, tmp_path, config):
    config.dir = config.dir if source == "tfds" else str(tmp_path)
    config.source, config.image_size, config.in_memory = source, 8, "yes"
    config.validation = 0
    MAKERS[source](tmp_path, config)
    held = load_dataset(config)
    config.in_memory = "no"
    streamed, again = load_dataset(config), load_dataset(config)

    assert list(held.splits) == ["train", "test", "validation"][: len(held.splits)]
    assert {k: len(v) for k, v in held.splits.items()} == {
        k: len(v) for k, v in streamed.splits.items()
    }
    assert len(held.class_names) == held.num_classes > 1
    assert not [note for note in held.notes if "classes have no training image" in note]
    for role, split in held.splits.items():
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        opened = streamed.splits[role].source
        if opened.labels is not None:
            np.testing.assert_array_equal(opened.labels, split.labels)
        ours = again.splits[role].source
        assert repr(opened) == repr(ours)  # Grain saves it
        rows = np.array([len(split) - 1, 0])
        for i in rows:
            image, label = read_example(opened, i, 8, held.image_shape[-1])
            for other in (ours, opened.fetch(rows)):  # in another process, and after fetching
                other_image, other_label = read_example(other, i, 8, held.image_shape[-1])
                np.testing.assert_array_equal(image, other_image)
                assert label == other_label
            assert 0 <= label < held.num_classes
            assert opened.location(i) == ours.location(i)
        assert opened.location(0) != opened.location(1)

    fingerprint = json.loads(json.dumps(held.fingerprint))
    assert fingerprint["reader"] == source
    assert fingerprint == held.fingerprint == streamed.fingerprint == read_fingerprint(config)
    assert set(held.fingerprint["splits"]) >= {"train", "test"}


@pytest.mark.parametrize("source", load.READERS)
def test_labels_that_it_does_not_have_are_refused(source, tmp_path, config):
    """The reader refuses unknown labels, or `data.labels` has no effect: see config/effects.py."""
    config.dir = config.dir if source == "tfds" else str(tmp_path)
    MAKERS[source](tmp_path, config)
    config.source, config.labels = source, "no_such_kind"
    whole = get_config()
    whole.data = config
    if "data.labels" not in configs.find_inert_fields(whole):
        with pytest.raises(UserError, match="labels 'no_such_kind'"):
            load_dataset(config)
