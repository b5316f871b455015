"""Random shifts, scales, rotations and crops, against which a visualization must be robust.

`transform` is that of Lucid. Its scales and angles are lists with the same ends; ours are uniform.
`draw_crops` is that of Fel et al. 2023 (arXiv 2306.06805), as in their library Xplique.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.types import Array

PAD, FIRST_JITTER, LAST_JITTER = 12, 8, 4  # pixels
LOW_SCALE, HIGH_SCALE, DEGREES = 0.9, 1.1, 10.0
# Shares of the image: the spread of a crop's center and side, and the smallest side.
CENTER_SPREAD, SIDE_SPREAD, SMALLEST_SIDE = 0.15, 0.05, 0.05
NOISE = 0.04  # standard deviation; 0.08 in Xplique, whose pixels are in -1..1


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


def draw_crops(images: Array, key: Array, count: int, size: tuple[int, int], side: Array) -> Array:
    """Returns `count` square crops of each image, resized bilinearly to `size` and with noise:
    [N H W C] -> [N * count h w C].

    The center is N(0.5, 0.15) and the side N(`side`, 0.05), at least 0.05 and at most 1, as shares
    of the image; what is outside is gray. The noise is N(0, 0.04) plus uniform in -0.02..0.02.
    Equal keys give equal crops.
    """
    centers, sides, normal, uniform = jax.random.split(key, 4)
    n, height, width, channels = images.shape
    center = 0.5 + CENTER_SPREAD * jax.random.normal(centers, (2, n, count))
    spread = side + SIDE_SPREAD * jax.random.normal(sides, (n, count))
    half = jnp.clip(spread, SMALLEST_SIDE, 1) / 2
    rows = _interpolate(center[0] - half, center[0] + half, size[0], height)
    columns = _interpolate(center[1] - half, center[1] + half, size[1], width)
    crops = jnp.einsum("nkih,nhwc->nkiwc", rows, images - 0.5)
    crops = jnp.einsum("nkjw,nkiwc->nkijc", columns, crops) + 0.5
    crops = crops.reshape(n * count, *size, channels)
    crops += NOISE * jax.random.normal(normal, crops.shape)
    return crops + jax.random.uniform(uniform, crops.shape, minval=-NOISE / 2, maxval=NOISE / 2)


def _interpolate(first: Array, last: Array, count: int, pixels: int) -> Array:
    """Weights [... count pixels] of linear interpolation at `count` places from `first` to `last`,
    where 0 is the first pixel and 1 the last one. Outside, the weights are 0."""
    share = jnp.linspace(0, 1, count)
    places = first[..., None] + (last - first)[..., None] * share
    distance = jnp.abs(places[..., None] * (pixels - 1) - jnp.arange(pixels))
    return jnp.maximum(1 - distance, 0)


def _crop(images: Array, size: tuple[int, int], start: Array) -> Array:
    n, _, _, c = images.shape
    return jax.lax.dynamic_slice(images, (0, start[0], start[1], 0), (n, *size, c))
