"""A user's own TFDS builders, prepared without network and TensorFlow if TFDS can."""

import importlib.util
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flax_cnns.data.load import load_dataset, read_fingerprint
from flax_cnns.data.readers import tfds as tfds_reader
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError

WITHOUT = importlib.util.find_spec("tensorflow") is None


class Stripes(tfds.core.GeneratorBasedBuilder):
    """Twenty 8x8 images to train and eight to test, yielded as PNG."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(names=["low", "high"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(8)}

    def _generate_examples(self, count):
        for row in range(count):
            png = io.BytesIO()
            Image.new("L", (8, 8), 10 * row).save(png, format="PNG")
            png.seek(0)
            yield row, {"image": png, "label": row % 2}


class BareStripes(Stripes):
    """Yields arrays, which only TensorFlow can encode."""

    def _generate_examples(self, count):
        for row in range(count):
            yield row, {"image": np.full((8, 8, 1), row, np.uint8), "label": row % 2}


class WideStripes(Stripes):
    """Declares images of 4x8."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 8, 1)),
            "label": tfds.features.ClassLabel(names=["low", "high"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


class BrokenStripes(Stripes):
    def _split_generators(self, dl_manager):
        raise FileNotFoundError("no photos in /nowhere")


@pytest.fixture
def config(config, tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("it tried to reach a network")

    monkeypatch.setattr(tfds_reader, "_reachable", no_network)
    config.dir, config.image_size, config.validation = str(tmp_path), 8, 0.0
    return config


def check(dataset):
    assert dataset.class_names == ("low", "high")
    assert {role: len(split) for role, split in dataset.splits.items()} == dict(train=20, test=8)
    images, labels = dataset.splits["test"].images, dataset.splits["test"].labels
    assert (images[:, 0, 0, 0] // 10 % 2 == labels).all()
    assert dataset.normalized_by == "training images"


def test_by_name_by_class_and_by_instance(config, tmp_path):
    config.name = "stripes"
    by_name = load_dataset(config)
    check(by_name)
    config.name, config.dir, config.image_size = "digits", "", 32
    given = Dataset.from_tfds(Stripes, data_dir=str(tmp_path / "class"), version="1.0.0")
    by_class = load_dataset(config, data=given)
    check(by_class)
    assert by_class.name == "stripes"
    assert read_fingerprint(config, given) == by_class.fingerprint
    assert by_class.fingerprint["builder"] == "stripes/1.0.0"
    given = Dataset.from_tfds(Stripes(data_dir=tmp_path / "instance"))
    with pytest.raises(UserError, match="stripes is not prepared in"):
        read_fingerprint(config, given)
    by_instance = load_dataset(config, data=given)
    check(by_instance)
    for other in (by_name, by_instance):
        np.testing.assert_array_equal(other.splits["train"].images, by_class.splits["train"].images)


def test_sizes_and_labels(config, tmp_path):
    config.validation, config.in_memory, where = 0.2, "no", dict(data_dir=str(tmp_path))
    dataset = load_dataset(
        config, data=Dataset.from_tfds(Stripes, image_size=16, channels=3, **where)
    )
    assert dataset.image_shape == (16, 16, 3)
    assert not dataset.in_memory
    assert dataset.is_decoded
    assert len(dataset.splits["validation"]) == 4
    with pytest.raises(UserError, match="stripes has no labels 'row'"):
        load_dataset(config, data=Dataset.from_tfds(Stripes, labels="row", **where))
    with pytest.raises(UserError, match=r"wide_stripes has images of 4x8, .*image_size="):
        load_dataset(config, data=Dataset.from_tfds(WideStripes, **where))
    config.mock = 10
    with pytest.raises(UserError, match=r"data\.mock does not apply to .* \(stripes\)"):
        load_dataset(config, data=Dataset.from_tfds(Stripes, **where))


@pytest.mark.skipif(not WITHOUT, reason="TensorFlow encodes them")
def test_what_needs_tensorflow_is_said(config, tmp_path):
    message = "needs TensorFlow to prepare bare_stripes .*, or let the builder yield encoded images"
    with pytest.raises(UserError, match=message):
        load_dataset(config, data=Dataset.from_tfds(BareStripes, data_dir=str(tmp_path)))


def test_errors_of_the_builder_are_lines(config, tmp_path):
    with pytest.raises(UserError, match=r"cannot prepare broken_stripes in .*no photos in"):
        load_dataset(config, data=Dataset.from_tfds(BrokenStripes, data_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"expected a tfds.core.DatasetBuilder, .*, got int"):
        Dataset.from_tfds(3)
    made = Stripes(data_dir=tmp_path)
    with pytest.raises(
        UserError, match="version, data_dir apply to a builder class, but this stripes is"
    ):
        Dataset.from_tfds(made, version="1.0.0", data_dir="x")
    with pytest.raises(UserError, match=r"image_size: expected a whole number .*, got -3"):
        Dataset.from_tfds(Stripes, image_size=-3)
    with pytest.raises(UserError, match=r"cannot make Stripes: .*unexpected keyword"):
        load_dataset(config, data=Dataset.from_tfds(Stripes, sise=3))
