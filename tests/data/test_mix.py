"""Label smoothing, mixup and cutmix."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from flax_cnns.data import mix
from flax_cnns.errors import UserError

IMAGES = np.random.default_rng(0).normal(size=(6, 2, 2, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 3, 0], np.int32)
KEY = jax.random.key(0)


def make(**fields):
    off = dict(label_smoothing=0.0, mixup=0.0, cutmix=0.0)
    return mix.make_mix(ConfigDict(off | fields), 4)


def test_all_off_is_one_hot_and_leaves_the_images_alone():
    images, soft = make()(IMAGES, LABELS, KEY)
    assert images is IMAGES
    np.testing.assert_array_equal(soft, np.eye(4)[LABELS])


def test_label_smoothing():
    _, soft = make(label_smoothing=0.1)(IMAGES, LABELS, KEY)
    np.testing.assert_allclose(soft, np.eye(4)[LABELS] * 0.9 + 0.025, rtol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)


def test_mixup_blends_neighbors_by_one_weight():
    images, soft = make(mixup=0.4)(IMAGES, LABELS, KEY)
    weight = soft[0, 0]
    assert 0 < weight < 1
    partner = np.arange(6) ^ 1
    np.testing.assert_allclose(images, weight * IMAGES + (1 - weight) * IMAGES[partner], atol=1e-6)
    one_hot = np.eye(4)[LABELS]
    np.testing.assert_allclose(soft, weight * one_hot + (1 - weight) * one_hot[partner], atol=1e-6)


@functools.cache  # a draw from Beta compiles for a second
def draw_both(count=6000, height=9, width=6):
    """Draws many batches of two images, one of 0 and one of 1, with mixup and cutmix on. Returns
    (the batches that mixup blended, the others), each as (images, weights of their own labels)."""
    function = make(mixup=0.5, cutmix=1.0)
    images = np.broadcast_to(np.arange(2.0)[:, None, None, None], (2, height, width, 1))
    draw = jax.jit(jax.vmap(lambda key: function(images.astype(np.float32), np.arange(2), key)))
    images, soft = draw(jax.random.split(KEY, count))
    images, own = np.asarray(images[..., 0]), np.asarray(soft[:, 0, 0])
    blended = ((images > 0) & (images < 1)).any((1, 2, 3))
    return (images[blended], own[blended]), (images[~blended], own[~blended])


def test_cutmix_puts_one_box_of_the_neighbor_and_weighs_labels_by_its_area():
    images, own = (array[:200] for array in draw_both()[1])
    np.testing.assert_array_equal(images[:, 1], 1 - images[:, 0])  # the same box in both
    foreign = images[:, 0] == 1
    assert (foreign | (images[:, 0] == 0)).all()  # nothing is blended
    np.testing.assert_allclose(own, 1 - foreign.mean((1, 2)), atol=1e-6)
    for box in foreign:  # it is one rectangle
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        whole = np.zeros_like(box)
        if len(rows):
            whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(box, whole)
    everywhere = foreign.mean(0)
    assert everywhere.min() > 0.05
    assert len(np.unique(own)) > 20


def test_cutmix_of_a_box_that_is_not_cut_off_has_the_drawn_area():
    draw = jax.jit(jax.vmap(lambda key: mix.cutmix_weights(key, 50.0, 200, 100)))
    pixels, share = draw(jax.random.split(KEY, 100))
    inside = [box for box in np.asarray(pixels)[..., 0] if box[0].all() and box[:, 0].all()]
    inside = [box for box in inside if box[-1].all() and box[:, -1].all()]
    assert len(inside) > 2
    # Beta(50, 50) is close to 1/2, so the sides are close to sqrt(1/2).
    np.testing.assert_allclose(np.mean([(box == 0).mean() for box in inside]), 0.5, atol=0.05)
    box = inside[0]
    assert np.isclose((box == 0).any(1).mean(), (box == 0).any(0).mean(), atol=0.02)
    assert (np.asarray(share) >= 0.35).all()
    # Sides may be odd, as in timm; in the authors' code they are even.
    whole = [box for box in np.asarray(pixels)[..., 0] if box[0].all() and box[-1].all()]
    heights = [(box == 0).any(1).sum() for box in whole]
    assert {int(height) % 2 for height in heights} == {0, 1}


def test_mixup_and_cutmix_take_turns():
    (images, own), (others, _) = draw_both()
    assert 0.45 < len(images) / (len(images) + len(others)) < 0.55
    np.testing.assert_allclose(
        1 - images[:, 0], np.broadcast_to(own[:, None, None], (len(own), 9, 6)), atol=1e-5
    )


@pytest.mark.parametrize("fields", [dict(mixup=1.0), dict(cutmix=1.0), dict(mixup=1.0, cutmix=1.0)])
def test_mixing_on_two_devices_is_mixing_on_one(fields):
    function = make(label_smoothing=0.1, **fields)
    images, soft = function(IMAGES[:4], LABELS[:4], KEY)
    halves = [function(IMAGES[i : i + 2], LABELS[i : i + 2], KEY) for i in (0, 2)]
    if "mixup" not in fields:  # each pixel is the image's own or the neighbor's
        pair = IMAGES[:4], IMAGES[[1, 0, 3, 2]]
        assert ((images == pair[0]) | (images == pair[1])).all()
    np.testing.assert_allclose(np.concatenate([h[0] for h in halves]), images, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([h[1] for h in halves]), soft, atol=1e-6)


def test_the_weight_is_beta_distributed():
    weights = draw_both()[0][1]
    assert abs(weights.mean() - 0.5) < 0.03
    assert abs(weights.var() - 1 / (4 * (2 * 0.5 + 1))) < 0.01  # a^2 / ((2a)^2 (2a + 1))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_an_odd_batch_cannot_be_paired(name):
    with pytest.raises(UserError, match="even number of images; got 5"):
        make(**{name: 0.4})(IMAGES[:5], LABELS[:5], KEY)


@pytest.mark.parametrize("fields", [dict(label_smoothing=1.0), dict(mixup=-0.1), dict(cutmix=-1.0)])
def test_values_that_make_no_sense(fields):
    with pytest.raises(UserError):
        make(**fields)
