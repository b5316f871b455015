"""JPEG's loss, computed on the device: what an encoder and a decoder leave of an image.

ITU-T T.81, with what libjpeg does by default (and so Pillow): the tables of annex K scaled by the
quality, chroma at half the resolution, and a triangle filter that restores it. Only the lossless
coding is left out. libjpeg computes the cosine transform with integers and we with floats, so a
rounding may differ.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_cnns.evaluation.corruptions.blur import Shape, Values
from flax_cnns.types import Array

# T.81, tables K.1 and K.2
_LUMINANCE = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101
72 92 95 98 112 100 103 99"""
_CHROMINANCE = f"""
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
{"99 " * 32}"""

# The orthonormal cosine transform of 8 values, [frequency, place].
_COSINES = np.cos(np.pi / 8 * (np.arange(8) + 0.5) * np.arange(8)[:, None]) / 2
_COSINES[0] /= np.sqrt(2)


def compress_jpeg(image: Array, key: Array, constants: Any) -> Array:
    """Compresses and decompresses; constants: {"luminance", "chrominance"}, tables f32 [8 8]."""
    del key
    height, width, channels = image.shape
    pixels = jnp.round(255 * image).astype(jnp.int32)
    if channels == 1:
        return _code(pixels[..., 0], constants["luminance"])[..., None] / 255
    luma, blue, red = _split_colors(pixels)
    luma = _code(luma, constants["luminance"])
    blue, red = (
        _enlarge(_code(_halve(each), constants["chrominance"]))[:height, :width] - 128
        for each in (blue, red)
    )
    merged = [
        luma + ((91881 * red + 32768) >> 16),
        luma + ((-22554 * blue - 46802 * red + 32768) >> 16),
        luma + ((116130 * blue + 32768) >> 16),
    ]
    return jnp.clip(jnp.stack(merged, -1), 0, 255) / 255


def prepare_jpeg(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (quality,), 1 to 100."""
    del shape
    tables = {}
    for name, text in (("luminance", _LUMINANCE), ("chrominance", _CHROMINANCE)):
        base = np.array(text.split(), int).reshape(8, 8)
        rows = []
        for (quality,) in values:
            percent = int(5000 / quality) if quality < 50 else int(200 - 2 * quality)
            rows.append(np.clip((base * percent + 50) // 100, 1, 255))
        tables[name] = np.array(rows, np.float32)
    return tables


def _split_colors(pixels: Array) -> list[Array]:
    """Converts i32 [H W 3] to luma and two chroma planes i32 [H W], with 16 fractional bits."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    middle = (128 << 16) + 32767
    return [
        (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16,
        (-11059 * red - 21709 * green + 32768 * blue + middle) >> 16,
        (32768 * red - 27439 * green - 5329 * blue + middle) >> 16,
    ]


def _code(plane: Array, table: Array) -> Array:
    """Rounds the cosine coefficients of blocks of 8x8 pixels to multiples of `table`: i32 [h w]."""
    height, width = plane.shape
    padded = jnp.pad(plane, ((0, -height % 8), (0, -width % 8)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // 8, 8, -1, 8).astype(jnp.float32) - 128
    cosines = jnp.asarray(_COSINES, jnp.float32)
    waves = jnp.einsum("uy,aybx,vx->aubv", cosines, blocks, cosines, precision="highest")
    steps = table[None, :, None, :]
    waves = jnp.sign(waves) * jnp.floor(jnp.abs(waves) / steps + 0.5) * steps
    blocks = jnp.einsum("uy,aubv,vx->aybx", cosines, waves, cosines, precision="highest")
    plane = jnp.clip(jnp.round(blocks + 128), 0, 255).astype(jnp.int32)
    return plane.reshape(padded.shape)[:height, :width]


def _halve(plane: Array) -> Array:
    """Averages 2x2 pixels; libjpeg rounds a tie down in even columns and up in odd ones."""
    height, width = plane.shape
    padded = jnp.pad(plane, ((0, height % 2), (0, width % 2)), mode="edge")
    sums = padded.reshape(padded.shape[0] // 2, 2, -1, 2).sum((1, 3))
    return (sums + 1 + jnp.arange(sums.shape[1]) % 2) >> 2


def _enlarge(plane: Array) -> Array:
    """Doubles both sides; each pixel is 9/16, 3/16, 3/16 and 1/16 of its four nearest."""
    padded = jnp.pad(plane, 1, mode="edge")
    above, below = 3 * padded[1:-1] + padded[:-2], 3 * padded[1:-1] + padded[2:]
    rows = jnp.stack([above, below], 1).reshape(-1, padded.shape[1])
    left = (3 * rows[:, 1:-1] + rows[:, :-2] + 8) >> 4
    right = (3 * rows[:, 1:-1] + rows[:, 2:] + 7) >> 4
    return jnp.stack([left, right], 2).reshape(len(rows), -1)
