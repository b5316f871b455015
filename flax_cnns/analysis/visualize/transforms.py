"""Random shifts, scales and rotations, against which a visualization must be robust."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.types import Array

PAD, FIRST_JITTER, LAST_JITTER = 12, 8, 4  # pixels
LOW_SCALE, HIGH_SCALE, DEGREES = 0.9, 1.1, 10.0


def transform(images: Array, key: Array) -> Array:
    """Returns images [N H W C] in 0..1, moved, scaled and rotated alike, of the same size.

    Padded by 12 pixels of gray, moved by up to 8 pixels, scaled by 0.9 to 1.1, rotated by up to 10
    degrees, moved by up to 4 pixels, cropped. Equal keys give equal images.
    """
    first, scale, angle, last = jax.random.split(key, 4)
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), constant_values=0.5)
    size = (height + 2 * PAD - FIRST_JITTER, width + 2 * PAD - FIRST_JITTER)
    moved = _crop(padded, size, jax.random.randint(first, (2,), 0, FIRST_JITTER + 1))
    turned = warp(
        moved,
        jax.random.uniform(scale, (), minval=LOW_SCALE, maxval=HIGH_SCALE),
        jnp.deg2rad(jax.random.uniform(angle, (), minval=-DEGREES, maxval=DEGREES)),
    )
    middle = (2 * PAD - FIRST_JITTER - LAST_JITTER) // 2
    start = middle + jax.random.randint(last, (2,), 0, LAST_JITTER + 1)
    return _crop(turned, (height, width), start)


def warp(images: Array, scale: Array, angle: Array) -> Array:
    """Returns images [N H W C] enlarged by `scale` and rotated by `angle` (radians) around the
    center, bilinearly; outside is gray."""
    height, width = images.shape[1:3]
    middle = np.array([(height - 1) / 2, (width - 1) / 2], np.float32)
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - middle[0], jnp.arange(width) - middle[1], indexing="ij"
    )
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    places = [cos * rows - sin * columns + middle[0], sin * rows + cos * columns + middle[1]]

    def one(channel: Array) -> Array:
        return jax.scipy.ndimage.map_coordinates(
            channel, places, order=1, mode="constant", cval=0.5
        )

    moved = jax.vmap(one)(jnp.moveaxis(images, -1, 1).reshape(-1, height, width))
    return jnp.moveaxis(moved.reshape(len(images), -1, height, width), 1, -1)


def _crop(images: Array, size: tuple[int, int], start: Array) -> Array:
    n, _, _, c = images.shape
    return jax.lax.dynamic_slice(images, (0, start[0], start[1], 0), (n, *size, c))
