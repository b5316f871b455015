"""RandAugment (https://arxiv.org/abs/1909.13719): some random operations per image, each drawn
uniformly from fourteen, all with the same magnitude.

Operations map integers in 0..255 to integers in 0..255, and round as Pillow does. There is no
`lax.switch`, because under vmap every branch would be computed for every image. Instead, all
operations except the identity belong to three kinds: a table of 256 values per channel, a blend
with a degenerate image, or an affine map. Every image passes through one operation of each kind,
and at most one of the three changes the image.

Magnitudes are torchvision's, from 0 to 30, the strongest of AutoAugment. Operations with two
directions get a random sign. The paper's scale ends at 10, so its 9 is 27 here. A translation by a
fraction of a pixel takes the nearest pixel, as Pillow's transform does. torchvision truncates the
translation to whole pixels first: 2.9 pixels are 3 here and 2 there.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_cnns.types import Array

MAX_MAGNITUDE = 30
_ONE = 2**16  # in fixed point; see augment.py for why
_TABLES = ("identity", "auto_contrast", "equalize", "posterize", "solarize")
_BLENDS = ("color", "contrast", "brightness", "sharpness")
_MAPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS = _TABLES + _BLENDS + _MAPS


def randaugment(key: Array, image: Array, number: int, magnitude: float) -> Array:
    """Applies `number` random operations: [H W C] in 0..255 -> f32 [H W C] with integer values.
    C is 1 or 3. The image's values are rounded first."""
    key_operation, key_sign = jax.random.split(key)
    operations = jax.random.randint(key_operation, (number,), 0, len(OPERATIONS))
    signs = jax.random.rademacher(key_sign, (number,), jnp.float32)
    image = jnp.round(image).astype(jnp.int32)
    for i in range(number):
        image = apply_operation(image, operations[i], signs[i] * (magnitude / MAX_MAGNITUDE))
    return image.astype(jnp.float32)


def apply_operation(image: Array, operation: Array, strength: Array) -> Array:
    """Applies `OPERATIONS[operation]`: i32 [H W C] -> i32 [H W C].

    `strength` is in -1..1. Tables ignore its sign. A blend reduces or increases the property, and
    an affine map reverses its direction. Color does not change gray images.
    """
    image = _look_up(image, _tables(image, jnp.abs(strength)), operation)
    image = _blend(image, operation - len(_TABLES), strength)
    return _map(image, operation - len(_TABLES) - len(_BLENDS), strength)


def _look_up(image: Array, tables: list[Array], which: Array) -> Array:
    """Maps every value through table number `which` [256 C]. For larger numbers the image is
    unchanged, because table 0 is the identity."""
    which = jnp.where(which < len(tables), which, 0)
    return jnp.take_along_axis(
        lax.select_n(which, *tables), image.reshape(-1, image.shape[-1]), axis=0
    ).reshape(image.shape)


def _tables(image: Array, strength: Array) -> list[Array]:
    """Returns a table [256 C] for each of `_TABLES`."""
    pixels = image.reshape(-1, image.shape[-1])  # [H*W C]
    count, channels = pixels.shape
    same = jnp.broadcast_to(jnp.arange(256)[:, None], (256, channels))

    low, high = pixels.min(0), pixels.max(0)
    stretched = jnp.clip((same - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    stretched = jnp.where(high > low, stretched, same)

    # Each value is mapped to its rank. As in Pillow, the pixels of the highest value do not count.
    histogram = jnp.zeros((256, channels), jnp.int32).at[pixels, jnp.arange(channels)].add(1)
    step = (count - jnp.take_along_axis(histogram, high[None], axis=0)) // 255  # [1 C]
    below = jnp.cumsum(histogram, axis=0) - histogram
    flat = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    flat = jnp.where(step > 0, flat, same)

    bits = jnp.round(4 * strength).astype(jnp.int32)  # to clear, of 8
    posterized = (same >> bits) << bits
    solarized = jnp.where(same >= 255 * (1 - strength), 255 - same, same)
    return [same, stretched, flat, posterized, solarized]


def _blend(image: Array, which: Array, strength: Array) -> Array:
    """Extrapolates away from the degenerate image of blend number `which` of `_BLENDS`, or toward
    it if `strength` is negative. For other numbers the image is unchanged."""
    gray = _gray(image)
    mean = (2 * gray.sum() + gray.size) // (2 * gray.size)  # rounded
    degenerates: list[Any] = [gray, mean, 0, _smooth(image)]
    is_blend = (which >= 0) & (which < len(degenerates))
    images = [jnp.broadcast_to(x, image.shape).astype(jnp.int32) for x in degenerates]
    degenerate = lax.select_n(jnp.where(is_blend, which, 0), *images)
    factor = jnp.where(is_blend, _fixed(0.9 * strength), 0)
    # Rounded down, as Pillow does, after adding back what rounding the factor may have taken away.
    return jnp.clip(image + (factor * (image - degenerate) + _ONE // 512) // _ONE, 0, 255)


def _gray(image: Array) -> Array:
    """Converts to gray by ITU-R 601, with 16 fractional bits: [H W C] -> [H W 1]."""
    if image.shape[-1] == 1:
        return image
    luma = jnp.array([19595, 38470, 7471])
    return ((image * luma).sum(-1, keepdims=True) + 0x8000) >> 16


def _smooth(image: Array) -> Array:
    """Averages over 3x3 pixels, with weight 5 for the center and 1 for the others. The border is
    unchanged."""
    height, width, _ = image.shape
    inner = image[1:-1, 1:-1]
    total = 4 * inner
    for y in range(3):
        for x in range(3):
            total += image[y : y + height - 2, x : x + width - 2]
    return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)  # rounded


def _map(image: Array, which: Array, strength: Array) -> Array:
    """Applies the affine map number `which` of `_MAPS`, reading the nearest pixel. Pixels outside
    the image are black. For other numbers the image is unchanged.

    At strength 1, a shear moves by 0.3 pixels per row or column from the upper left corner, a
    translation by 150/331 of the side, and a rotation by 30 degrees about the center.
    """
    height, width, channels = image.shape
    angle = math.pi / 6 * strength * (which == 4)
    cos, sin = _fixed(jnp.cos(angle)), _fixed(jnp.sin(angle))
    shear = [_fixed(0.3 * strength) * (which == i) for i in (0, 1)]
    shift = [_fixed(300 / 331 * strength) * (which == i) for i in (2, 3)]
    # From the center of each output pixel back to the input. The unit is half a pixel.
    y, x = 2 * jnp.arange(height)[:, None] + 1, 2 * jnp.arange(width) + 1
    from_x = cos * (x - width) - sin * (y - height) + shear[0] * y + (shift[0] + _ONE) * width
    from_y = sin * (x - width) + cos * (y - height) + shear[1] * x + (shift[1] + _ONE) * height
    x, y = from_x // (2 * _ONE), from_y // (2 * _ONE)  # [H W], rounded down
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = jnp.where(inside, y * width + x, height * width)
    return jnp.take(image.reshape(-1, channels), place, axis=0, mode="fill", fill_value=0)


def _fixed(x: Array) -> Array:
    return jnp.round(_ONE * x).astype(jnp.int32)
