"""Augmentation: its effects on an image, and its dependence on keys."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from flax_cnns.data import augment
from flax_cnns.errors import UserError

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SHAPE = (12, 10, 3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = np.random.default_rng(0).integers(0, 256, (16, *SHAPE), np.uint8)
KEYS = jax.random.split(jax.random.key(0), len(IMAGES))
ALL = dict(
    **dict(pad_crop=2, flip=True, rotate=20.0, scale=0.2, random_resized_crop=(0.2, 1.0), cutout=4),
    **dict(erase=0.5, randaugment=(1, 9), pca=0.1),
)
ERASE = dict(erase=0.5)
COVARIANCE = np.array([[0.06, 0.05, 0.04], [0.05, 0.06, 0.05], [0.04, 0.05, 0.07]])


def make(cropped=False, shape=SHAPE, **fields):
    config = get_config().data.augment
    with config.unlocked():
        config.update(fields)
    channels = shape[-1]
    return augment.make_augment(
        config,
        image_shape=shape,
        mean=MEAN[:channels],
        std=STD[:channels],
        covariance=COVARIANCE[:channels, :channels],
        cropped=cropped,
    )


@cache
def plain(**fields):
    """Returns an augmentation without normalization, with pixels in 0..255."""
    function = quick_jit(make(normalize=False, **fields))
    return lambda images=IMAGES, keys=KEYS: np.asarray(function(images, keys) * 255)


def test_all_off_is_normalization_exactly():
    normalize = augment.make_normalize(get_config().data.augment, mean=MEAN, std=STD)
    np.testing.assert_array_equal(make()(IMAGES, KEYS), normalize(IMAGES))
    np.testing.assert_allclose(normalize(IMAGES), (IMAGES / 255 - MEAN) / STD, atol=1e-5)
    np.testing.assert_allclose(plain()(), IMAGES, atol=1e-4)


def test_pad_crop_moves_by_whole_pixels_and_leaves_black():
    moved = np.round(plain(pad_crop=2)()).astype(np.uint8)
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    shifts = set()
    for image, big in zip(moved, padded):
        at = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(image, big[y : y + 12, x : x + 10])
        ]
        assert len(at) == 1
        shifts.add(at[0])
    assert len(shifts) > 8  # of 25, for 16 images


def test_flip_is_left_right_half_of_the_time():
    keys = jax.random.split(jax.random.key(1), 400)
    images = np.repeat(IMAGES[:1], 400, axis=0)
    flipped = np.round(plain(flip=True)(images, keys))
    is_same = (flipped == IMAGES[0]).all((1, 2, 3))
    is_mirror = (flipped == IMAGES[0][:, ::-1]).all((1, 2, 3))
    assert (is_same ^ is_mirror).all()
    assert 150 < is_mirror.sum() < 250


def test_the_affine_map_without_rotation_and_scale_is_the_crop():
    exact = plain(pad_crop=2, flip=True)()
    # The angle is so small that bilinear reading returns the pixels.
    affine = plain(pad_crop=2, flip=True, rotate=1e-6)()
    mirrored = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    assert exact.shape == affine.shape
    for image, big in zip(affine, mirrored):
        # Flipped about the image's own center and then moved.
        both = (big, big[:, ::-1])
        assert any(
            np.abs(image - b[y : y + 12, x : x + 10]).max() < 0.1
            for b in both
            for y in range(5)
            for x in range(5)
        )


def test_rotation_and_scale_agree_with_scipy():
    from scipy.ndimage import map_coordinates

    image = IMAGES[0].astype(np.float32)
    rng = np.random.default_rng(0)
    y, x = rng.integers(-3 * 256, 14 * 256, (2, 30, 30))
    ours = augment.bilinear(jnp.asarray(IMAGES[0]), y, x)
    theirs = np.stack(
        [
            map_coordinates(
                image[..., c], [y / 256, x / 256], order=1, mode="grid-constant", cval=0
            )
            for c in range(3)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-2)


def test_rotation_turns_and_scale_zooms():
    disc = np.zeros((1, *SHAPE), np.uint8)
    disc[0, 4:8, 3:7] = 255  # a square about the center
    keys = jax.random.split(jax.random.key(2), 64)
    images = np.repeat(disc, 64, axis=0)
    zoomed = plain(scale=0.5)(images, keys)[..., 0].sum((1, 2)) / (16 * 255)
    assert 0.2 < zoomed.min() < 0.5  # at least (1/2)^2 of the area
    assert 1.7 < zoomed.max() < 2.6  # at most (3/2)^2
    turned = plain(rotate=90.0)(images, keys)[..., 0]
    np.testing.assert_allclose(
        turned.sum((1, 2)) / (16 * 255), 1, atol=0.05
    )  # no brightness is lost
    assert turned.std(0).max() > 20  # it turns


def test_random_resized_crop_of_everything_is_the_image_and_of_a_part_a_part():
    # No box with the area of the whole image fits, except the image itself.
    np.testing.assert_allclose(plain(random_resized_crop=(1.0, 1.0))(), IMAGES, atol=0.05)
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None] * 20, SHAPE)
    images = np.broadcast_to(ramp, (64, *SHAPE))
    out = plain(random_resized_crop=(0.25, 0.5))(images, jax.random.split(jax.random.key(3), 64))
    height = (out[:, -2] - out[:, 1]).mean((1, 2)) / (
        180 / 12 * 12
    )  # share of the ramp inside the crop
    assert 0.3 < height.min() < height.max() < 0.95
    assert out[:, 6].mean((1, 2)).std() > 10  # in different places


def test_cutout_sets_a_square_to_the_mean():
    normalized, cut = (np.asarray(quick_jit(make(cutout=n))(IMAGES, KEYS)) for n in (0, 4))
    hole = (cut != normalized).any(-1)
    assert (cut[hole] == 0).all()
    sizes = hole.sum((1, 2))
    assert sizes.max() == 16
    assert (sizes >= 4).all()  # the center is always inside


def test_erasing_puts_a_whole_box_of_noise_into_some_images():
    shape, n = (20, 16, 1), 400
    keys = jax.random.split(jax.random.key(4), n)
    # Brighter than any noise, so that erased pixels show.
    images = np.full((n, *shape), 300.0, np.float32)
    draw = quick_jit(jax.vmap(lambda key, image: augment.erase(key, image, 0.4)))
    out = np.asarray(draw(keys, images))[..., 0]
    hole = out < 300
    some = hole.any((1, 2))
    assert abs(some.mean() - 0.4) < 0.08
    shares, ratios = [], []
    for box in hole[some]:
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        whole = np.zeros_like(box)
        whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(box, whole)
        shares.append(box.mean())
        ratios.append(len(rows) / len(columns))
    # Sides are whole pixels: 0.02 of 320 pixels is 6.4, and 2 x 3 is the nearest.
    assert 0.01 < min(shares) < 0.06
    assert 0.33 < max(shares) < 0.45
    assert 0.25 < min(ratios) < 0.7
    assert 2 < max(ratios) < 4
    assert hole.any(0).all()  # boxes occur everywhere
    noise = out[hole]
    assert noise.min() < 5
    assert noise.max() in range(251, 256)
    assert abs(noise.mean() - 127.5) < 3


def test_pca_adds_one_color_along_the_principal_components():
    normal = plain(pca=0.1)
    keys = jax.random.split(jax.random.key(5), 3000)
    images = np.broadcast_to(IMAGES[0], (3000, *SHAPE))
    added = normal(images, keys) - IMAGES[0]
    assert np.ptp(added, axis=(1, 2)).max() < 1e-3  # the same for every pixel
    drawn = added[:, 0, 0] / 255
    values, vectors = np.linalg.eigh(COVARIANCE)
    along = drawn @ vectors  # the paper's alpha times the eigenvalue
    np.testing.assert_allclose(along.std(0), 0.1 * values, rtol=0.06)
    np.testing.assert_allclose(np.corrcoef(along.T), np.eye(3), atol=0.08)
    assert abs(along.mean(0) / along.std(0)).max() < 0.08


def test_gray_images_take_every_augmentation():
    out = jax.eval_shape(make(shape=(12, 10, 1), **ALL), IMAGES[..., :1], KEYS)
    assert out.shape == (16, 12, 10, 1)
    light = quick_jit(make(shape=(12, 10, 1), pca=0.5, normalize=False))(IMAGES[..., :1], KEYS)
    added = np.asarray(light) - IMAGES[..., :1] / 255  # the only component is the brightness
    assert np.ptp(added, axis=(1, 2)).max() < 1e-5
    assert 0.3 < added[:, 0, 0].std() / (0.5 * 0.06) < 2


def test_an_augmentation_draws_the_same_whatever_else_is_on():
    rest = dict(pad_crop=2, flip=True)
    without, erased = plain(**rest)(), plain(**rest, **ERASE)()
    changed = (without != erased).any(-1)
    assert 2 < changed.any((1, 2)).sum() < 14  # of 16
    assert not changed.all((1, 2)).any()


def test_an_image_depends_on_its_own_key_not_on_its_place():
    chex.clear_trace_counter()
    function = quick_jit(chex.assert_max_traces(make(**ALL), n=1))  # shapes are static
    out = function(IMAGES, KEYS)
    assert out.shape == IMAGES.shape
    assert out.dtype == jnp.float32
    order = np.random.default_rng(0).permutation(len(IMAGES))
    np.testing.assert_allclose(function(IMAGES[order], KEYS[order]), out[order], atol=1e-5)
    twice = function(np.repeat(IMAGES[:1], 16, 0), KEYS)
    assert len(np.unique(np.asarray(twice).reshape(16, -1), axis=0)) == 16


def test_what_the_loader_has_cropped_is_not_cropped_again():
    out = make(cropped=True, random_resized_crop=(0.1, 0.2))(IMAGES, KEYS)
    np.testing.assert_array_equal(out, make()(IMAGES, KEYS))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pad_crop", 10, r"pad_crop=10 is as large as the image \(12x10\)"),
        ("cutout", -1, "cutout: expected a whole number of at least 0, got -1"),
        ("scale", 1.5, "scale: expected a number from 0 to 0.99"),
        ("erase", 1.5, "erase: expected a number from 0 to 1"),
        ("pca", -0.1, "pca: expected a number from 0 to 1"),
        ("pca", 1.5, "pca: expected a number from 0 to 1, got 1.5"),
        ("randaugment", (2,), r"operations per image, magnitude"),
        ("randaugment", (2, 31), r"magnitude from 0 to 30"),
        ("random_resized_crop", (0.5,), "smallest, largest"),
        ("random_resized_crop", (0.5, 0.2), "smallest, largest"),
    ],
)
def test_values_that_make_no_sense(field, value, message):
    with pytest.raises(UserError, match=message):
        make(**{field: value})
