"""The strongest images of a unit, their patches, and the deconvnet's picture of one activation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cnns import layers
from flax_cnns.analysis.explain import backward_rules, gradients
from flax_cnns.analysis.explain.targets import Feature
from flax_cnns.analysis.explain.top_units import cut_patches, find_top_images
from flax_cnns.analysis.receptive_field import ReceptiveField, find_receptive_fields
from flax_cnns.errors import UserError

PATTERN = np.array([[1, -1, 1], [-1, 2, -1], [1, -1, 1]], np.float32)  # |PATTERN|^2 = 12


class Detector(nn.Module):
    """One convolution of stride 2 and padding 1, and a ReLU."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(2, (3, 3), 2, padding=1, use_bias=False, name="conv")(images)
        return nn.Dense(2, name="head")(nn.relu(x).mean((1, 2)))


def _plant(places):
    """Images 9x9 with the pattern at (row, column) of its upper left pixel, and its strength."""
    images = np.zeros((len(places), 11, 11, 1), np.float32)
    for image, (row, column, strength) in zip(images, places):
        image[row + 1 : row + 4, column + 1 : column + 4, 0] = strength * PATTERN
    return images[:, 1:-1, 1:-1]


@pytest.fixture(scope="module")
def detector():
    kernel = np.stack([PATTERN, -PATTERN], -1)[:, :, None]
    head = {"kernel": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    return Detector(), {"params": {"conv": {"kernel": kernel}, "head": head}}


def test_a_planted_pattern_is_found_at_its_place(detector):
    """The map's position (i, j) sees rows 2 i - 1 to 2 i + 1: patterns at odd places fit exactly,
    and the one at -1 lies partly in the padding."""
    images = _plant([(1, 3, 1.0), (5, 5, 3.0), (3, 1, 2.0), (5, 1, 2.0), (-1, 3, 3.0), (0, 0, 9.0)])
    mask = np.array([1, 1, 1, 1, 1, 0])  # the strongest one only fills the batch
    batches = [(images[:3], mask[:3]), (images[3:], mask[3:])]
    (top,) = find_top_images(*detector, batches, "conv", [0], count=3)
    # At (-1, 3), 6 pixels are inside: the squares' sum is 3 * (1 + 4 + 1 + 1 + 1 + 1) = 27.
    assert top.numbers.tolist() == [1, 4, 2]  # 2 and 3 are equally strong: the earlier one
    np.testing.assert_allclose(top.activations, [36, 27, 24], rtol=1e-6)
    assert top.positions.tolist() == [[3, 3], [0, 2], [2, 1]]
    np.testing.assert_array_equal(top.images, images[[1, 4, 2]])
    field = find_receptive_fields(*detector, images)["conv"]
    assert field == ReceptiveField(size=(3, 3), stride=(2, 2), start=(-1, -1))
    patches = cut_patches(top.images, top.positions, field)[..., 0]
    np.testing.assert_array_equal(patches[0], 3 * PATTERN)
    np.testing.assert_array_equal(patches[2], 2 * PATTERN)
    np.testing.assert_array_equal(patches[1], np.r_[[[0.5] * 3], 3 * PATTERN[1:]])  # gray


def test_the_strongest_images_are_those_of_all_activations_sorted(detector):
    images = jax.random.normal(jax.random.key(0), (23, 9, 9, 1)).round(1)  # with ties
    wanted = nn.Conv(2, (3, 3), 2, padding=1, use_bias=False).apply(
        {"params": detector[1]["params"]["conv"]}, images
    )
    tops = find_top_images(*detector, [images[:8], images[8:16], images[16:]], "conv", [1, 0])
    for top in tops:
        best = np.asarray(wanted[..., top.unit]).max((1, 2))
        order = sorted(range(23), key=lambda i: (-best[i], i))[:9]
        assert top.numbers.tolist() == order
        np.testing.assert_allclose(top.activations, best[order], rtol=1e-5)
    (few,) = find_top_images(*detector, [images[:2]], "head", [1])
    assert (len(few.numbers), few.positions.tolist()) == (2, [[0, 0], [0, 0]])


def test_a_field_larger_than_the_image_shows_the_image():
    images = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    field = ReceptiveField((2, 7), (2, 2), (0, -3))
    patch = cut_patches(images, np.array([[1, 0]]), field)
    np.testing.assert_array_equal(patch, images[:, 2:4])
    np.testing.assert_array_equal(cut_patches(images, np.array([[0, 0]]), None), images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: find_top_images(*d, [np.ones((1, 9, 9, 1))], "conv", [2]), "2 is out .* 0 to 1"),
        (lambda d: find_top_images(*d, [], "conv", [0]), "at least one image"),
        (
            lambda d: find_top_images(*d, [np.full((1, 9, 9, 1), np.nan)], "conv", [0]),
            "'conv' is not finite",
        ),
        (
            lambda d: backward_rules.deconvnet(*d, jnp.ones((1, 9, 9, 1)), Feature("con", 0)),
            "no module 'con'; did you mean 'conv'",
        ),
        (
            lambda d: gradients.gradient(
                *d, jnp.ones((1, 9, 9, 1)), Feature("conv", 0, np.array([[5, 0]]))
            ),
            "rows and columns in maps of 5x5",
        ),
    ],
)
def test_what_cannot_be_found_is_one_line(detector, call, message):
    with pytest.raises(UserError, match=message) as raised:
        call(detector)
    assert "\n" not in str(raised.value)


