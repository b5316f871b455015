"""Augmentation of single images on the device, with static shapes.

Images come in as uint8 and leave as normalized float32. A user's own images may be float32 from 0
to 1. They are multiplied by 255 for the color operations, and RandAugment rounds them to 256
values.

Every image has its own key, so the result depends neither on the image's place in the local array
nor on the number of devices. Crop, flip, rotation and scale are composed into one map from output
to input pixels, and the image is read once, bilinearly. That is cheaper than one pass per
operation, and no pixel is blurred twice. Pixels outside the image are black.

Sums of products use integers, or numbers that float32 represents exactly. The reason: a compiler
fuses a product and a sum of floats in one program and not in another, but an image must be the
same, to the bit, wherever it is augmented. (The exception is float images that are rotated, scaled
or resized: a loader and a device agree on them up to float32's rounding.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.config import validate_section
from flax_cnns.data.randaugment import randaugment
from flax_cnns.errors import UserError
from flax_cnns.types import Array

_STEPS = 1000


def make_normalize(
    config: Any, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Array], Array]:
    """Returns `normalize(images u8 [... C]) -> f32 [... C]`: (x/255 - mean) / std, or x/255 if
    `config.normalize` is False. f32 images are in 0..1 already, and are not divided by 255."""
    of_bytes, of_floats = _normalizers(config, mean, std)

    def normalize(images: Array) -> Array:
        return of_floats(images) if is_float(images) else of_bytes(images)

    return normalize


def is_float(images: Array) -> bool:
    """Returns whether images are floats in 0..1; others are in 0..255."""
    return jnp.issubdtype(images.dtype, jnp.floating)


def _normalizers(
    config: Any, mean: Sequence[float], std: Sequence[float]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Returns (a function of images in 0..255, a function of images in 0..1), for any dtype."""
    means = jnp.asarray(mean if config.normalize else 0.0, jnp.float32)
    stds = jnp.asarray(std if config.normalize else 1.0, jnp.float32)

    def of_bytes(images: Array) -> Array:
        return (images.astype(jnp.float32) - 255 * means) / (255 * stds)

    def of_floats(images: Array) -> Array:
        return (images.astype(jnp.float32) - means) / stds

    return of_bytes, of_floats


def make_augment(
    config: Any,
    *,
    image_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    covariance: Sequence[Sequence[float]] = (),
    cropped: bool = False,
) -> Callable[[Array, Array], Array]:
    """Returns `augment(images u8 [n H W C], keys [n]) -> f32 [n H W C]`, to be called under jit.
    Images may also be f32 in 0..1.

    `config` is `config.data.augment`. `config.pca` needs `covariance` [C C], of the colors of
    images in 0..1. `cropped` says that the loader has already done the random resized crop, as for
    streamed images. The order is: crop, flip and move; RandAugment; PCA color; erasing;
    normalization; cutout. With everything off, the result is exactly that of `make_normalize`.
    Raises UserError if a value is out of range.
    """
    height, width, _ = image_shape
    validate_section(config, "data.augment")
    _check_sizes(config, height, width)
    of_bytes, of_floats = _normalizers(config, mean, std)
    resized_crop = tuple(config.random_resized_crop) if not cropped else ()
    moved = _flips(config) or config.pad_crop or config.rotate or config.scale
    colored = tuple(config.randaugment) or config.pca

    def augment_one(image: Array, key: Array) -> Array:
        floats = is_float(image)
        names = ("resize", "move", "cutout", "randaugment", "pca", "erase")
        keys = dict(zip(names, jax.random.split(key, len(names))))
        if resized_crop:
            image = random_resized_crop(keys["resize"], image, resized_crop)
        if config.rotate or config.scale:
            image = _affine(keys["move"], image, config)
        elif moved:
            image = _flip_and_crop(keys["move"], image, config)
        if colored and floats:
            image = 255 * image
        if config.randaugment:
            image = randaugment(keys["randaugment"], image, *config.randaugment)
        if config.pca:
            image = pca_color(keys["pca"], image, config.pca, covariance)
        if colored and floats:
            image = image / 255
        if config.erase:
            image = erase(keys["erase"], image, config.erase, white=1.0 if floats else 255.0)
        image = (of_floats if floats else of_bytes)(image)
        if config.cutout:
            image = cutout(keys["cutout"], image, config.cutout)
        return image

    def augment(images: Array, keys: Array) -> Array:
        if not (resized_crop or moved or colored or config.erase or config.cutout):
            return (of_floats if is_float(images) else of_bytes)(images)
        return jax.vmap(augment_one)(images, keys)

    return augment


