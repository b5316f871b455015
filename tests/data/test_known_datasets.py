"""Published facts about data sets, compared with TFDS's own descriptions."""

import pytest
import tensorflow_datasets as tfds

from flax_cnns.data.known_datasets import KNOWN_DATASETS
from flax_cnns.data.load import load_dataset


@pytest.mark.parametrize("name", KNOWN_DATASETS)
def test_a_row_fits_the_data_set(config, name):
    config.name, config.mock = name, 10
    dataset, known = load_dataset(config), KNOWN_DATASETS[name]
    assert dataset.num_classes == known.classes
    assert len(known.mean) == len(known.std) == dataset.image_shape[-1]
    assert all(0 < mean < 1 and 0 < std < 0.5 for mean, std in zip(known.mean, known.std))
    theirs = tfds.builder(name, data_dir=config.dir).info.features["label"].names
    if known.class_names and theirs[:2] != ["0", "1"]:
        assert known.class_names == tuple(theirs)
    assert len(dataset.class_names) == known.classes
