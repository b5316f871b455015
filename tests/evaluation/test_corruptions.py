"""The corruptions against imagecorruptions 1.1.5, whose outputs `make_corruptions` recorded."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_cnns.errors import UserError
from flax_cnns.evaluation.corruptions import blur, digital, noise, scores, table, weather
from tests.evaluation import make_corruptions as recorded

RECORD = np.load(recorded.FILE)
SLOW = pytest.mark.slow
# name -> largest and mean difference from the package, of 255. A JPEG may round a coefficient
# differently; that moves its whole block.
TOLERANCES = {"jpeg_compression": (24, 0.5)}


def constants_of(name: str, shape: tuple[int, int, int], severity: int) -> dict:
    return table.pick_severity(table.prepare_constants(table.CORRUPTIONS[name], shape), severity)


def run(name: str, images: np.ndarray, severity: int, first: int = 0) -> np.ndarray:
    numbers = first + np.arange(len(images), dtype=np.int32)
    constants = constants_of(name, images.shape[1:], severity)
    return np.asarray(table.make_corrupt(name)(images, numbers, constants))


def check_close(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    largest, mean = TOLERANCES.get(name, (1, 0.2))
    assert difference.max() <= largest
    assert difference.mean() <= mean


@pytest.mark.parametrize("name", recorded.FIXED)
def test_photograph(name):
    for theirs, severity in zip(RECORD[name], (2, 5)):
        check_close(name, run(name, RECORD["photo"][None], severity)[0], theirs)


@SLOW
@pytest.mark.parametrize("name", ["defocus_blur", "zoom_blur", "pixelate", "jpeg_compression"])
def test_constants_of_cifar(name):
    for theirs, severity in zip(RECORD[f"small_{name}"], (2, 5)):
        check_close(name, run(name, RECORD["small"][None], severity)[0], theirs)


@pytest.mark.parametrize("name", recorded.NOISES)
def test_noise_in_distribution(name):
    """Mean, standard deviation and skewness of 67,500 values each, for dark, gray and light."""
    for level, theirs in zip(recorded.LEVELS, RECORD[name]):
        for severity, expected in zip((1, 5), theirs):
            flat = np.full((1, 150, 150, 3), level, np.uint8)
            found = recorded.describe(run(name, flat, severity))
            spread = expected[1] / math.sqrt(67_500)
            assert abs(found[0] - expected[0]) < 5 * spread + 0.05
            assert found[1] == pytest.approx(expected[1], rel=0.03)
            # A skewness needs many values where few are changed.
            assert found[2] == pytest.approx(expected[2], abs=0.1, rel=0.1)


def test_shot_noise_is_exactly_poisson():
    """The table inverts the distribution: as many draws as quantiles give its probabilities."""
    photons, values = 5.0, np.full(40_000, 102 / 255)
    made = noise.tabulate_shot_noise([(photons,)], (1, 1, 1))
    constants = {name: jnp.asarray(stacked[0]) for name, stacked in made.items()}
    drawn = jax.jit(noise.add_shot_noise)(values, jax.random.key(0), constants)
    counts = np.bincount(np.round(photons * np.asarray(drawn)).astype(int), minlength=8)[:6]
    expected = 40_000 * stats.poisson.pmf(np.arange(6), 2.0)  # 5 * 102 / 255
    assert np.abs(counts - expected).max() < 5 * math.sqrt(40_000 / 4)


def test_glass_is_the_published_loop():
    """The loop of make_imagenet_c.py: on rows of an array with channels its swap is a copy."""
    height, width, delta = 18, 23, 2
    offsets = np.random.default_rng(1).uniform(size=(2, height, width)).astype(np.float32)
    pixels = np.random.default_rng(2).integers(256, size=(height, width, 3))
    source = np.asarray(jax.jit(blur.draw_glass)(offsets, delta))
    ours = pixels.reshape(-1, 3)[source]
    moves = np.floor(offsets * 2 * delta).astype(int) - delta
    for h in range(height - delta, delta, -1):
        for w in range(width - delta, delta, -1):
            dy, dx = moves[:, h, w]
            other = (h + dy, w + dx)
            pixels[h, w], pixels[other] = pixels[other], pixels[h, w]
    np.testing.assert_array_equal(ours, pixels)
    assert set(range(-delta, delta)) == set(moves.ravel())


@SLOW
def test_motion_and_snow_with_given_numbers():
    photo = jnp.asarray(RECORD["photo"] / 255, jnp.float32)
    angle = recorded.ANGLE * math.pi / 180
    constants = constants_of("motion_blur", recorded.SHAPE, 3)
    ours = 255 * jax.jit(blur.blur_along)(photo, angle, constants["weights"])
    assert np.abs(np.floor(np.asarray(ours) + 1e-3) - RECORD["motion_blur"]).max() <= 1
    constants = constants_of("snow", recorded.SHAPE, 3)
    flakes = jnp.asarray(recorded.draw(recorded.SHAPE[:2], normal=True), jnp.float32)
    ours = jax.jit(weather.lay_snow)(photo, flakes, recorded.ANGLE, constants)
    ours = 255 * np.clip(ours, 0, 1)
    assert np.abs(np.floor(np.asarray(ours) + 1e-3) - RECORD["snow"]).max() <= 1


def test_plasma_with_given_numbers():
    drawn = jnp.asarray(recorded.draw((32 * 32,)), jnp.float32)
    ours = jax.jit(weather.make_plasma)(drawn, 1.7)
    np.testing.assert_allclose(ours, RECORD["plasma"], atol=1e-5)


def test_elastic_transform_with_given_numbers():
    """The package has no affine part, other amplitudes, and moves both axes by the height."""
    square = jnp.asarray(RECORD["photo"][:40, :40] / 255, jnp.float32)
    values = [(recorded.ELASTIC, 0.01, 0.0)]
    made = digital.prepare_deform(values, (40, 40, 3))
    constants = {name: jnp.asarray(stacked[0]) for name, stacked in made.items()}
    field = jnp.asarray(2 * recorded.draw((2, 40, 40)) - 1, jnp.float32)
    ours = jax.jit(digital.deform_by)(square, jnp.zeros((3, 2)), field, constants)
    ours = np.floor(255 * np.asarray(ours) + 1e-3)
    assert np.abs(ours - RECORD["elastic_transform"]).max() <= 1


def test_affine_part_of_the_elastic_transform():
    """By hand: all corners move by (+2, +1), so the image does; the border is mirrored."""
    image = np.random.default_rng(0).uniform(size=(12, 12, 1)).astype(np.float32)
    made = digital.prepare_deform([(0, 0, 2 / 12)], (12, 12, 1))
    constants = {name: jnp.asarray(stacked[0]) for name, stacked in made.items()}
    corners = np.tile(np.array([1.0, 0.5], np.float32), (3, 1))
    field = np.zeros((2, 12, 12), np.float32)
    ours = jax.jit(digital.deform_by)(image, corners, field, constants)
    expected = np.pad(image, ((1, 0), (2, 0), (0, 0)), "reflect")[:12, :12]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# ---- all corruptions


def test_results_depend_on_the_image_number_only():
    image = np.random.default_rng(0).integers(256, size=(1, 8, 8, 1), dtype=np.uint8)
    images = np.repeat(image, 3, 0)
    together = run("impulse_noise", images, 5)
    np.testing.assert_array_equal(together[2:], run("impulse_noise", image, 5, first=2))
    assert (together[0] != together[1]).any()
    assert (run("impulse_noise", images, 4) != together).any()  # severities draw anew
    floats = run("impulse_noise", images.astype(np.float32), 5)
    np.testing.assert_array_equal(np.floor(floats + 1e-3), together)


@SLOW
def test_many_images_are_corrupted_in_parts(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(5, 8, 8, 1), dtype=np.uint8)
    whole = run("gaussian_noise", images, 1)
    monkeypatch.setattr(table, "PIXELS_AT_ONCE", 128)
    row = table.CORRUPTIONS["gaussian_noise"]
    parts = table.corrupt(row, images, np.arange(5), constants_of(row.name, (8, 8, 1), 1))
    np.testing.assert_array_equal(parts, whole)


def test_every_corruption_has_constants_of_one_shape():
    for row, side, channels in itertools.product(table.CORRUPTIONS.values(), (8, 72), (1, 3)):
        made = table.prepare_constants(row, (side, side, channels))
        assert {len(stacked) for stacked in made.values()} == {5}, row.name


@SLOW
@pytest.mark.parametrize(
    ("name", "channels"),
    [("glass_blur", 1), ("elastic_transform", 1), ("procedural_frost", 3), ("saturate", 1)],
)
def test_what_changes_images(name, channels):
    random = np.random.default_rng(0)
    smooth = np.cumsum(random.normal(size=(2, 16, 16, channels)), 1) * 25 + 128
    images = np.clip(smooth, 0, 255).astype(np.uint8)
    corrupted = run(name, images, 5)
    assert corrupted.shape == images.shape
    unchanged = table.CORRUPTIONS[name].needs_color and channels == 1
    assert (corrupted == images).all() == unchanged


def test_select_corruptions():
    fifteen = table.select_corruptions(["all"])
    assert len(fifteen) == 15
    assert table.select_corruptions(["fog", "noise", "shot_noise"])[-1].name == "fog"
    assert len(table.select_corruptions(["fog", "noise", "shot_noise"])) == 4
    with pytest.raises(UserError, match=r"did you mean .gaussian_noise"):
        table.select_corruptions(["gausian_noise"])
    with pytest.raises(UserError, match="procedural_frost here"):
        table.select_corruptions(["frost"])


def test_sizes_and_channels():
    assert table.name_constants((64, 64, 3)) == "cifar"
    assert table.name_constants((64, 65, 3)) == "imagenet"
    for shape in ((7, 32, 3), (32, 32, 4)):
        with pytest.raises(UserError, match="at least 8x8 pixels with 1 or 3"):
            table.prepare_constants(table.CORRUPTIONS["fog"], shape)


def test_scores():
    """By hand: CE of a is 0.3 / 0.6, of b 0.8 / 0.4; relative: (0.3 - 0.2) / (0.6 - 0.1)."""
    ours, base = {"a": [0.1, 0.2], "b": [0.4, 0.4]}, {"a": [0.2, 0.4], "b": [0.1, 0.3]}
    assert scores.mean_corruption_error(ours, base) == pytest.approx((0.5 + 2) / 2)
    relative = scores.relative_corruption_error(ours, 0.1, base, 0.05)
    assert relative == pytest.approx((0.1 / 0.5 + 0.6 / 0.3) / 2)
    assert scores.relative_corruption_error(ours, 0.1, base, 0.2) is None
    with pytest.raises(UserError, match="no error under a"):
        scores.mean_corruption_error(ours, {"a": [0, 0], "b": [1, 1]})


def test_errors_of_alexnet_have_the_published_means():
    published = {  # google-research/augmix, imagenet.py: "raw AlexNet errors"
        "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
        "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
        "zoom_blur": 0.798360, "snow": 0.866816, "fog": 0.819324, "brightness": 0.564592,
        "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
        "jpeg_compression": 0.606500,
    }  # fmt: skip
    means = {name: np.mean(row) for name, row in scores.ALEXNET_ERRORS.items()}
    assert means == pytest.approx(published, abs=1e-6)
