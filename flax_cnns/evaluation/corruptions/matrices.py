"""Filters and resizings along one axis as matrices [out in], computed once with NumPy.

A matrix holds the filter with its border. All severities of a corruption have matrices of one
shape, so that one compiled program serves them all.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from flax_cnns.types import Array


def apply_matrices(rows: Array, columns: Array, image: Array) -> Array:
    """Returns rows @ image @ columns.T for each channel: f32 [i h], [j w], [h w C] -> [i j C]."""
    half = jnp.einsum("ih,hwc->iwc", rows, image, precision="highest")
    return jnp.einsum("jw,iwc->ijc", columns, half, precision="highest")


def make_gaussian_matrix(size: int, sigma: float, mode: str, truncate: float = 4.0) -> np.ndarray:
    """Returns the Gaussian filter of `scipy.ndimage` for `size` pixels, f32 [size size].

    `mode` is the border: "nearest" or "reflect" (half-sample symmetric)."""
    identity = np.eye(size)
    if sigma > 0:
        identity = ndimage.gaussian_filter1d(identity, sigma, 0, mode=mode, truncate=truncate)
    return identity.astype(np.float32)


def make_zoom_matrix(size: int, factor: float) -> np.ndarray:
    """Returns the linear enlargement of the central ceil(size / factor) pixels by `factor`, as
    `scipy.ndimage.zoom` with order 1 computes it; only its first `size` pixels, f32 [size size].

    The first and the last pixel of the part stay the first and last of the enlargement."""
    part = math.ceil(size / factor)
    first, out = (size - part) // 2, round(part * factor)
    places = np.arange(size) * (part - 1) / max(out - 1, 1)
    below = np.minimum(places.astype(int), max(part - 2, 0))
    share = np.minimum(places - below, 1)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size), first + below), 1 - share)
    np.add.at(matrix, (np.arange(size), first + np.minimum(below + 1, part - 1)), share)
    return matrix.astype(np.float32)


def make_box_matrix(size: int, out: int) -> np.ndarray:
    """Returns Pillow's resizing from `size` to `out` pixels with its BOX filter, f32 [out size]."""
    scale = size / out
    width = max(scale, 1.0)
    matrix = np.zeros((out, size))
    for i in range(out):
        center = (i + 0.5) * scale
        first = max(int(center - width / 2 + 0.5), 0)
        last = min(int(center + width / 2 + 0.5), size)
        places = (np.arange(first, last) - center + 0.5) / width
        inside = (places > -0.5) & (places <= 0.5)
        matrix[i, first:last] = inside / inside.sum()
    return matrix.astype(np.float32)
