"""Black images that stand for a data set: its shapes, without memory and without files."""

from __future__ import annotations

import pytest

from configs.common import get_config
from flax_cnns.data.blank import make_blank_dataset


def make(num_classes=0, **fields):
    config = get_config().data
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return make_blank_dataset(config, num_classes)


def test_a_known_data_set():
    dataset = make(name="cifar100", image_size=32, validation=100)
    assert (dataset.num_classes, dataset.image_shape) == (100, (32, 32, 3))
    assert {role: len(split) for role, split in dataset.splits.items()} == {
        "train": 50000,
        "test": 50000,
        "validation": 50000,
    }
    assert dataset.in_memory  # the training step augments
    assert dataset.splits["train"].images.strides == (0, 0, 0, 0)  # one byte for all images
    assert "cifar100 was not read: assumed 100 classes, 50,000" in dataset.notes[0]
    assert make(name="mnist", image_size=28).image_shape == (28, 28, 1)
    assert make(name="mnist", image_size=28, channels=3).image_shape == (28, 28, 3)
    assert len(make(name="cifar10", fraction=0.1).splits["train"]) == 5000
    assert make(name="cifar10", classes=("cat", "dog")).num_classes == 2


def test_photographs_are_cropped_by_the_loader():
    crops = {"augment.random_resized_crop": (0.08, 1.0)}
    dataset = make(name="imagenet2012", image_size=224, **crops)
    assert (dataset.num_classes, len(dataset.splits["train"])) == (1000, 1281167)
    assert not dataset.in_memory
    assert make(name="imagenet2012_subset/10pct", image_size=64).in_memory
    assert not make(name="imagenet2012_subset/10pct", image_size=64, **crops).in_memory


@pytest.mark.parametrize("name", ["folder", "oxford_flowers102", "digits", "mine.npz"])
def test_an_unknown_data_set_needs_its_number_of_classes(name):
    assert make(name=name) is None
    dataset = make(37, name=name, image_size=96)
    assert dataset.num_classes == 37
    assert dataset.image_shape[:2] == (96, 96)
    assert len(dataset.splits["train"]) > 0


def test_colors_have_a_covariance_where_the_augmentation_needs_one():
    dataset = make(name="cifar10", **{"augment.pca": 0.1})
    assert len(dataset.covariance) == 3
