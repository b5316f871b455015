"""Predictions of each image: their order, crops, averages and metrics."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_cnns.errors import Interrupted, UserError
from flax_cnns.evaluation.predictions import Predictions, average, measure, predict_batches

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (10, 2, 2, 1), dtype=np.uint8)
LABELS = rng.integers(0, 3, 10)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(3, name="head")(images.reshape(len(images), -1))


@pytest.fixture(scope="module")
def variables():
    return Linear().init(jax.random.key(0), np.zeros((1, 2, 2, 1), np.float32))


def normalize(images):
    return images.astype(np.float32) / 255


def batches(images=IMAGES, size=4):
    """Batches of `size`, the last filled with images of mask 0; image 5 is damaged."""
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size)
        mask = (rows < len(images)) & (rows != 5)
        rows = np.where(mask, rows, 0)
        yield {"image": images[rows], "label": LABELS[rows], "mask": np.float32(mask)}


KEPT = [i for i in range(10) if i != 5]


def test_predictions_of_four_devices_are_in_order_and_without_masked_rows(variables):
    assert jax.device_count() == 4
    found = predict_batches(Linear(), variables, batches(), normalize=normalize)
    wanted = Linear().apply(variables, normalize(IMAGES[KEPT]))
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.labels, LABELS[KEPT])
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(wanted), rtol=1e-5)
    assert found.is_correct().tolist() == (np.argmax(wanted, -1) == LABELS[KEPT]).tolist()
    assert found.is_correct(3).all()


def test_a_transformation_gets_each_images_number(variables):
    def shift(images, numbers):
        return images + numbers[:, None, None, None].astype(np.uint8)

    found = predict_batches(Linear(), variables, batches(), normalize=normalize, transform=shift)
    moved = IMAGES + np.arange(10, dtype=np.uint8)[:, None, None, None]
    wanted = Linear().apply(variables, normalize(moved[KEPT]))
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["classes", "multilabel"])
def test_probabilities_that_are_zero_in_float32_leave_the_loss_finite(variables, task):
    def sharpen(images):
        return normalize(images) * 5000

    crops = np.stack([IMAGES, IMAGES], 1)
    found = predict_batches(Linear(), variables, batches(crops), normalize=sharpen, task=task)
    wanted = np.asarray(Linear().apply(variables, sharpen(IMAGES[KEPT])), np.float64)
    assert np.ptp(wanted, axis=-1).max() > 200  # exp(-200) is 0 in float32
    if task == "classes":
        wanted -= np.logaddexp.reduce(wanted, axis=-1, keepdims=True)
        assert np.isfinite(measure(found)["loss"])
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-5, atol=1e-2)
    both = average([found, found])
    np.testing.assert_allclose(both.logits, wanted, rtol=1e-5, atol=1e-2)


def test_the_probabilities_of_crops_are_averaged(variables):
    crops = np.stack([IMAGES, IMAGES[:, ::-1], IMAGES[:, :, ::-1]], 1)
    found = predict_batches(Linear(), variables, batches(crops), normalize=normalize)
    each = [Linear().apply(variables, normalize(crops[KEPT, v])) for v in range(3)]
    wanted = np.mean([jax.nn.softmax(logits) for logits in each], 0)
    np.testing.assert_allclose(found.probabilities, wanted, rtol=1e-5)
    options = dict(normalize=normalize, crops_per_step=7)  # 3 of 3
    together = predict_batches(Linear(), variables, batches(crops), **options)
    np.testing.assert_allclose(together.probabilities, wanted, rtol=1e-5)
    several = predict_batches(Linear(), variables, batches(crops), task="multilabel", **options)
    wanted = np.mean([jax.nn.sigmoid(logits) for logits in each], 0)
    np.testing.assert_allclose(several.probabilities, wanted, rtol=1e-5)


def test_averages_of_networks():
    members = [Predictions(rng.normal(size=(5, 3)).astype(np.float32), LABELS[:5]) for _ in "ab"]
    wanted = np.mean([each.probabilities for each in members], 0)
    np.testing.assert_allclose(average(members).probabilities, wanted, rtol=1e-5)
    logits = average(members, of="logits").logits
    np.testing.assert_allclose(logits, np.mean([each.logits for each in members], 0))
    several = [each._replace(task="multilabel", labels=np.eye(5, 3)) for each in members]
    wanted = np.mean([each.probabilities for each in several], 0)
    np.testing.assert_allclose(average(several).probabilities, wanted, rtol=1e-5)
    with pytest.raises(UserError, match="5 images x 3 classes cannot be averaged with 4 images"):
        average([members[0], Predictions(np.zeros((4, 3)), LABELS[:4])])
    with pytest.raises(UserError, match="labels differ"):
        average([members[0], members[1]._replace(labels=LABELS[:5] + 1)])
    with pytest.raises(UserError, match="expected probabilities or logits, got 'logit'"):
        average(members, of="logit")


def test_metrics_are_those_of_all_images_in_parts():
    logits = rng.normal(size=(10, 7)).astype(np.float32)
    predictions = Predictions(logits, LABELS)
    found = measure(predictions, chunk=4)
    assert found["accuracy"] == np.mean(np.argmax(logits, -1) == LABELS)
    assert found["top5"] == np.mean(predictions.is_correct(5))
    picked = np.log(predictions.probabilities)[np.arange(10), LABELS]
    assert found["loss"] == pytest.approx(-picked.mean(), rel=1e-5)


def test_no_images_and_an_interruption(variables):
    with pytest.raises(UserError, match="no images"):
        predict_batches(Linear(), variables, [])
    with pytest.raises(Interrupted):
        predict_batches(Linear(), variables, batches(), should_stop=lambda: True)
    with pytest.raises(UserError, match="multilabel data have no single true class"):
        Predictions(np.zeros((2, 3)), np.zeros((2, 3)), "multilabel").is_correct()


@pytest.mark.parametrize("k", [1, 3])
def test_the_rank_of_the_true_class_is_that_of_a_stable_sort(k):
    random = np.random.default_rng(0)
    logits = random.integers(0, 4, size=(500, 7)).astype(np.float32)  # many ties
    logits[::9, 2] = np.nan
    labels = random.integers(7, size=500)
    top = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    wanted = (top == labels[:, None]).any(-1)
    np.testing.assert_array_equal(Predictions(logits, labels).is_correct(k), wanted)
