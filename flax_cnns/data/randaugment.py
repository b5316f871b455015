"""RandAugment (https://arxiv.org/abs/1909.13719): a number of operations an image, each one of
fourteen with equal chances, all of one magnitude.

Operations take and give whole values 0..255 and round as Pillow does. Under vmap each branch of a
switch is computed for every image, so there is no switch: thirteen operations are of three kinds, a
table of 256 values for each channel, a blend with a duller image, an affine map, and every image
gets one of each kind, of which at most one does anything.

Magnitudes are torchvision's, from 0 to 30, the strongest that AutoAugment has; a sign is drawn for
what may go two ways. The paper calls the strongest 10, so that its 9 is 27 here. A translation by a
part of a pixel takes the nearest pixel, as Pillow's transform does; torchvision cuts it to whole
pixels first, so that 2.9 pixels are 3 here and 2 there.
"""

from __future__ import annotations

import math

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
    """[H W C] of 0..255 -> f32 [H W C], whole; C is 1 or 3. Fractions are rounded first."""
    key_operation, key_sign = jax.random.split(key)
    operations = jax.random.randint(key_operation, (number,), 0, len(OPERATIONS))
    signs = jax.random.rademacher(key_sign, (number,), jnp.float32)
    image = jnp.round(image).astype(jnp.int32)
    for i in range(number):
        image = apply_operation(image, operations[i], signs[i] * (magnitude / MAX_MAGNITUDE))
    return image.astype(jnp.float32)


def apply_operation(image: Array, operation: Array, strength: Array) -> Array:
    """Operation number `operation` of `OPERATIONS`: i32 [H W C] -> i32 [H W C]. `strength` is in
    -1..1; its sign counts for blends (less, more) but color's on gray images, and for maps."""
    image = _look_up(image, _tables(image, jnp.abs(strength)), operation)
    image = _blend(image, operation - len(_TABLES), strength)
    return _map(image, operation - len(_TABLES) - len(_BLENDS), strength)


def _look_up(image: Array, tables: list[Array], which: Array) -> Array:
    """Every value through the table [256 C] chosen; past the last: as it is."""
    which = jnp.where(which < len(tables), which, 0)
    return jnp.take_along_axis(
        lax.select_n(which, *tables), image.reshape(-1, image.shape[-1]), axis=0
    ).reshape(image.shape)


def _tables(image: Array, strength: Array) -> list[Array]:
    """One [256 C] for each of `_TABLES`."""
    pixels = image.reshape(-1, image.shape[-1])  # [H*W C]
    count, channels = pixels.shape
    same = jnp.broadcast_to(jnp.arange(256)[:, None], (256, channels))

    low, high = pixels.min(0), pixels.max(0)
    stretched = jnp.clip((same - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    stretched = jnp.where(high > low, stretched, same)

    # Each value goes where its rank is; the highest one's own pixels do not count.
    histogram = jnp.zeros((256, channels), jnp.int32).at[pixels, jnp.arange(channels)].add(1)
    step = (count - jnp.take_along_axis(histogram, high[None], axis=0)) // 255  # [1 C]
    below = jnp.cumsum(histogram, axis=0) - histogram
    flat = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    flat = jnp.where(step > 0, flat, same)

    lost = jnp.round(4 * strength).astype(jnp.int32)  # bits, of 8
    posterized = (same >> lost) << lost
    solarized = jnp.where(same >= 255 * (1 - strength), 255 - same, same)
    return [same, stretched, flat, posterized, solarized]


def _blend(image: Array, which: Array, strength: Array) -> Array:
    """Away from the dull image chosen of `_BLENDS`, or toward it; as it is if none is."""
    gray = _gray(image)
    mean = (2 * gray.sum() + gray.size) // (2 * gray.size)  # rounded
    dull = [gray, mean, 0, _smooth(image)]
    chosen = (which >= 0) & (which < len(dull))
    dull = [jnp.broadcast_to(x, image.shape).astype(jnp.int32) for x in dull]
    dull = lax.select_n(jnp.where(chosen, which, 0), *dull)
    further = jnp.where(chosen, _fixed(0.9 * strength), 0)
    # Rounded down, as Pillow does, but for what the factor's own rounding may have taken off.
    return jnp.clip(image + (further * (image - dull) + _ONE // 512) // _ONE, 0, 255)


def _gray(image: Array) -> Array:
    """[H W C] -> [H W 1]: ITU-R 601 in 16 bits of fraction."""
    if image.shape[-1] == 1:
        return image
    luma = jnp.array([19595, 38470, 7471])
    return ((image * luma).sum(-1, keepdims=True) + 0x8000) >> 16


def _smooth(image: Array) -> Array:
    """Means over 3x3, the middle five times as heavy as the rest; the border stays."""
    height, width, _ = image.shape
    inner = image[1:-1, 1:-1]
    total = 4 * inner
    for y in range(3):
        for x in range(3):
            total += image[y : y + height - 2, x : x + width - 2]
    return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)  # rounded


def _map(image: Array, which: Array, strength: Array) -> Array:
    """The pixel nearest to where the map chosen of `_MAPS` comes from; what is outside is black.

    At most: 0.3 pixels a row or column about the upper left corner, 150/331 of the side, 30 degrees
    about the center.
    """
    height, width, channels = image.shape
    angle = math.pi / 6 * strength * (which == 4)
    cos, sin = _fixed(jnp.cos(angle)), _fixed(jnp.sin(angle))
    shear = [_fixed(0.3 * strength) * (which == i) for i in (0, 1)]
    shift = [_fixed(300 / 331 * strength) * (which == i) for i in (2, 3)]
    # From the output pixel's center back to the input's; twice the distance from the corner.
    y, x = 2 * jnp.arange(height)[:, None] + 1, 2 * jnp.arange(width) + 1
    from_x = cos * (x - width) - sin * (y - height) + shear[0] * y + (shift[0] + _ONE) * width
    from_y = sin * (x - width) + cos * (y - height) + shear[1] * x + (shift[1] + _ONE) * height
    x, y = from_x // (2 * _ONE), from_y // (2 * _ONE)  # [H W], rounded down
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = jnp.where(inside, y * width + x, height * width)
    return jnp.take(image.reshape(-1, channels), place, axis=0, mode="fill", fill_value=0)


def _fixed(x: Array) -> Array:
    return jnp.round(_ONE * x).astype(jnp.int32)
