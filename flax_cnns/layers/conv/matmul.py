"""Dense convolutions as matmuls: of positions, of adjacent patches, or one for each tap.

With `transposed`, the kernel is [kh kw O C] with its taps in reverse order, as the input's gradient
needs it. Transposing the array itself would cost more than the product.
"""

from __future__ import annotations

import jax.numpy as jnp

from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.layers.conv.taps import (
    assemble_kernel,
    fence,
    flatten_positions,
    pad_or_crop,
    pad_to_map,
    tap_overlaps,
    tap_views,
)
from flax_cnns.types import Array


def multiply(x: Array, kernel: Array, transposed: bool) -> Array:
    """[... C] times [C O], or with `transposed` times [O C] -> [... O]."""
    return jnp.einsum("...c,oc->...o" if transposed else "...c,co->...o", x, kernel)


# ---------------------------------------------------------------------------- pointwise


def pointwise(x: Array, kernel: Array, geometry: ConvGeometry, transposed: bool = False) -> Array:
    """A 1x1 kernel: one matmul over all (strided) positions."""
    (seen,) = tap_views(pad_or_crop(x, geometry.padding), geometry)
    return multiply(seen, kernel[0, 0], transposed)


def pointwise_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel, computed like `pointwise`."""
    (seen,) = tap_views(pad_or_crop(x, geometry.padding), geometry)
    return (flatten_positions(seen).T @ flatten_positions(dy))[None, None]


# ---------------------------------------------------------------------------- patches


def patches(x: Array, kernel: Array, geometry: ConvGeometry, transposed: bool = False) -> Array:
    """A kernel whose size is its stride: one matmul, because each pixel is in one patch."""
    kernel = kernel[::-1, ::-1].swapaxes(2, 3) if transposed else kernel
    return multiply(_cut_out(x, geometry), kernel.reshape(-1, kernel.shape[-1]), False)


def patches_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel, computed like `patches`."""
    taps = flatten_positions(_cut_out(x, geometry)).T @ flatten_positions(dy)
    return taps.reshape(*geometry.kernel_size, x.shape[-1], dy.shape[-1])


def patches_input_grad(dy: Array, kernel: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the input, computed like `patches`."""
    (kh, kw), (height, width) = geometry.kernel_size, geometry.out_size
    # The rows and columns that are in no patch.
    below, right = geometry.in_size[0] - height * kh, geometry.in_size[1] - width * kw
    channels = kernel.shape[2]
    pixels = multiply(dy, kernel.reshape(-1, kernel.shape[-1]), True)
    pixels = pixels.reshape(-1, height, width, kh, kw, channels).transpose(0, 1, 3, 2, 4, 5)
    pixels = pixels.reshape(-1, height * kh, width * kw, channels)
    return pad_or_crop(pixels, ((0, below), (0, right)))


def _cut_out(x: Array, geometry: ConvGeometry) -> Array:
    """Cuts the image into patches: [N H W C] -> [N H' W' kh*kw*C]."""
    (kh, kw), (height, width) = geometry.kernel_size, geometry.out_size
    x = x[:, : height * kh, : width * kw].reshape(x.shape[0], height, kh, width, kw, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)


# ---------------------------------------------------------------------------- shifted


def shifted(x: Array, kernel: Array, geometry: ConvGeometry, transposed: bool = False) -> Array:
    """One matmul for each tap, over the positions where it meets the image."""
    features = kernel.shape[2 if transposed else 3]
    total = jnp.zeros((x.shape[0], *geometry.out_size, features), x.dtype)
    for i, j, source, target in tap_overlaps(geometry):
        tap = kernel[-1 - i, -1 - j] if transposed else kernel[i, j]
        part = multiply(x[source], tap, transposed)
        total = total + pad_to_map(part, target, geometry.out_size)
    return fence(total)  # or each reader would add all taps again


def shifted_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel, computed like `shifted`."""
    shape, taps = (x.shape[-1], dy.shape[-1]), {}
    for i, j, source, target in tap_overlaps(geometry):
        taps[i, j] = flatten_positions(x[source]).T @ flatten_positions(dy[target])
    return assemble_kernel(taps, shape, geometry, x.dtype)