def _check_sizes(config: Any, height: int, width: int) -> None:
    for name in ("pad_crop", "cutout"):
        if config[name] >= min(height, width):
            raise UserError(
                f"data.augment.{name}={config[name]} is as large as the image ({height}x{width})"
            )


def _flips(config: Any) -> bool:
    """Whether images are mirrored at random."""
    return config.flip and not config.alternate_flip


def _draw_flip_and_shift(key: Array, config: Any) -> tuple[Array, Array, Array]:
    """Draws (flip or not, a shift [2] in whole pixels, uniform in +-pad_crop, a key for the
    rest)."""
    key_flip, key_shift, key_rest = jax.random.split(key, 3)
    flip = jax.random.bernoulli(key_flip) if _flips(config) else jnp.array(False)
    pad = config.pad_crop
    return flip, jax.random.randint(key_shift, (2,), -pad, pad + 1), key_rest


def _flip_and_crop(key: Array, image: Array, config: Any) -> Array:
    """Flips and shifts by whole pixels, without changing values: [H W C] -> [H W C]."""
    flip, shift, _ = _draw_flip_and_shift(key, config)
    if _flips(config):
        image = jnp.where(flip, image[:, ::-1], image)
    if pad := config.pad_crop:
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        image = jax.lax.dynamic_slice(padded, (*(shift + pad), 0), image.shape)
    return image


def _affine(key: Array, image: Array, config: Any) -> Array:
    """Flips, rotates, scales and shifts in one bilinear reading: [H W C] -> f32 [H W C].

    Angle and zoom are each drawn from 2 * 1000 + 1 evenly spaced values.
    """
    height, width, _ = image.shape
    flip, shift, key = _draw_flip_and_shift(key, config)
    angle, zoom = jax.random.randint(key, (2,), 0, 2 * _STEPS + 1)
    drawn = np.linspace(-1, 1, 2 * _STEPS + 1)
    angles = drawn * math.radians(config.rotate)
    shrink = 2**14 * jnp.asarray(1 / (1 + drawn * config.scale), jnp.float32)[zoom]
    cos, sin = (
        jnp.round(jnp.asarray(f(angles), jnp.float32)[angle] * shrink).astype(jnp.int32)
        for f in (np.cos, np.sin)
    )
    # From each output pixel back to its input pixel. First the unit is half a pixel, because the
    # center may lie between pixels; after the product it is 2**-15 of a pixel.
    y = 2 * (jnp.arange(height)[:, None] + shift[0]) - (height - 1)
    x = 2 * (jnp.arange(width) + shift[1]) - (width - 1)
    y, x = cos * y - sin * x, sin * y + cos * x  # [H W]
    x = jnp.where(flip, -x, x)
    y, x = y + 2**14 * (height - 1), x + 2**14 * (width - 1)
    return bilinear(image, (y + 2**6) >> 7, (x + 2**6) >> 7)


def bilinear(image: Array, y: Array, x: Array) -> Array:
    """Reads `image` [H W C] at the points `y`, `x` i32 [h w]: f32 [h w C].

    The unit of `y` and `x` is 1/256 of a pixel, and 0 is the center of the first pixel. Points
    outside the image give 0. The result is exact if the image has integer values.
    """
    height, width, channels = image.shape
    # Two black pixels on each side replace a mask for each of the four neighbors of a point.
    padded = jnp.pad(image, ((2, 2), (2, 2), (0, 0))).reshape(-1, channels)
    y = jnp.clip(y + 2 * 256, 0, (height + 2) * 256)
    x = jnp.clip(x + 2 * 256, 0, (width + 2) * 256)
    dy, dx = ((v & 255)[..., None] / 256 for v in (y, x))
    corner = (y >> 8) * (width + 4) + (x >> 8)

    def pixel(offset: int) -> Array:
        return jnp.take(padded, corner + offset, axis=0, mode="clip").astype(jnp.float32)

    above = pixel(0) * (1 - dx) + pixel(1) * dx
    below = pixel(width + 4) * (1 - dx) + pixel(width + 5) * dx
    return above * (1 - dy) + below * dy


