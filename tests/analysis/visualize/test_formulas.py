"""The formulas of feature visualization, MaCo and DeepDream, written anew in NumPy and SciPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from flax_cnns.analysis.visualize.deep_dream import deep_dream
from flax_cnns.analysis.visualize.objectives import Objective
from flax_cnns.analysis.visualize.optimize import visualize
from flax_cnns.analysis.visualize.parameters import (
    draw_parameters,
    fourier_scale,
    make_images,
    measure_magnitude,
)
from flax_cnns.analysis.visualize.transforms import draw_crops, transform
from flax_cnns.errors import UserError

# Lucid's root of ImageNet's color covariance over its largest column norm.
ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
MIX = ROOT / max(np.sqrt((ROOT[:, i] ** 2).sum()) for i in range(3))


class Pixelwise(nn.Module):
    """Its gradients are known: a 1x1 convolution."""

    input_size: tuple = (8, 9, 3)

    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.Conv(4, (1, 1), name="conv")(images).mean((1, 2))


def normalize(images):
    return (images - 0.5) / 0.25


@pytest.fixture(scope="module")
def pixelwise():
    kernel = jax.random.normal(jax.random.key(4), (1, 1, 3, 4))
    bias = jnp.arange(4.0)
    return Pixelwise(), {"params": {"conv": {"kernel": kernel, "bias": bias}}}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_maco_images_are_the_papers_formula():
    size = (6, 8)
    phase = np.asarray(draw_parameters(jax.random.key(1), 2, size, 3, "maco"))
    assert phase.shape == (2, 6, 5, 3)
    magnitude = np.random.default_rng(0).random((6, 5, 3)).astype(np.float32)
    wanted = []
    for image in phase:
        angle = (image - image.mean()) / (image.std() + 1e-5)
        raw = np.fft.irfft2(magnitude * np.exp(1j * angle), size, axes=(0, 1))
        raw = (raw - raw.mean()) / (raw.std() + 1e-5)
        wanted.append(sigmoid(np.einsum("hwc,dc->hwd", raw, MIX)))
    found = make_images(jnp.asarray(phase), size, "maco", jnp.asarray(magnitude))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    closed = make_images(jnp.asarray(phase), size, "maco")
    given = jnp.repeat(fourier_scale(size)[..., None], 3, -1)
    np.testing.assert_allclose(closed, make_images(jnp.asarray(phase), size, "maco", given))


def test_the_magnitude_is_the_mean_over_images_in_decorrelated_colors():
    images = np.random.default_rng(0).random((3, 6, 8, 3)).astype(np.float32)
    decorrelated = np.einsum("nhwd,cd->nhwc", images - 0.5, np.linalg.inv(MIX))
    wanted = np.abs(np.fft.rfft2(decorrelated, axes=(1, 2))).mean(0)
    np.testing.assert_allclose(measure_magnitude(images, (6, 8)), wanted, rtol=1e-4, atol=1e-4)
    assert measure_magnitude(images[..., :1], (4, 6)).shape == (4, 4, 1)


def test_transformations_are_lucids_in_order():
    image = np.random.default_rng(0).random((16, 14)).astype(np.float32)
    key = jax.random.key(7)
    first, scale, angle, last = jax.random.split(key, 4)
    padded = np.pad(image, 12, constant_values=0.5)
    top, left = np.asarray(jax.random.randint(first, (2,), 0, 9))
    moved = padded[top : top + 32, left : left + 30]  # 16 + 24 - 8, 14 + 24 - 8
    scale = float(jax.random.uniform(scale, (), minval=0.9, maxval=1.1))
    angle = np.radians(float(jax.random.uniform(angle, (), minval=-10, maxval=10)))
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    middle = np.array([15.5, 14.5])
    turned = ndimage.affine_transform(
        moved, matrix, middle - matrix @ middle, order=1, mode="constant", cval=0.5
    )
    down, right = np.asarray(jax.random.randint(last, (2,), 0, 5)) + 6  # 6 to 10 of 16
    wanted = turned[down : down + 16, right : right + 14]
    move = jax.jit(transform)
    found = move(image[None, ..., None], key)[0, ..., 0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_array_equal(found, move(image[None, ..., None], key)[0, ..., 0])
    assert not np.allclose(found, move(image[None, ..., None], jax.random.key(8))[0, ..., 0])


def test_crops_are_scipys(monkeypatch):
    monkeypatch.setattr("flax_cnns.analysis.visualize.transforms.NOISE", 0.0)
    images = np.random.default_rng(0).random((2, 11, 9, 3)).astype(np.float32)
    key = jax.random.key(3)
    crop = jax.jit(draw_crops, static_argnums=(2, 3))
    found = crop(images, key, 3, (6, 5), 0.4)
    assert found.shape == (6, 6, 5, 3)
    centers, sides, *_ = jax.random.split(key, 4)
    center = 0.5 + 0.15 * np.asarray(jax.random.normal(centers, (2, 2, 3)))
    side = np.clip(0.4 + 0.05 * np.asarray(jax.random.normal(sides, (2, 3))), 0.05, 1)
    found = np.asarray(found)
    for image, n in np.ndindex(2, 3):
        places = []
        for axis, (count, pixels) in enumerate(((6, 11), (5, 9))):
            start = center[axis, image, n] - side[image, n] / 2
            places.append((start + side[image, n] * np.arange(count) / (count - 1)) * pixels)
            places[-1] *= (pixels - 1) / pixels  # 1 is the last pixel's center
        grid = np.meshgrid(*places, indexing="ij")
        for channel in range(3):
            wanted = ndimage.map_coordinates(
                images[image, ..., channel], grid, order=1, mode="constant", cval=0.5
            )
            inside = (grid[0] >= 0) & (grid[0] <= 10) & (grid[1] >= 0) & (grid[1] <= 8)
            assert inside.any()
            same = found[3 * image + n, ..., channel]
            np.testing.assert_allclose(same[inside], wanted[inside], atol=1e-5)
    noisy = jnp.full((1, 4, 4, 1), 0.5)
    monkeypatch.setattr("flax_cnns.analysis.visualize.transforms.NOISE", 0.04)
    noise = jax.jit(partial(draw_crops, count=50, size=(8, 8)))(noisy, key, side=0.4) - 0.5
    # N(0, 0.04) plus uniform of width 0.04
    assert float(noise.std()) == pytest.approx(np.sqrt(0.04**2 + 0.04**2 / 12), rel=0.05)


def test_the_first_step_is_adams(pixelwise):
    model, variables = pixelwise
    kernel = np.asarray(variables["params"]["conv"]["kernel"])[0, 0, :, 2]
    key = jax.random.key(2)
    given = dict(key=key, normalize=normalize, kind="pixels", robust=False, steps=1)
    found = visualize(model, variables, Objective("conv", 2), **given)
    params = np.asarray(draw_parameters(key, 1, (8, 9), 3, "pixels"))
    pixels = sigmoid(params @ MIX.T)
    by_pixels = np.broadcast_to(-kernel / 0.25 / (8 * 9), pixels.shape)
    importance = np.abs(by_pixels).sum(-1)
    np.testing.assert_allclose(found.importance, importance, rtol=1e-5)
    gradient = (by_pixels * pixels * (1 - pixels)) @ MIX
    moved = params - 0.05 * gradient / (np.abs(gradient) + 1e-8)
    np.testing.assert_allclose(found.images, sigmoid(moved @ MIX.T), atol=1e-5)
    values = normalize(pixels) @ kernel + 2  # the bias
    np.testing.assert_allclose(found.losses, [-values.mean()], rtol=1e-4)


def test_maco_keeps_the_magnitude_and_raises_its_unit(pixelwise):
    key = jax.random.key(2)
    given = dict(key=key, normalize=normalize, kind="maco", size=(12, 10), crops=4)
    done = []
    found = visualize(*pixelwise, Objective("conv", 1), **given, steps=12, on_step=done.append)
    start = visualize(*pixelwise, Objective("conv", 1), **given, steps=1)
    assert done == list(range(1, 13))
    assert found.images.shape == (1, 12, 10, 3)
    assert found.importance.shape == (1, 12, 10)
    assert (found.importance >= 0).all()
    # Late crops are small and central: the middle matters more than the corners.
    assert found.importance[0, 6, 5] > 2 * found.importance[0, 0, 0]
    raw = np.log(found.images / (1 - found.images)) @ np.linalg.inv(MIX).T
    spectrum = np.abs(np.fft.rfft2(raw, axes=(1, 2)))[0, :, 1:-1]
    ratio = spectrum / fourier_scale((12, 10))[:, 1:-1, None]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-2)
    assert not np.allclose(found.images, start.images, atol=1e-2)
    again = visualize(*pixelwise, Objective("conv", 1), **given, steps=12)
    np.testing.assert_array_equal(again.images, found.images)
    with pytest.raises(UserError, match="maco takes no diversity"):
        visualize(*pixelwise, Objective("conv", 1), **given, count=2, diverse=1.0)
    with pytest.raises(UserError, match=r"magnitude of shape \[12, 6, 3\], got \[3\]"):
        visualize(*pixelwise, Objective("conv", 1), **given, magnitude=jnp.ones(3))


@pytest.mark.parametrize("unit", [None, 1])
def test_deep_dream_in_numpy(pixelwise, unit):
    """Octaves, normalized gradients and clipping; tiles and shifts leave a pixelwise network's
    gradient as it is."""
    kernel, bias = (np.asarray(each) for each in jax.tree.leaves(pixelwise[1])[::-1])
    kernel = kernel[0, 0]
    image = np.random.default_rng(0).random((20, 17, 3)).astype(np.float32)
    added = np.zeros((10, 8, 3), np.float32)  # round(20 / 2), round(17 / 2)
    for size in ((10, 8), (20, 17)):
        base = np.asarray(jax.image.resize(image, (*size, 3), "bilinear"))
        added = np.asarray(jax.image.resize(added, (*size, 3), "bilinear"))
        for _ in range(2):
            shown = np.clip(base + added, 0, 1)
            output = normalize(shown) @ kernel + bias
            gradient = output @ kernel.T if unit is None else np.ones((*size, 1)) * kernel[:, unit]
            added = added + 0.02 * gradient / np.abs(gradient).mean()
    found = deep_dream(
        *pixelwise,
        jnp.asarray(image),
        "conv",
        key=jax.random.key(0),
        normalize=normalize,
        unit=unit,
        octaves=2,
        octave_scale=2.0,
        steps=2,
        step_size=0.02,
        tile=6,
    )
    np.testing.assert_allclose(found, np.clip(image + added, 0, 1), atol=1e-4)
