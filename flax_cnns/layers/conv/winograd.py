"""Winograd's F(2x2, 3x3): 3x3 convolutions with stride 1 as 16 matmuls.

Lavin & Gray 2015, https://arxiv.org/abs/1509.09308, section 4.1. Four outputs (2x2) need 16
products instead of 36, so there are 2.25 times fewer multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.layers.conv.taps import fence, pad_or_crop
from flax_cnns.types import Array

# 3 taps -> 4, and 3x3 taps -> 16: a matrix product, because XLA compiles one faster than sums.
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_G2 = np.kron(_G, _G)


def winograd(x: Array, kernel: Array, geometry: ConvGeometry, transposed: bool = False) -> Array:
    """Returns the output; `transposed` is explained in matmul.py.

    An infinite pixel or weight may give NaN where XLA's own convolution gives infinity, because
    the products are of differences of pixels and of sums of weights.
    """
    matrix = jnp.asarray(_G2[:, ::-1] if transposed else _G2, kernel.dtype)
    kernels = fence((matrix @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:]))
    tiles = _cut_tiles(x, geometry)  # [4 4 N th tw C]
    pixels = tiles.reshape(16, -1, tiles.shape[-1])
    products = jnp.einsum("apc,aoc->apo" if transposed else "apc,aco->apo", pixels, kernels)
    products = fence(products.reshape(*tiles.shape[:-1], -1))
    rows = [_outputs([products[i, j] for i in range(4)]) for j in range(4)]  # of 4 columns
    outputs = fence([_outputs([column[i] for column in rows]) for i in range(2)])
    y = jnp.stack([jnp.stack(line, 3) for line in outputs], 2)  # [N th 2 tw 2 O]
    n, th, _, tw, _, features = y.shape
    y = y.reshape(n, 2 * th, 2 * tw, features)
    return y[:, : geometry.out_size[0], : geometry.out_size[1]]


def winograd_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel."""
    height, width = geometry.out_size
    dy = fence(pad_or_crop(dy, ((0, height % 2), (0, width % 2))))  # to even sizes
    lines = fence(jnp.stack(_spread([dy[:, i::2] for i in range(2)])))
    outputs = fence(jnp.stack(_spread([lines[:, :, :, j::2] for j in range(2)]), 1))
    tiles = _cut_tiles(x, geometry)
    pixels = tiles.reshape(16, -1, tiles.shape[-1])
    products = jnp.einsum("apc,apo->aco", pixels, outputs.reshape(16, -1, outputs.shape[-1]))
    taps = jnp.asarray(_G2.T, products.dtype) @ products.reshape(16, -1)
    return taps.reshape(3, 3, *products.shape[1:])


def _cut_tiles(x: Array, geometry: ConvGeometry) -> Array:
    """Returns the transformed pixels of all tiles, [4 4 N tiles_h tiles_w C].

    Rows come first, then columns, each in one fused loop. The fences keep XLA from computing the
    rows again for each column. Six axes make its loops fast: with all positions in one axis, the
    loops would compute indices.
    """
    th, tw = -(-geometry.out_size[0] // 2), -(-geometry.out_size[1] // 2)
    (height, width), ((top, _), (left, _)) = geometry.in_size, geometry.padding
    below, right = 2 * th + 2 - height - top, 2 * tw + 2 - width - left
    x = fence(pad_or_crop(x, ((top, below), (left, right))))
    rows = fence(jnp.stack(_differences([x[:, i : i + 2 * th - 1 : 2] for i in range(4)])))
    columns = [rows[:, :, :, j : j + 2 * tw - 1 : 2] for j in range(4)]
    return fence(jnp.stack(_differences(columns), 1))


def _differences(d: Sequence[Array]) -> list[Array]:
    """Returns B^T d: of 4 pixels, 4 sums and differences."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _outputs(m: Sequence[Array]) -> list[Array]:
    """Returns A^T m: of 4 products, 2 outputs."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _spread(y: Sequence[Array]) -> list[Array]:
    """Returns A y: of 2 outputs' gradients, those of 4 products."""
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]
