"""Weather: snow, fog, brightness, and a procedural frost.

Each function takes (image f32 [H W C] in 0..1, key, constants of one severity) and returns f32
[H W C].
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.evaluation.corruptions.blur import Shape, Values, blur_along, prepare_motion
from flax_cnns.evaluation.corruptions.matrices import apply_matrices, make_zoom_matrix
from flax_cnns.types import Array

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601

# The mean of the benchmark's six photographs of frost (red, green, blue), and the mean of their
# standard deviations: `python -m tests.evaluation.make_corruptions` prints them.
FROST_MEAN = (0.52, 0.61, 0.65)
FROST_STD = 0.11


def convert_to_gray(image: Array) -> Array:
    """Returns the luma of an image [H W C], C is 1 or 3: [H W 1]."""
    if image.shape[-1] == 1:
        return image
    return (image * jnp.asarray(LUMA)).sum(-1, keepdims=True)


# ---- snow


def add_snow(image: Array, key: Array, constants: Any) -> Array:
    """Whitens the image and adds blurred flakes, once as drawn and once turned by 180 degrees."""
    key_flakes, key_angle = jax.random.split(key)
    flakes = jax.random.normal(key_flakes, image.shape[:2])
    angle = jax.random.uniform(key_angle, (), minval=-135, maxval=-45)
    return lay_snow(image, flakes, angle, constants)


def lay_snow(image: Array, flakes: Array, angle: Array, constants: Any) -> Array:
    """Adds snow of given random numbers: `flakes` f32 [H W], standard normal; `angle` in degrees.

    Constants: {"mean", "scale"} of the flakes, {"rows", "columns"} of their enlargement,
    "threshold", {"weights"} of their motion blur, "keep" (the image's own share).
    """
    flakes = constants["mean"] + constants["scale"] * flakes[..., None]
    flakes = apply_matrices(constants["rows"], constants["columns"], flakes)
    flakes = jnp.where(flakes < constants["threshold"], 0, jnp.clip(flakes, 0, 1))
    flakes = blur_along(flakes, angle * math.pi / 180, constants["weights"])
    flakes = jnp.round(255 * flakes) / 255
    white = jnp.maximum(image, convert_to_gray(image) * 1.5 + 0.5)
    keep = constants["keep"]
    return keep * image + (1 - keep) * white + flakes + flakes[::-1, ::-1]


def prepare_snow(values: Values, shape: Shape) -> dict[str, np.ndarray]:
    """`values`: (mean, scale, enlargement, threshold, radius and standard deviation of the motion
    blur, the image's own share)."""
    columns = np.array(values, np.float32)
    rows, lines = (
        np.stack([make_zoom_matrix(side, value[2]) for value in values]) for side in shape[:2]
    )
    return {
        "mean": columns[:, 0],
        "scale": columns[:, 1],
        "rows": rows,
        "columns": lines,
        "threshold": columns[:, 3],
        "keep": columns[:, 6],
        **prepare_motion([(value[4], value[5]) for value in values], shape),
    }


# ---- fog


def add_fog(image: Array, key: Array, constants: Any) -> Array:
    """Adds a cloud and darkens the sum to the image's own largest value; constants: {"strength",
    "decay"}."""
    height, width, _ = image.shape
    side = 1 << math.ceil(math.log2(max(height, width)))
    cloud = make_plasma(jax.random.uniform(key, (side * side,)), constants["decay"])
    largest, strength = image.max(), constants["strength"]
    cloud = cloud[:height, :width, None]
    return (image + strength * cloud) * largest / (largest + strength)


def make_plasma(drawn: Array, decay: Array) -> Array:
    """Returns a cloud by the diamond-square algorithm on a torus, f32 [side side] in 0..1.

    `drawn`: f32 [side * side], uniform in 0..1, side a power of two. Every level halves the
    distance of the points, and divides the size of the random part by `decay`.
    """
    side = math.isqrt(drawn.shape[0])
    corners, used, amplitude = jnp.zeros((1, 1)), 0, jnp.float32(100.0)
    while len(corners) < side:
        n = len(corners)
        noise = drawn[used : used + 3 * n * n].reshape(3, n, n) * 2 - 1
        noise, used = amplitude**2 * noise, used + 3 * n * n
        below, right = jnp.roll(corners, -1, 0), jnp.roll(corners, -1, 1)
        squares = (corners + below + right + jnp.roll(below, -1, 1)) / 4 + noise[0]
        tops = (squares + jnp.roll(squares, 1, 0) + corners + right) / 4 + noise[1]
        lefts = (squares + jnp.roll(squares, 1, 1) + corners + below) / 4 + noise[2]
        even, odd = jnp.stack([corners, tops], -1), jnp.stack([lefts, squares], -1)
        corners = jnp.stack([even, odd], 1).reshape(2 * n, 2 * n)
        amplitude = amplitude / decay
    corners = corners - corners.min()
    return corners / corners.max()


# ---- brightness


def add_brightness(image: Array, key: Array, constants: Any) -> Array:
    """Raises the value of HSV; constants: {"amount"}. Hue and saturation stay."""
    del key
    value = image.max(-1, keepdims=True)
    raised = jnp.clip(value + constants["amount"], 0, 1)
    return jnp.where(value > 0, image * raised / jnp.where(value > 0, value, 1), raised)


# ---- frost


def add_procedural_frost(image: Array, key: Array, constants: Any) -> Array:
    """Blends the image with crystals; constants: {"keep", "frost"}, their shares.

    ImageNet-C pastes parts of six photographs, which may not be distributed. These crystals are
    ridges of clouds, with the photographs' mean and standard deviation, so its errors cannot be
    compared with published ones: it is left out of every mean.
    """
    height, width, channels = image.shape
    side = 1 << math.ceil(math.log2(max(height, width)))
    drawn = jax.random.uniform(key, (3, side * side))
    coarse, first, second = jax.vmap(make_plasma, (0, None))(drawn, jnp.float32(1.6))
    ridges = jnp.maximum(1 - jnp.abs(2 * first - 1), 1 - jnp.abs(2 * second - 1)) ** 6
    texture = (0.5 * ridges + 0.5 * coarse)[:height, :width, None]
    texture = (texture - texture.mean()) / (texture.std() + 1e-6)
    frost = jnp.clip(jnp.asarray(FROST_MEAN) + FROST_STD * texture, 0, 1)
    frost = convert_to_gray(frost) if channels == 1 else frost
    return constants["keep"] * image + constants["frost"] * frost