class Deep(nn.Module):
    """Two convolutions with ReLU and max pooling."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(nn.Conv(3, (3, 3), padding="VALID", name="conv1")(images))
        x = layers.max_pool(x, 2, 2)
        x = nn.relu(nn.Conv(3, (3, 3), padding=1, name="conv2")(x))
        return nn.Dense(2, name="head")(nn.gelu(x).mean((1, 2)))


def test_the_deconvnets_picture_of_an_activation():
    """By hand in NumPy: filters, switches and ReLUs of the backward signal. It is zero where the
    unit does not see, and the GELU above the unit does not matter."""
    images = jax.random.normal(jax.random.key(0), (1, 12, 12, 2))
    variables = Deep().init(jax.random.key(1), images)
    positions = np.array([[2, 3]])
    goal = Feature("conv2", 1, positions)
    found = np.asarray(backward_rules.deconvnet(Deep(), variables, images, goal))[0]
    first, second = (np.asarray(variables["params"][f"conv{n}"]["kernel"]) for n in (1, 2))
    below = np.asarray(
        nn.Conv(3, (3, 3), padding="VALID").apply({"params": variables["params"]["conv1"]}, images)
    )[0]  # [10 10 3]
    pooled = np.zeros((7, 7, 3))  # the signal on the padded maps of 5x5
    pooled[2:5, 3:6] = second[..., 1]
    pooled = pooled[1:-1, 1:-1]
    wanted = np.zeros((12, 12, 2))
    for i, j, k in np.ndindex(5, 5, 3):
        window = np.maximum(below[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, k], 0)
        row, column = np.unravel_index(window.argmax(), (2, 2))  # the switch
        signal = max(pooled[i, j, k], 0)
        top, left = 2 * i + row, 2 * j + column
        wanted[top : top + 3, left : left + 3] += signal * first[..., k]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    field = find_receptive_fields(Deep(), variables, images)["conv2"]
    rows, columns = (
        np.arange(n)[start + at * stride :][:size]
        for n, start, at, stride, size in zip(
            (12, 12), field.start, positions[0], field.stride, field.size
        )
    )
    inside = np.zeros((12, 12), bool)
    inside[np.ix_(rows, columns)] = True
    assert np.abs(found[inside]).max() > 0
    assert not found[~inside].any()
    assert not inside.all()
