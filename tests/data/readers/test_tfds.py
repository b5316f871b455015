"""Stock TFDS data sets: prepared ones are read without TensorFlow, others raise a clear error."""

import io
import socket
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flax_cnns.data import decode, splits
from flax_cnns.data.load import load_dataset
from flax_cnns.data.readers import tfds as tfds_reader
from flax_cnns.data.readers.tfds import TfdsSource
from flax_cnns.data.types import WrongLabel
from flax_cnns.errors import UserError


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Twelve images of several sizes, two kinds of labels, and an unlabeled test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["dark", "light"]),
                    "row": tfds.features.ClassLabel(num_classes=12),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(True),
            "validation": self._generate_examples(True),
            "test": self._generate_examples(False),
        }

    def _generate_examples(self, labeled):
        for row in range(12):
            png = io.BytesIO()
            Image.new("RGB", (10 + row, 16), (20 * row,) * 3).save(png, format="PNG")
            png.seek(0)
            yield (
                row,
                {
                    "image": png,
                    "label": row // 6 if labeled else -1,
                    "row": row if labeled else -1,
                },
            )


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    with tfds_reader._quiet():
        builder = tfds.builder("shapes", data_dir=path, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    return str(path)


def test_a_prepared_data_set(config, shapes_dir):
    config.name, config.dir, config.image_size, config.validation = "shapes", shapes_dir, 8, 2
    dataset = load_dataset(config)
    # As for ImageNet: the labels of test are hidden, so validation serves as test.
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=10, validation=2, test=12)
    assert dataset.class_names == ("dark", "light")
    test = dataset.splits["test"]
    np.testing.assert_array_equal(test.labels, test.images[:, 4, 4, 0] >= 120)
    assert np.bincount(dataset.splits["validation"].labels).tolist() == [1, 1]

    config.labels = "row"
    test = load_dataset(config).splits["test"]
    np.testing.assert_array_equal(20 * test.labels, test.images[:, 4, 4, 0])


def test_streamed_it_is_the_same(config, shapes_dir):
    config.name, config.dir, config.image_size, config.validation = "shapes", shapes_dir, 8, 2
    config.in_memory = "no"
    dataset = load_dataset(config)
    assert {k: len(v) for k, v in dataset.splits.items()} == dict(train=10, validation=2, test=12)
    image, label = dataset.splits["test"].source.open(0)
    assert label == (np.asarray(image)[0, 0, 0] >= 120)


class Records(list):
    def __getitems__(self, rows):
        return [self[row] for row in rows]


def test_labels_out_of_range_are_named_and_never_skipped(config):
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, format="PNG")
    records = [{"image": png.getvalue(), "label": label} for label in (0, 1, -1, 12)]
    source = TfdsSource(Records(records), "image", "label", "shapes train", num_classes=2)
    assert decode.read_example(source, 1, 4, 3)[1] == 1
    for i, problem in ((2, "it has no label"), (3, "its label is 12")):
        with pytest.raises(WrongLabel, match=rf"shapes train, example {i}: {problem}.* 0 to 1"):
            decode.read_example(source, i, 4, 3)
    for read in (
        lambda: decode.read_all(source, 4, 3, share=1.0, threads=2, skip_damaged=True),
        lambda: decode.read_labels(source),
        lambda: splits.check_decodes("train", source, skip_damaged=True),
    ):
        with pytest.raises(WrongLabel):
            read()


def test_a_split_without_labels_is_counted_as_left_out(config, shapes_dir):
    config.name, config.dir, config.image_size, config.validation = "shapes", shapes_dir, 8, 2
    assert load_dataset(config).left_out == {"test split, which has no labels": 1}


def test_no_network_is_reported_within_ten_seconds(config, tmp_path):
    # Nothing is simulated here.
    if tfds_reader._reachable("www.cs.toronto.edu"):
        pytest.skip("there is a network")
    config.name, config.dir = "cifar10", str(tmp_path)
    start = time.time()
    with pytest.raises(UserError, match=r"cannot be reached.*cifar-10-python\.tar\.gz"):
        load_dataset(config)
    assert time.time() - start < 10


@pytest.mark.parametrize("hangs", [True, False])
def test_no_network_whether_the_resolver_hangs_or_fails(monkeypatch, config, tmp_path, hangs):
    def resolve(*args, **kwargs):
        if hangs:
            time.sleep(30)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(tfds_reader, "NETWORK_TIMEOUT", 0.3)
    config.name, config.dir = "cifar10", str(tmp_path)
    start = time.time()
    with pytest.raises(UserError, match=r"www.cs.toronto.edu cannot be reached: prepare it"):
        load_dataset(config)
    assert time.time() - start < 5


def test_with_a_network_tensorflow_is_asked_for(monkeypatch, config, tmp_path):
    monkeypatch.setattr(tfds_reader, "_reachable", lambda host: True)
    monkeypatch.setattr(tfds_reader.importlib.util, "find_spec", lambda name: None)
    config.name, config.dir = "cifar10", str(tmp_path)
    with pytest.raises(UserError, match=r"pip install 'flax_cnns\[prepare\]'"):
        load_dataset(config)


def test_the_error_of_a_failed_download_is_one_line(monkeypatch, config, tmp_path):
    def fail(self, **kwargs):
        raise RuntimeError("first\n\n   second")

    monkeypatch.setattr(tfds_reader, "_reachable", lambda host: True)
    monkeypatch.setattr(tfds_reader.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    config.name, config.dir = "cifar10", str(tmp_path)
    with pytest.raises(UserError, match=r"TFDS cannot prepare cifar10 in .*: first second$"):
        load_dataset(config)


def test_a_proxy_is_what_must_be_reached(monkeypatch):
    builder = tfds_reader._find_builder("cifar10", "none")
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert tfds_reader._download_host(builder) == "www.cs.toronto.edu"
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    assert tfds_reader._download_host(builder) == "proxy.example:3128"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imdb_reviews", "has no feature with one image per example; it has: text, label"),
        ("cifar10:9.9.9", "TFDS has no 'cifar10:9.9.9'"),
        ("cifar1", "unknown data set 'cifar1'"),
    ],
)
def test_names_that_tfds_does_not_have(config, tmp_path, name, message):
    config.name, config.dir = name, str(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_dataset(config)
    assert "\n" not in str(error.value)
