"""Selecting classes of a data set, by name or number."""

import numpy as np
import pytest

from flax_cnns.data import decode, load
from flax_cnns.data.load import load_dataset
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import RawDataset
from flax_cnns.errors import UserError
from tests.data.sources import raw


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_some_classes_are_a_data_set_of_their_own(monkeypatch, config, in_memory):
    """Three of 100 classes in a new order. The name of a class is its number squared."""
    labels = np.arange(400, dtype=np.int32) % 100
    images = np.tile(labels.astype(np.uint8)[:, None, None, None], (1, 8, 8, 1))
    source = ArraySource(images, labels, "train")
    names = tuple(str(i**2) for i in range(100))
    monkeypatch.setattr(
        load, "_read", lambda c: RawDataset({"train": source}, 100, names, (8, 8, 1))
    )
    config.name, config.in_memory, config.image_size, config.validation = "own", in_memory, 8, 3
    config.classes = ("2500", "16", 8)
    dataset = load_dataset(config)
    assert (dataset.num_classes, dataset.class_names) == (3, ("2500", "16", "64"))
    counts = {name: len(split) for name, split in dataset.splits.items()}
    assert counts == {"train": 7, "validation": 3, "test": 2}
    for split in dataset.splits.values():
        for i, label in enumerate(split.labels):
            image = (
                split.images[i]
                if in_memory == "yes"
                else decode.read_example(split.source, i, 8, 1)[0]
            )
            assert image[0, 0, 0] == (50, 4, 8)[label]  # images are filled with their class number


def test_a_number_that_is_the_name_of_another_class_is_ambiguous(monkeypatch, config):
    named = raw(train=50, test=10)._replace(num_classes=3, class_names=("1", "10", "2"))
    monkeypatch.setattr(load, "_read", lambda config: named)
    config.name, config.image_size, config.classes = "own", 8, (0, 1)
    with pytest.raises(UserError, match=r"1 is ambiguous: .* named '1', and number 1 is '10'"):
        load_dataset(config)
    # An existing run took numbers, and its config cannot change.
    dataset = load_dataset(config, begun=True)
    assert dataset.class_names == ("1", "10")
    assert "1 is ambiguous" in "".join(dataset.describe())
    config.classes = (0, 10)
    with pytest.raises(UserError, match=r"10 is ambiguous: .* and no class number 10; give names"):
        load_dataset(config, begun=True)
    config.classes = ("1", "10")
    assert load_dataset(config).class_names == ("1", "10")


def test_classes_that_a_split_lacks(monkeypatch, config):
    """The accuracy over zero images is undefined."""
    of = lambda *labels: ArraySource(  # noqa: E731
        np.zeros((len(labels), 8, 8, 1), np.uint8), np.array(labels, np.int32), "some"
    )
    sources = {"train": of(0, 1, 2, 1, 2), "test": of(0, 0)}
    names = ("cat", "dog", "frog")
    monkeypatch.setattr(load, "_read", lambda c: RawDataset(sources, 3, names, (8, 8, 1)))
    config.name, config.image_size, config.classes = "own", 8, ("dog", "frog")
    with pytest.raises(UserError, match=r"data.classes: the test split of own .* dog, frog"):
        load_dataset(config)


def test_classes_of_a_source_that_does_not_know_its_labels(config):
    config.image_size = 8
    whole = load_dataset(config)
    config.classes = ("7", 1)
    dataset = load_dataset(config)

    def images(dataset, label):
        splits = dataset.splits.values()
        every = [image for split in splits for image in split.images[split.labels == label]]
        return sorted(image.tobytes() for image in every)

    assert dataset.class_names == ("7", "1")
    assert (images(dataset, 0), images(dataset, 1)) == (images(whole, 7), images(whole, 1))