def random_resized_crop(
    key: Array,
    image: Array,
    share: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Crops a box with a random share of the area and a random aspect ratio, and resizes the box to
    the image's size: [H W C] -> f32 [H W C]. Values are rounded to integers, as in the loader's
    crops, unless the image has floats.

    This is Inception's augmentation (https://arxiv.org/abs/1409.4842, section 6) as in torchvision:
    ten boxes are drawn and the first that fits is used, or the whole image if none fits.
    """
    height, width, _ = image.shape
    key_area, key_ratio, key_place = jax.random.split(key, 3)
    area = jax.random.uniform(key_area, (10,), minval=share[0], maxval=share[1]) * height * width
    log_ratio = jax.random.uniform(
        key_ratio, (10,), minval=math.log(ratio[0]), maxval=math.log(ratio[1])
    )
    h, w = jnp.sqrt(area * jnp.exp(-log_ratio)), jnp.sqrt(area * jnp.exp(log_ratio))
    fits = (h <= height) & (w <= width)
    first = jnp.argmax(fits)
    whole = jnp.array([height, width], jnp.float32)
    box = jnp.where(fits[first], jnp.stack([h[first], w[first]]), whole)
    corner = jax.random.uniform(key_place, (2,)) * (whole - box)
    zoom = whole / box
    resized = jax.image.scale_and_translate(
        image.astype(jnp.float32), image.shape, (0, 1), zoom, -corner * zoom, "linear"
    )
    return resized if is_float(image) else jnp.round(resized)


def cutout(key: Array, image: Array, side: int) -> Array:
    """Sets a square of `side` pixels to 0, the mean of a normalized image: [H W C] -> [H W C].

    The square's center is uniform over the image, so part of the square may lie outside
    (https://arxiv.org/abs/1708.04552).
    """
    height, width, _ = image.shape
    center = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    box = jnp.array([side, side])
    return jnp.where(_inside(center - side // 2, box, height, width), 0.0, image)


def pca_color(
    key: Array, image: Array, deviation: float, covariance: Sequence[Sequence[float]]
) -> Array:
    """Changes the color of the light, as in AlexNet: [H W C] in 0..255 -> f32 [H W C], not clipped.

    Section 4.1 of the paper adds to every pixel the eigenvectors of the colors' covariance, each
    times its eigenvalue and a normal random number with standard deviation 0.1. The sum has the
    same distribution as the covariance times normal random numbers, which needs no eigenvectors.
    `covariance` is for colors in 0..1; for colors in 0..255 the change would be 255 times as large
    relative to the pixels.
    """
    matrix = np.round(2**10 * 255 * deviation * np.asarray(covariance)).astype(np.int32)
    drawn = jnp.round(2**8 * jax.random.normal(key, matrix.shape[:1])).astype(jnp.int32)
    return image + (matrix * drawn).sum(1) / 2**18


def erase(
    key: Array,
    image: Array,
    probability: float,
    share: tuple[float, float] = (0.02, 0.4),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    white: float = 255.0,
) -> Array:
    """With `probability`, fills a random box with noise: [H W C] -> f32 [H W C]. Each value of the
    noise is one of 256 evenly spaced values from 0 to `white`.

    Random erasing (https://arxiv.org/abs/1708.04896, algorithm 1), with the paper's shares of the
    area and ratios of height to width. The paper draws box and corner again until the box fits,
    which favors small boxes. Here ten sizes are drawn, and the first that fits is placed uniformly.
    """
    height, width, _ = image.shape
    key_coin, key_area, key_ratio, key_place, key_noise = jax.random.split(key, 5)
    area = jax.random.uniform(key_area, (10,), minval=share[0], maxval=share[1]) * height * width
    ratios = jax.random.uniform(key_ratio, (10,), minval=ratio[0], maxval=ratio[1])
    h, w = jnp.round(jnp.sqrt(area * ratios)), jnp.round(jnp.sqrt(area / ratios))
    fits = (h <= height) & (w <= width)
    first = jnp.argmax(fits)
    box = jnp.where(fits[first], jnp.stack([h[first], w[first]]), 0).astype(jnp.int32)
    low = jax.random.randint(key_place, (2,), 0, jnp.array([height, width]) - box + 1)
    noise = jax.random.randint(key_noise, image.shape, 0, 256).astype(jnp.float32)
    noise = noise if white == 255 else noise * (white / 255)
    box = jnp.where(jax.random.bernoulli(key_coin, probability), box, 0)
    return jnp.where(_inside(low, box, height, width), noise, image)


def _inside(low: Array, box: Array, height: int, width: int) -> Array:
    """Returns a mask [H W 1] of a box with upper left corner `low` [2], height and width `box`
    [2]."""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y >= low[0]) & (y < low[0] + box[0]) & (x >= low[1]) & (x < low[1] + box[1])
    return inside[..., None]
