"""Blurs: defocus, glass, motion, zoom and Gaussian.

Each function takes (image f32 [H W C] in 0..1, key, constants of one severity) and returns f32
[H W C]; each `prepare_...` returns the constants of all severities, stacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cnns.evaluation.corruptions.matrices import (
    apply_matrices,
    make_gaussian_matrix,
    make_zoom_matrix,
)
from flax_cnns.types import Array

Values = Sequence[tuple[float, ...]]  # one row of numbers for each severity
Shape = tuple[int, int, int]  # H, W, C


def blur_gaussian(image: Array, key: Array, constants: Any) -> Array:
    """Blurs with a Gaussian; constants: {"rows", "columns"}, matrices."""
    del key
    return apply_matrices(constants["rows"], constants["columns"], image)


def prepare_gaussian(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (standard deviation in pixels,)."""
    rows, columns = (
        np.stack([make_gaussian_matrix(side, value[0], "nearest") for value in values])
        for side in shape[:2]
    )
    return {"rows": rows, "columns": columns}


# ---- defocus


def blur_defocus(image: Array, key: Array, constants: Any) -> Array:
    """Averages over a disk; constants: {"kernel" f32 [k k]}. The border is mirrored."""
    del key
    kernel = constants["kernel"]
    half = kernel.shape[0] // 2
    padded = jnp.pad(image, ((half, half), (half, half), (0, 0)), mode="reflect")
    blurred = lax.conv_general_dilated(
        padded.transpose(2, 0, 1)[..., None],
        kernel[..., None, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return blurred[..., 0].transpose(1, 2, 0)


def prepare_defocus(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (radius in pixels, standard deviation of the disk's own smoothing)."""
    del shape
    kernels = [make_disk(radius, smoothing) for radius, smoothing in values]
    half = max(len(kernel) // 2 for kernel in kernels)
    return {"kernel": np.stack([np.pad(each, half - len(each) // 2) for each in kernels])}


def make_disk(radius: float, smoothing: float) -> np.ndarray:
    """Returns a disk whose edge is smoothed by 3x3 or 5x5 pixels, f32 [k k], without empty rows."""
    reach, taps = (8, 3) if radius <= 8 else (math.ceil(radius), 5)
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    window = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * smoothing**2))
    window /= window.sum()
    for axis in (0, 1):
        padded = np.pad(
            disk, [(taps // 2,) * 2 if a == axis else (0, 0) for a in (0, 1)], "reflect"
        )
        disk = np.apply_along_axis(np.convolve, axis, padded, window, "valid")
    used = np.flatnonzero(disk.max(0) > 1e-12)
    return disk[used[0] : used[-1] + 1, used[0] : used[-1] + 1].astype(np.float32)


# ---- glass


def blur_glass(image: Array, key: Array, constants: Any) -> Array:
    """Blurs, moves pixels to random places nearby, and blurs again.

    Constants: {"rows", "columns"} of the blur, "delta" (the largest move in pixels), "active" bool
    [iterations]. See `draw_glass` for how pixels move.
    """
    blur = blur_gaussian(image, key, constants)
    pixels = jnp.floor(255 * jnp.clip(blur, 0, 1) + 1e-3)
    height, width, channels = image.shape
    for i in range(constants["active"].shape[0]):
        offsets = jax.random.uniform(jax.random.fold_in(key, i), (2, height, width))
        source = draw_glass(offsets, constants["delta"])
        moved = pixels.reshape(-1, channels)[source].reshape(image.shape)
        pixels = jnp.where(constants["active"][i], moved, pixels)
    return blur_gaussian(pixels / 255, key, constants)


def draw_glass(offsets: Array, delta: Array) -> Array:
    """Returns for each pixel the number of the pixel whose value it gets, i32 [H W].

    `offsets`: f32 [2 H W], uniform in 0..1, for the vertical and the horizontal move, which are
    integers from -delta to delta - 1. The published images come from a loop over the pixels from
    the last to the first. It is meant to swap a pixel with the one at the offset, but in images
    with channels it copies: NumPy's rows are views. We copy as well, also in gray images. A pixel
    can get a value that was copied earlier; pointer doubling follows all such chains at once.
    """
    _, height, width = offsets.shape
    size = height * width
    moves = jnp.floor(offsets * 2 * delta).astype(jnp.int32) - delta
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    is_moved = ((y > delta) & (y <= height - delta)) & ((x > delta) & (x <= width - delta))
    number = y * width + x
    source = jnp.where(is_moved, number + moves[0] * width + moves[1], number).reshape(-1)
    # Nodes 0..size-1 are the pixels afterwards, the others are the pixels before.
    earlier = (source > jnp.arange(size)) & is_moved.reshape(-1)[source]
    following = jnp.concatenate(
        [jnp.where(earlier, source, source + size), size + jnp.arange(size)]
    )
    for _ in range(math.ceil(math.log2(size + 1))):
        following = following[following]
    return following[:size].reshape(height, width) - size


def prepare_glass(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (standard deviation of the blur, largest move, iterations)."""
    most = int(max(value[2] for value in values))
    return {
        **prepare_gaussian(values, shape),
        "delta": np.array([value[1] for value in values], np.int32),
        "active": np.arange(most) < np.array([value[2] for value in values])[:, None],
    }


# ---- motion


def blur_motion(image: Array, key: Array, constants: Any) -> Array:
    """Blurs along a random line within 45 degrees of the horizontal; constants: {"weights"}."""
    angle = jax.random.uniform(key, (), minval=-math.pi / 4, maxval=math.pi / 4)
    return blur_along(image, angle, constants["weights"])


def blur_along(image: Array, angle: Array, weights: Array) -> Array:
    """Averages the pixels on a line that starts at each pixel, as ImageMagick's motion blur.

    `weights` f32 [k]: of the pixel at distance 0, 1, ... in the direction `angle` (radians).
    Pixels outside the image have the value of the nearest pixel.
    """
    weights = jnp.asarray(weights)
    reach = weights.shape[0] - 1
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")

    def add(i: Array, total: Array) -> Array:
        y = jnp.ceil(i * jnp.sin(angle) - 0.5).astype(jnp.int32)
        x = jnp.ceil(i * jnp.cos(angle) - 0.5).astype(jnp.int32)
        part = lax.dynamic_slice(padded, (reach + y, reach + x, 0), image.shape)
        return total + weights[i] * part

    return lax.fori_loop(0, reach + 1, add, jnp.zeros_like(image))


def prepare_motion(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (radius in pixels, standard deviation). The line has 2 radius + 1 pixels, whose
    weights are half a Gaussian."""
    del shape
    most = int(max(2 * radius + 1 for radius, _ in values))
    line = np.arange(most)
    rows = []
    for radius, sigma in values:
        weights = np.exp(-(line**2) / (2 * sigma**2)) * (line < 2 * radius + 1)
        rows.append(weights / weights.sum())
    return {"weights": np.array(rows, np.float32)}


# ---- zoom


def blur_zoom(image: Array, key: Array, constants: Any) -> Array:
    """Averages the image and enlargements of its center; constants: {"rows" f32 [Z H H],
    "columns" f32 [Z W W], "share"}, where unused enlargements are zero."""
    del key

    def add(total: Array, zoom: tuple[Array, Array]) -> tuple[Array, None]:
        return total + apply_matrices(*zoom, image), None

    total, _ = lax.scan(add, image, (constants["rows"], constants["columns"]))
    return total * constants["share"]


def prepare_zoom(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (end, step): the factors are 1, 1 + step, ... below `end`."""
    factors = [np.arange(1, end, step) for end, step in values]
    most = max(map(len, factors))
    stacks = []
    for side in shape[:2]:
        matrices = np.zeros((len(values), most, side, side), np.float32)
        for severity, some in enumerate(factors):
            for i, factor in enumerate(some):
                matrices[severity, i] = make_zoom_matrix(side, factor)
        stacks.append(matrices)
    share = np.array([1 / (len(some) + 1) for some in factors], np.float32)
    return {"rows": stacks[0], "columns": stacks[1], "share": share}
