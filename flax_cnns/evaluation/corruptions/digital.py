"""Digital corruptions: contrast, elastic transform, pixelation, saturation. JPEG: see jpeg.py.

Each function takes (image f32 [H W C] in 0..1, key, constants of one severity) and returns f32
[H W C].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.evaluation.corruptions.blur import Shape, Values
from flax_cnns.evaluation.corruptions.matrices import (
    apply_matrices,
    make_box_matrix,
    make_gaussian_matrix,
)
from flax_cnns.types import Array


def reduce_contrast(image: Array, key: Array, constants: Any) -> Array:
    """Moves values toward the mean of their channel; constants: {"factor"}. RandAugment's contrast
    moves them toward the mean gray."""
    del key
    mean = image.mean((0, 1))
    return (image - mean) * constants["factor"] + mean


def change_saturation(image: Array, key: Array, constants: Any) -> Array:
    """Maps the saturation s of HSV to factor * s + offset; constants: {"factor", "offset"}.

    A gray image of one channel stays as it is. Gray pixels of color images count as red."""
    del key
    if image.shape[-1] == 1:
        return image
    value, low = image.max(-1, keepdims=True), image.min(-1, keepdims=True)
    saturation = (value - low) / jnp.where(value > 0, value, 1)
    wanted = jnp.clip(saturation * constants["factor"] + constants["offset"], 0, 1)
    is_gray = saturation <= 0
    stretched = value - (value - image) * wanted / jnp.where(is_gray, 1, saturation)
    return jnp.where(is_gray, value * (1 - wanted * jnp.array([0.0, 1.0, 1.0])), stretched)


# ---- pixelation


def pixelate(image: Array, key: Array, constants: Any) -> Array:
    """Shrinks and enlarges the image, as Pillow does with its BOX filter; constants: {"down_rows",
    "down_columns", "up_rows", "up_columns"}. Rounds after each of the four steps, as Pillow."""
    del key
    identity = [jnp.eye(side) for side in image.shape[:2]]
    pixels = jnp.round(255 * image)
    for way in ("down", "up"):
        pixels = apply_matrices(identity[0], constants[f"{way}_columns"], pixels)
        pixels = jnp.floor(pixels + 0.5 + 1e-4)
        pixels = apply_matrices(constants[f"{way}_rows"], identity[1], pixels)
        pixels = jnp.floor(pixels + 0.5 + 1e-4)
    return pixels / 255


def prepare_pixelate(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (share of the side that remains,). Empty rows and columns fill the matrices."""
    constants: dict[str, np.ndarray] = {}
    for name, side in (("rows", shape[0]), ("columns", shape[1])):
        down, up = np.zeros((2, len(values), side, side), np.float32)
        for severity, (share,) in enumerate(values):
            small = max(int(side * share), 1)
            down[severity, :small] = make_box_matrix(side, small)
            up[severity, :, :small] = make_box_matrix(small, side)
        constants |= {f"down_{name}": down, f"up_{name}": up}
    return constants


# ---- elastic transform


def deform(image: Array, key: Array, constants: Any) -> Array:
    """Applies a random affine map, then a smooth random displacement of each pixel."""
    key_corners, key_field = jax.random.split(key)
    corners = jax.random.uniform(key_corners, (3, 2), minval=-1, maxval=1)
    field = jax.random.uniform(key_field, (2, *image.shape[:2]), minval=-1, maxval=1)
    return deform_by(image, corners, field, constants)


def deform_by(image: Array, corners: Array, field: Array, constants: Any) -> Array:
    """Deforms with given random numbers in -1..1: `corners` f32 [3 2], `field` f32 [2 H W].

    Constants: "spread" (how many pixels the three corners move), "corners" f32 [3 3] (rows x, y, 1
    before the move) and its "inverse", {"rows", "columns"} that smooth the field, "amplitude" in
    pixels.
    """
    height, width, _ = image.shape
    before = constants["corners"]
    after = before[:, :2] + constants["spread"] * corners
    affine = jnp.matmul(constants["inverse"], after, precision="highest").T  # before -> after
    y, x = jnp.arange(height)[:, None] * 1.0, jnp.arange(width) * 1.0
    (a, b, shift_x), (c, d, shift_y) = affine
    determinant = a * d - b * c
    from_x = (d * (x - shift_x) - b * (y - shift_y)) / determinant
    from_y = (a * (y - shift_y) - c * (x - shift_x)) / determinant
    image = read_mirrored(image, from_y, from_x, mirror_at_centers)
    moves = apply_matrices(constants["rows"], constants["columns"], jnp.moveaxis(field, 0, -1))
    moves = constants["amplitude"] * moves
    return read_mirrored(image, y + moves[..., 1], x + moves[..., 0], mirror_at_edges)


def read_mirrored(image: Array, y: Array, x: Array, mirror: Callable[[Array, int], Array]) -> Array:
    """Reads [H W C] bilinearly at the points y, x f32 [h w]; `mirror` maps the numbers of pixels
    outside the image to pixels inside."""
    height, width, channels = image.shape
    flat = image.reshape(-1, channels)
    top, left = jnp.floor(y), jnp.floor(x)
    dy, dx = (y - top)[..., None], (x - left)[..., None]
    rows = [mirror(top.astype(jnp.int32) + i, height) * width for i in (0, 1)]
    columns = [mirror(left.astype(jnp.int32) + i, width) for i in (0, 1)]
    above, below = (flat[row + columns[0]] * (1 - dx) + flat[row + columns[1]] * dx for row in rows)
    return above * (1 - dy) + below * dy


def mirror_at_centers(i: Array, size: int) -> Array:
    """Mirrors at the centers of the first and the last pixel: 2 1 | 0 1 2 ... (OpenCV's 101)."""
    period = max(2 * (size - 1), 1)
    i = jnp.mod(i, period)
    return jnp.minimum(i, period - i)


def mirror_at_edges(i: Array, size: int) -> Array:
    """Mirrors at the image's edges: 1 0 | 0 1 2 ... (SciPy's reflect)."""
    i = jnp.mod(i, 2 * size)
    return jnp.minimum(i, 2 * size - 1 - i)


def prepare_deform(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (amplitude, standard deviation of the smoothing, spread of the corners), each as a
    share of the shorter side."""
    height, width, _ = shape
    side = min(height, width)
    numbers = side * np.array(values)
    middle, third = np.array([height // 2, width // 2]), side // 3
    points = [middle + third, [middle[0] + third, middle[1] - third], middle - third]
    corners = np.concatenate([np.array(points), np.ones((3, 1))], 1)
    rows, columns = (
        np.stack([make_gaussian_matrix(each, sigma, "reflect", 3.0) for sigma in numbers[:, 1]])
        for each in (height, width)
    )
    return {
        "amplitude": numbers[:, 0].astype(np.float32),
        "rows": rows,
        "columns": columns,
        "spread": numbers[:, 2].astype(np.float32),
        "corners": np.repeat(corners[None], len(values), 0).astype(np.float32),
        "inverse": np.repeat(np.linalg.inv(corners)[None], len(values), 0).astype(np.float32),
    }
