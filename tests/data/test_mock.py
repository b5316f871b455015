"""Noise in place of a data set."""

import numpy as np
import pytest

from flax_cnns.data.load import load_dataset


def test_noise_of_some_classes(config):
    config.name, config.mock, config.classes, config.fraction = "cifar10", 40, ("cat", 0), 0.5
    dataset = load_dataset(config)
    assert dataset.class_names == ("cat", "airplane")
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=20, validation=8, test=8)
    assert list(np.bincount(dataset.splits["train"].labels)) == [10, 10]


@pytest.mark.parametrize(
    ("name", "labels", "classes", "channels"),
    [
        ("imagenet2012", "", 1000, 3),
        ("cifar10", "", 10, 3),
        ("cifar100", "coarse", 20, 3),
        ("cifar100", "fine", 100, 3),
        ("fashion_mnist", "", 10, 1),
        ("digits", "", 10, 1),
        ("folder", "", 10, 3),
    ],
)
def test_noise_in_place_of_any_data_set(config, tmp_path, name, labels, classes, channels):
    config.name, config.labels, config.mock, config.dir = name, labels, 20, str(tmp_path / "none")
    dataset = load_dataset(config)
    assert dataset.num_classes == len(dataset.class_names) == classes
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=20, validation=4, test=4)
    train = dataset.splits["train"]
    assert train.images.shape == (20, 32, 32, channels)
    assert train.images.dtype == np.uint8
    assert train.labels.max() < classes
    np.testing.assert_array_equal(train.images, load_dataset(config).splits["train"].images)
    assert not (tmp_path / "none").exists()
