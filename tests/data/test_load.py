"""Loading: memory or streaming, channels, and errors in the config."""

import numpy as np
import pytest

from flax_cnns.data import load
from flax_cnns.data.load import load_dataset
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.errors import UserError
from tests.data.sources import raw


def test_memory_limit_and_random_crops_decide_what_streams(monkeypatch, config):
    config.name, config.image_size = "own", 16
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    assert load_dataset(config).in_memory
    config.memory_limit = 60 * 16 * 16 * 3 / 2**30
    assert not load_dataset(config).in_memory

    config.memory_limit = 1.0
    config.augment.random_resized_crop = (0.2, 1.0)
    assert load_dataset(config).in_memory
    # For photos of all sizes, a crop of a reduced copy would be enlarged.
    monkeypatch.setattr(load, "_read", lambda config: raw((None, None, 3), train=50, test=10))
    dataset = load_dataset(config)
    assert not dataset.in_memory
    assert dataset.eval_share == 0.875


def test_data_sets_that_cannot_be_learned(monkeypatch, config):
    config.name, config.image_size = "own", 8

    def refused(raw, message):
        monkeypatch.setattr(load, "_read", lambda config: raw)
        with pytest.raises(UserError, match=message):
            load_dataset(config)

    given = raw(train=50, test=10)
    source = given.sources["train"]
    one = np.zeros(50, np.int32)
    same = {"train": ArraySource(source.images, one, "train")}
    refused(given._replace(sources=same), "1 of 2 classes have no training image: b")
    refused(given._replace(sources=same, num_classes=1, class_names=("a",)), "classes or more")
    for label in (-1, 2):
        labels = np.where(np.arange(50) == 7, label, source.labels)
        wrong = {"train": ArraySource(source.images, labels, "train")}
        refused(given._replace(sources=wrong), r"train, image 7: .*expected 0 to 1")
    dots = {"train": ArraySource(source.images[:, :0], source.labels, "train")}
    refused(given._replace(sources=dots), "own, train split: .* at least one pixel, got 0x8")
    refused(raw(train=50, test=0), "own, test split: expected at least one example, got none")


def test_channels(config):
    config.image_size, config.channels = 8, 3
    color = load_dataset(config)
    assert color.image_shape == (8, 8, 3)
    assert len(color.mean) == len(color.std) == 3
    images = color.splits["test"].images
    np.testing.assert_array_equal(images[..., 0], images[..., 2])


def test_gray_is_luma(monkeypatch, config):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    config.name, config.image_size, config.channels = "own", 8, 1
    gray = load_dataset(config).splits["test"].images
    color = raw(train=50, test=10).sources["test"].images
    np.testing.assert_allclose(gray[..., 0], color @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", "tdfs", "data.source: expected one of"),
        ("in_memory", "maybe", "data.in_memory: expected one of"),
        ("channels", 2, "data.channels: expected 0 .* 1 or 3, got 2"),
        ("validation", 1.5, "a fraction below 1, a count, or 0, got 1.5"),
        ("validation", -1.0, "a number of at least 0, got -1.0"),
        ("image_size", 0, "data.image_size"),
        ("fraction", 1.5, "data.fraction: expected a number above 0 and at most 1, got 1.5"),
        ("classes", (3, 10), r"digits has no class 10; it has 0 to 9"),
        ("classes", (3, "four"), r"digits has no class 'four'; known: 0, 1"),
        ("classes", (3,), "two classes or more"),
        ("classes", (3, 4, "3"), "each once"),
        ("name", "cifra10", "did you mean 'cifar10'"),
        ("labels", "lable", "digits has no labels 'lable'; did you mean 'label'"),
    ],
)
def test_values_that_make_no_sense(config, field, value, message):
    config[field] = value
    with pytest.raises(UserError, match=message):
        load_dataset(config)
