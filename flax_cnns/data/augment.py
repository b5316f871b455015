"""Augmentation per image, on the device: uint8 images in, normalized float32 out, shapes static.
A user's own images may be float32, from 0 to 1; then the operations on colors work at 255 times
these, and RandAugment rounds them to 256 values.

Every image has its own key, so what happens to it depends neither on its place in the local array
nor on the number of devices. The geometric operations (crop, flip, rotation, scale) are composed
into one map from output to input pixels and the image is read once, bilinearly: cheaper than one
pass each, and nothing is blurred twice. What comes from outside is black.

Sums of products are of whole numbers, or of such that float32 holds them exactly: a compiler fuses
the product and the sum of some floats in one program and not in another, and an image is to be the
same, to the bit, wherever it is made. (Float images that are rotated, scaled or resized are the
same only to float32's rounding in a loader and on a device.)
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
    """`normalize(images u8 [... C]) -> f32 [... C]`: (x/255 - mean) / std, or x/255 where
    `config.normalize` is False; of f32 images x, which are in 0..1 already, in place of x/255."""
    of_bytes, of_floats = _normalizers(config, mean, std)

    def normalize(images: Array) -> Array:
        return of_floats(images) if is_float(images) else of_bytes(images)

    return normalize


def is_float(images: Array) -> bool:
    """Whether images are 0 to 1, not 0 to 255."""
    return jnp.issubdtype(images.dtype, jnp.floating)


def _normalizers(
    config: Any, mean: Sequence[float], std: Sequence[float]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Of images in 0..255, of any dtype, and of images in 0..1."""
    mean = jnp.asarray(mean if config.normalize else 0.0, jnp.float32)
    std = jnp.asarray(std if config.normalize else 1.0, jnp.float32)

    def of_bytes(images: Array) -> Array:
        return (images.astype(jnp.float32) - 255 * mean) / (255 * std)

    def of_floats(images: Array) -> Array:
        return (images.astype(jnp.float32) - mean) / std

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
    """`augment(images u8 [n H W C], keys [n]) -> f32 [n H W C]`, to be called under jit; f32 images
    are in 0..1.

    `config` is `config.data.augment`; `covariance` [C C] of the colors of images in 0..1 is what
    `config.pca` needs; `cropped` says that the loader has done the random resized crop already, as
    it does for streamed images. In this order: crop, flip and move; RandAugment; PCA color;
    erasing; normalization; cutout. With everything off this is `make_normalize` exactly. Raises
    UserError for values that make no sense.
    """
    height, width, _ = image_shape
    validate_section(config, "data.augment")
    _check_sizes(config, height, width)
    of_bytes, of_floats = _normalizers(config, mean, std)
    resized_crop = tuple(config.random_resized_crop) if not cropped else ()
    moved = config.flip or config.pad_crop or config.rotate or config.scale
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


def _draw_flip_and_shift(key: Array, config: Any) -> tuple[Array, Array, Array]:
    """A coin, and a shift in pixels [2], uniform over the whole pixels of +-pad_crop."""
    key_flip, key_shift, key_rest = jax.random.split(key, 3)
    flip = jax.random.bernoulli(key_flip) if config.flip else jnp.array(False)
    pad = config.pad_crop
    return flip, jax.random.randint(key_shift, (2,), -pad, pad + 1), key_rest


def _flip_and_crop(key: Array, image: Array, config: Any) -> Array:
    """Whole pixels only: [H W C] -> [H W C], values untouched."""
    flip, shift, _ = _draw_flip_and_shift(key, config)
    if config.flip:
        image = jnp.where(flip, image[:, ::-1], image)
    if pad := config.pad_crop:
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        image = jax.lax.dynamic_slice(padded, (*(shift + pad), 0), image.shape)
    return image


def _affine(key: Array, image: Array, config: Any) -> Array:
    """Flip, rotate, scale and shift in one bilinear reading: [H W C] -> [H W C] f32.

    Angle and zoom are drawn from a thousand steps each way.
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
    # From the output pixel back to the input's: twice the distance from the center, which may lie
    # between pixels, then 2**-15 of a pixel.
    y = 2 * (jnp.arange(height)[:, None] + shift[0]) - (height - 1)
    x = 2 * (jnp.arange(width) + shift[1]) - (width - 1)
    y, x = cos * y - sin * x, sin * y + cos * x  # [H W]
    x = jnp.where(flip, -x, x)
    y, x = y + 2**14 * (height - 1), x + 2**14 * (width - 1)
    return bilinear(image, (y + 2**6) >> 7, (x + 2**6) >> 7)


def bilinear(image: Array, y: Array, x: Array) -> Array:
    """`image` [H W C] read at the points `y`, `x` i32 [h w] (in 1/256 of a pixel, the first one's
    center at 0): f32 [h w C], without rounding where the image has whole values; outside is 0."""
    height, width, channels = image.shape
    # Two black pixels on each side, so that a point outside reads black without a mask for each of
    # the four corners.
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
    """A box of a random share of the area and a random ratio of sides, resized to the whole: [H W
    C] -> f32 [H W C], whole values as the loader's crops have, unless the image is of floats.

    Inception's augmentation (https://arxiv.org/abs/1409.4842, section 6) as torchvision does it:
    ten tries, the first box that fits; the whole image where none does.
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
    """A square of `side` pixels set to 0, which is the mean once the image is normalized: [H W C]
    -> [H W C].

    Its center is uniform over the image, so that part of it may lie outside
    (https://arxiv.org/abs/1708.04552).
    """
    height, width, _ = image.shape
    center = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    box = jnp.array([side, side])
    return jnp.where(_inside(center - side // 2, box, height, width), 0.0, image)


def pca_color(
    key: Array, image: Array, deviation: float, covariance: Sequence[Sequence[float]]
) -> Array:
    """AlexNet's change of the light's color: [H W C] of 0..255 -> f32 [H W C], not clipped.

    Section 4.1 of the paper adds to every pixel the eigenvectors of the colors' covariance, each
    times its eigenvalue and a normal number of standard deviation 0.1. That sum has the
    distribution of the covariance times normal numbers, with no eigenvector to compute. Eigenvalues
    are those of colors in 0..1: of 0..255 they would be 255 times as large beside the pixels.
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
    """With that probability a box of noise, each value one of 256 from 0 to `white`: [H W C] -> f32
    [H W C].

    Random erasing (https://arxiv.org/abs/1708.04896, algorithm 1), its shares of the area and
    ratios of height to width. There a box that does not fit is drawn again with its corner, which
    favors small ones; here ten sizes are drawn, and the first that fits is put anywhere.
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
    """Where a box of height and width `box` [2] lies whose upper left corner is `low`: [H W 1]."""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y >= low[0]) & (y < low[0] + box[0]) & (x >= low[1]) & (x < low[1] + box[1])
    return inside[..., None]
