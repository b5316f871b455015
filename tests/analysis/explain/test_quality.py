"""Measures of saliency maps: ROAD against pytorch-grad-cam, the others against NumPy."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from flax_cnns.analysis.explain import quality
from flax_cnns.errors import UserError
from tests.analysis.explain import make_road, make_trained
from tests.models import foreign


def test_imputed_pixels_are_those_of_pytorch_grad_cam():
    images, keep = make_road.make_cases()
    with np.load(make_road.PATH) as kept:
        wanted = kept["images"]
    found = quality.impute(images, keep, noise=0.0)
    np.testing.assert_array_equal(found[keep], images[keep])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(wanted[~keep] - images[~keep]).max() > 1


@pytest.mark.oracle
def test_the_record_is_what_pytorch_grad_cam_imputes():
    pytest.importorskip("torch")
    foreign.torchvision()
    pytest.importorskip("pytorch_grad_cam")
    with np.load(make_road.PATH) as kept:
        np.testing.assert_allclose(
            make_road.impute_by_pytorch_grad_cam(), kept["images"], atol=1e-6
        )


def test_imputation_of_a_plane_and_its_noise():
    """A plane is the weighted mean of its neighbors wherever the neighbors are symmetric."""
    y, x = np.mgrid[:12, :12]
    image = (2.0 * y - x)[None, :, :, None]
    keep = np.ones((1, 12, 12), bool)
    keep[0, 3:8, 2:9] = False
    np.testing.assert_allclose(quality.impute(image, keep, noise=0), image, atol=1e-5)
    noisy = quality.impute(image, keep, noise=0.5, seed=3)
    np.testing.assert_array_equal(noisy, quality.impute(image, keep, noise=0.5, seed=3))
    np.testing.assert_array_equal(noisy[keep], image[keep])
    assert np.std((noisy - image)[~keep]) == pytest.approx(0.5, rel=0.35)  # 35 pixels
    for wrong, message in ((keep & False, "at least one pixel to keep"), (keep[:, 1:], "got")):
        with pytest.raises(UserError, match=message):
            quality.impute(image, wrong)


class Pixels(nn.Module):
    """Logits of a dense layer on the pixels."""

    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Dense(3, name="head")(images.reshape(len(images), -1))


@pytest.fixture(scope="module")
def pixels():
    """(model, variables, images [2 6 5 2], maps [2 6 5] with equal values)"""
    images = jax.random.normal(jax.random.key(1), (2, 6, 5, 2))
    maps = np.random.default_rng(0).integers(0, 40, (2, 6, 5)) * 0.5
    return Pixels(), Pixels().init(jax.random.key(0), images), images, maps


def get_probability(variables, image, label):
    """Softmax of the dense layer, in NumPy."""
    head = variables["params"]["head"]
    logits = image.ravel() @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"])
    powers = np.exp(logits - logits.max())
    return powers[label] / powers.sum()


def change_pixels(variables, before, after, ranks, label, steps):
    """The area under the probability, pixel by pixel, with the trapezoid rule by hand."""
    curve = []
    for step in range(steps + 1):
        image = np.array(before, np.float64)
        for place in np.argwhere(ranks < round(ranks.size * step / steps)):
            image[tuple(place)] = after[tuple(place)]
        curve.append(get_probability(variables, image, label))
    return sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / steps


def test_deletion_and_insertion_equal_a_rewrite(pixels):
    model, variables, images, maps = pixels
    label, steps = 2, 7
    deleted = quality.deletion(model, variables, images, maps, label, steps=steps, fill=0.25)
    inserted = quality.insertion(model, variables, images, maps, label, steps=steps)
    ranks = quality.rank_pixels(maps)
    for i in range(2):
        image = np.asarray(images[i])
        order = np.argsort(ranks[i].ravel())
        assert (np.diff(maps[i].ravel()[order]) <= 0).all()
        fill = np.full(image.shape, 0.25)
        wanted = change_pixels(variables, image, fill, ranks[i], label, steps)
        assert deleted[i] == pytest.approx(wanted, rel=1e-5)
        sigma = 5 * 5 / 224
        soft = np.stack([ndimage.gaussian_filter(image[..., c], sigma) for c in (0, 1)], -1)
        wanted = change_pixels(variables, soft, image, ranks[i], label, steps)
        assert inserted[i] == pytest.approx(wanted, rel=1e-5)


def test_equal_pixels_are_sorted_at_random(pixels):
    ranks = quality.rank_pixels(np.zeros((2, 6, 5)))
    assert sorted(ranks[0].ravel()) == list(range(30))
    assert np.abs(np.corrcoef(ranks[0].ravel(), np.arange(30))[0, 1]) < 0.5
    np.testing.assert_array_equal(ranks, quality.rank_pixels(np.ones((2, 6, 5))))


def test_road_removes_the_most_or_the_least_relevant_pixels(pixels):
    model, variables, images, maps = pixels
    given = (model, variables, images, maps, 1)
    found = quality.road(*given, shares=(0.2, 0.5), noise=0.0)
    ranks = quality.rank_pixels(maps)
    for i in range(2):
        for values, order in zip(found, (ranks[i], 29 - ranks[i])):
            wanted = []
            for removed in (6, 15):
                keep = order >= removed
                filled = quality.impute(images[i : i + 1], keep[None], noise=0.0)[0]
                wanted.append(get_probability(variables, filled, 1))
            assert values[i] == pytest.approx(np.mean(wanted), rel=1e-5)
    np.testing.assert_allclose(found.gap, found.least_relevant_first - found.most_relevant_first)
    assert not np.allclose(quality.road(*given, shares=(0.2, 0.5), noise=0.5).gap, found.gap)
    with pytest.raises(UserError, match=r"shares: .*got \[0.5, 1.0\]"):
        quality.road(*given, shares=[0.5, 1.0])


def test_a_map_of_the_weights_beats_a_random_map():
    """The class's probability depends on four pixels of one color."""
    images = jnp.ones((8, 8, 8, 1)) + 0.01 * jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    kernel = np.zeros((64, 3), np.float32)
    kernel[[9, 20, 42, 53], 0] = 1.0
    variables = {"params": {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(3)}}}
    maps = np.tile(kernel[:, 0].reshape(8, 8), (8, 1, 1))
    given = (Pixels(), variables, images)
    other = quality.random_maps(images)
    assert (quality.deletion(*given, maps, 0) < quality.deletion(*given, other, 0)).all()
    fill = dict(fill=0.0)
    assert (
        quality.insertion(*given, maps, 0, **fill) > quality.insertion(*given, other, 0, **fill)
    ).all()


def test_edges_are_sobels():
    images = np.zeros((2, 5, 6, 3), np.float32)
    images[0, :, 3:] = 2.0
    edges, none = quality.edge_maps(images)
    assert not none.any()
    np.testing.assert_allclose(edges[2], [0, 0, 8, 8, 0, 0])  # 2 * (1 + 2 + 1)


def test_guided_backpropagation_depends_less_on_the_weights_than_the_gradient():
    """Adebayo et al. 2018, figure 2, and Nie et al. 2018: on a trained network with max pooling,
    the head and the whole cascade. The reasons are in `make_trained`."""
    found = make_trained.measure_similarity(("head", "conv4", "conv1"))
    assert list(found) == ["head", "conv4", "conv1"]
    for layer, row in found.items():
        assert row["difference"].n == 50
        assert row["difference"].low > 0, (layer, row)
    # The gradient depends on the weights: little of its map is left.
    assert found["conv1"]["gradient"].high < 0.3
