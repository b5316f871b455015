"""The config of data tests: `config.data`, with the digits."""

import pytest

from configs.common import get_config


@pytest.fixture
def config(digits_dir):
    data = get_config().data
    data.dir = digits_dir
    data.threads = 2
    data.augment.pad_crop = 0
    return data
