"""Noise: Gaussian, shot (Poisson), impulse (salt and pepper) and speckle noise.

Each function takes (image f32 [H W C] in 0..1, key, constants of one severity) and returns f32
[H W C]; the caller clips it to 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from flax_cnns.types import Array


def add_gaussian_noise(image: Array, key: Array, constants: Any) -> Array:
    """Adds normal noise; constants: {"scale"}, its standard deviation."""
    return image + constants["scale"] * jax.random.normal(key, image.shape)


def add_speckle_noise(image: Array, key: Array, constants: Any) -> Array:
    """Adds normal noise in proportion to each value; constants: {"scale"}."""
    return image + image * constants["scale"] * jax.random.normal(key, image.shape)


def add_impulse_noise(image: Array, key: Array, constants: Any) -> Array:
    """Sets a share of the values to 0 or 1, each with probability 1/2; constants: {"share"}."""
    drawn = jax.random.uniform(key, image.shape)
    image = jnp.where(drawn < constants["share"] / 2, 0.0, image)
    return jnp.where(drawn >= 1 - constants["share"] / 2, 1.0, image)


def add_shot_noise(image: Array, key: Array, constants: Any) -> Array:
    """Replaces each value x by Poisson(photons x) / photons. Values are rounded to 1/255 first.

    Constants: {"photons", "cumulative"}, where "cumulative" is what `tabulate_shot_noise` returns.
    A binary search in the cumulative distribution draws exactly and takes the same time for every
    value; JAX's own Poisson loops until the last value of the batch is accepted.
    """
    table = constants["cumulative"]  # f32 [256 K]
    width = table.shape[1]
    row = jnp.round(image * 255).astype(jnp.int32) * width
    drawn = jax.random.uniform(key, image.shape)
    count, step = jnp.zeros(image.shape, jnp.int32), width // 2
    flat = table.reshape(-1)
    while step:
        count += step * (flat[row + count + step - 1] < drawn)
        step //= 2
    count += flat[row + count] < drawn
    return count / constants["photons"]


def tabulate_shot_noise(
    values: Sequence[tuple[float, ...]], shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Returns {"photons" f32 [5], "cumulative" f32 [5 256 K]}: the probability of at most k photons
    for each of the 256 values. K is a power of two and at least the largest number of photons of a
    white value, because larger counts are white too."""
    del shape
    photons = np.array([value for (value,) in values])
    width = 1 << int(np.ceil(np.log2(photons.max())))
    means = photons[:, None, None] * (np.arange(256) / 255)[:, None]
    cumulative = stats.poisson.cdf(np.arange(width), means)
    return {
        "photons": photons.astype(np.float32),
        "cumulative": cumulative.astype(np.float32),
    }
