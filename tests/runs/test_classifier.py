"""A run's network and published weights, as classifiers of data sets."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from flax_cnns.data.images import center_box, read_box
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation.predictions import measure
from flax_cnns.runs import classifier as classifiers
from flax_cnns.runs.workdir import read_config
from flax_cnns.weights import preprocessing


def test_a_runs_predictions_have_the_metrics_of_its_summary(finished):
    classifier = classifiers.make_classifier_from_run(finished[0])
    found = classifiers.predict_split(classifier)
    test = load_dataset(read_config(finished[0]).data).splits["test"]
    np.testing.assert_array_equal(found.labels, test.labels)
    summary = json.loads((finished[0] / "summary.json").read_text())
    metrics = measure(found)
    assert metrics["accuracy"] == summary["test/accuracy"]
    assert metrics["loss"] == pytest.approx(summary["test/loss"], rel=1e-5)
    with pytest.raises(UserError, match="no split 'tst'; did you mean 'test'"):
        classifiers.predict_split(classifier, "tst")


def test_a_reader_of_two_crops_reads_arrays_and_files_alike(finished):
    classifier = classifiers.make_classifier_from_run(finished[0], from_files=True)
    dataset = classifier.dataset

    def twice(image):
        return np.stack([read_box(image, center_box, 32, 1)] * 2)

    wanted = classifiers.predict_split(classifier)
    found = classifiers.predict_split(classifier, reader=twice)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-5)
    assert dataset.splits["test"].source is not None
    in_memory = classifiers.make_classifier_from_run(finished[0])
    found = classifiers.predict_split(in_memory, reader=twice)
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-5)


def test_a_librarys_reader_and_normalization_are_its_preprocessing(tmp_path):
    Image.effect_noise((260, 300), 80).convert("RGB").save(tmp_path / "noise.png")
    row = preprocessing("keras_resnet50", "keras")
    with Image.open(tmp_path / "noise.png") as image:
        pixels = classifiers.LibraryReader(row)(image)
    assert pixels.dtype == np.uint8
    scaling = classifiers.LibraryScaling(row.mean, row.std, row.scale, row.channels == "BGR")
    wanted = row(tmp_path / "noise.png")[0]
    np.testing.assert_allclose(scaling(pixels.astype(np.float32) / 255), wanted, atol=1e-3)


def test_a_batch_of_crops_has_about_as_many_rows_as_a_batch_of_images():
    assert jax.device_count() == 4
    assert classifiers.divide_batch(256, 10) == (24, 10)
    assert classifiers.divide_batch(256, 144) == (4, 64)
    assert classifiers.divide_batch(8, 144) == (4, 2)
