"""Soft labels, and pairs that blend."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from flax_cnns.data import mix
from flax_cnns.errors import UserError

IMAGES = np.random.default_rng(0).normal(size=(6, 2, 2, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 3, 0], np.int32)
KEY = jax.random.key(0)


def make(label_smoothing=0.0, mixup=0.0):
    return mix.make_mix(ConfigDict(dict(label_smoothing=label_smoothing, mixup=mixup)), 4)


def test_all_off_is_one_hot_and_leaves_the_images_alone():
    images, soft = make()(IMAGES, LABELS, KEY)
    assert images is IMAGES
    np.testing.assert_array_equal(soft, np.eye(4)[LABELS])


def test_label_smoothing():
    _, soft = make(label_smoothing=0.1)(IMAGES, LABELS, KEY)
    np.testing.assert_allclose(soft, np.eye(4)[LABELS] * 0.9 + 0.025, rtol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)


def test_mixup_blends_neighbours_by_one_weight():
    images, soft = jax.jit(make(mixup=0.4))(IMAGES, LABELS, KEY)
    weight = soft[0, 0]
    assert 0 < weight < 1
    partner = np.arange(6) ^ 1
    np.testing.assert_allclose(images, weight * IMAGES + (1 - weight) * IMAGES[partner], atol=1e-6)
    one_hot = np.eye(4)[LABELS]
    np.testing.assert_allclose(soft, weight * one_hot + (1 - weight) * one_hot[partner], atol=1e-6)


def test_mixup_on_two_devices_is_mixup_on_one():
    function = make(label_smoothing=0.1, mixup=1.0)
    images, soft = function(IMAGES[:4], LABELS[:4], KEY)
    halves = [function(IMAGES[i : i + 2], LABELS[i : i + 2], KEY) for i in (0, 2)]
    np.testing.assert_allclose(np.concatenate([h[0] for h in halves]), images, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([h[1] for h in halves]), soft, atol=1e-6)


def test_the_weight_is_beta_distributed():
    draw = jax.jit(jax.vmap(lambda key: make(mixup=0.5)(IMAGES, LABELS, key)[1][0, 0]))
    weights = np.asarray(draw(jax.random.split(KEY, 4000)))
    assert abs(weights.mean() - 0.5) < 0.03
    assert abs(weights.var() - 1 / (4 * (2 * 0.5 + 1))) < 0.01  # a^2 / ((2a)^2 (2a + 1))


def test_mixup_of_an_odd_batch_says_so():
    with pytest.raises(UserError, match="even number of images; got 5"):
        make(mixup=0.4)(IMAGES[:5], LABELS[:5], KEY)


@pytest.mark.parametrize("fields", [dict(label_smoothing=1.0), dict(mixup=-0.1)])
def test_values_that_make_no_sense(fields):
    with pytest.raises(UserError):
        make(**fields)
