"""A config of the data alone, and the prepared digits, made once."""

import pytest

from configs.common import get_config


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A TFDS data_dir in which the first test to load the digits prepares them."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def config(digits_dir):
    data = get_config().data
    data.dir = digits_dir
    data.threads = 2
    data.augment.pad_crop = 0
    return data
