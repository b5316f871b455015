"""Mean, standard deviation and covariance of colors."""

import numpy as np
import pytest

from flax_cnns.data import decode, load
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from tests.data.sources import raw


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_the_colors_covariance_is_made_where_pca_wants_it(monkeypatch, config, in_memory):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    config.name, config.image_size, config.in_memory = "own", 8, in_memory
    assert load_dataset(config).covariance == ()
    config.augment.pca = 0.1
    dataset = load_dataset(config)
    source = dataset.splits["train"].source
    images = dataset.splits["train"].images
    if images is None:
        images = np.stack([decode.read_example(source, i, 8, 3)[0] for i in range(len(source))])
    expected = np.cov(images.reshape(-1, 3).T / 255, bias=True)
    np.testing.assert_allclose(dataset.covariance, expected, rtol=1e-9)
    config.channels = 1
    assert np.shape(load_dataset(config).covariance) == (1, 1)


def test_statistics_of_an_unknown_data_set(monkeypatch, config):
    monkeypatch.setattr(load, "_read", lambda config: raw(train=50, test=10))
    config.name, config.validation, config.image_size = "own", 0, 8
    dataset = load_dataset(config)
    pixels = dataset.splits["train"].images.reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-9)
    assert dataset.normalized_by == "training images"
    config.in_memory = "no"
    assert load_dataset(config).normalized_by == "ImageNet"


def test_statistics_of_the_config(config):
    config.image_size, config.mean, config.std = 8, (0.25,), (0.5,)
    dataset = load_dataset(config)
    assert (dataset.mean, dataset.std, dataset.normalized_by) == ((0.25,), (0.5,), "config")
    config.mean = (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match="expected 1 or 1 numbers each"):
        load_dataset(config)
    config.channels = 3
    dataset = load_dataset(config)
    assert (dataset.mean, dataset.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
