"""Winograd's F(2x2, 3x3): 3x3 convolutions with stride 1 as 16 matmuls.

Lavin & Gray 2015, https://arxiv.org/abs/1509.09308, section 4.1. Four outputs (2x2) need 16
products instead of 36, so there are 2.25 times fewer multiplications.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import jax.numpy as jnp

from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.layers.conv.matmul import multiply
from flax_cnns.layers.conv.taps import fence, flatten_positions, pad_or_crop
from flax_cnns.types import Array

Matrix = tuple[tuple[float, ...], ...]
# A row holds the factors of a weighted sum of inputs.
_B = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T: 4 pixels -> 4
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G: 3 taps -> 4
_A = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T: 4 products -> 2 outputs


def winograd(x: Array, kernel: Array, geometry: ConvGeometry, transposed: bool = False) -> Array:
    """Returns the output; `transposed` is explained in matmul.py.

    An infinite pixel may give NaN where XLA's own convolution gives infinity, because tiles are
    differences of pixels.
    """
    order = (2, 1, 0) if transposed else (0, 1, 2)
    kernels = fence(_transform(_G, _G, [[kernel[i, j] for j in order] for i in order]))
    products = [
        [multiply(p, k, transposed) for p, k in zip(pixels, line)]
        for pixels, line in zip(_tiles(x, geometry), kernels)
    ]
    outputs = fence(_transform(_A, _A, fence(products)))
    y = jnp.stack([jnp.stack(line, 3) for line in outputs], 2)  # [N th 2 tw 2 O]
    n, th, _, tw, _, features = y.shape
    y = y.reshape(n, 2 * th, 2 * tw, features)
    return y[:, : geometry.out_size[0], : geometry.out_size[1]]


def winograd_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel."""
    height, width = geometry.out_size
    dy = fence(pad_or_crop(dy, ((0, height % 2), (0, width % 2))))  # to even sizes
    outputs = [[dy[:, i::2, j::2] for j in range(2)] for i in range(2)]
    outputs = fence(_transform(_transpose(_A), _transpose(_A), outputs))
    products = [
        [flatten_positions(a).T @ flatten_positions(b) for a, b in zip(pixels, line)]
        for pixels, line in zip(_tiles(x, geometry), outputs)
    ]
    taps = _transform(_transpose(_G), _transpose(_G), fence(products))
    return jnp.stack([jnp.stack(line) for line in taps])


def _tiles(x: Array, geometry: ConvGeometry) -> list[list[Array]]:
    """Returns the transformed pixels of all tiles, as 4x4 arrays [N tiles_h tiles_w C]."""
    th, tw = -(-geometry.out_size[0] // 2), -(-geometry.out_size[1] // 2)
    (height, width), ((top, _), (left, _)) = geometry.in_size, geometry.padding
    below, right = 2 * th + 2 - height - top, 2 * tw + 2 - width - left
    x = fence(pad_or_crop(x, ((top, below), (left, right))))
    pixels = [
        [x[:, i : i + 2 * th - 1 : 2, j : j + 2 * tw - 1 : 2] for j in range(4)] for i in range(4)
    ]
    # The fences and the four axes make XLA's loops fast: with all positions in one axis, the loops
    # would compute indices.
    return fence(_transform(_B, _B, pixels))


def _transpose(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix))


def _transform(left: Matrix, right: Matrix, grid: list[list[Array]]) -> list[list[Array]]:
    """Returns left @ grid @ right^T, where the entries of the grid are arrays."""
    half = [[_combine(row, column) for column in zip(*grid)] for row in left]
    return [[_combine(row, line) for row in right] for line in half]


def _combine(factors: Sequence[float], arrays: Iterable[Array]) -> Array:
    """Returns the sum of the arrays times their factors, at least one of which is not 0."""
    total: Array | None = None
    for factor, x in zip(factors, arrays):
        if factor:
            term = x if factor == 1 else -x if factor == -1 else jnp.asarray(factor, x.dtype) * x
            total = term if total is None else total + term
    return cast(Array, total)
