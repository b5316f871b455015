"""The three products of a convolution on a CPU, by the algorithms that choose.py selects.

forward(x, kernel) -> y         [N H W C], [kh kw C/groups O] -> [N H' W' O]
input_grad(dy, kernel) -> dx    the transpose of forward with respect to x
kernel_grad(x, dy) -> dkernel   the transpose of forward with respect to the kernel
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from flax_cnns.layers.conv import choose, depthwise, grouped, matmul, winograd, xla
from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.types import Array


def forward(x: Array, kernel: Array, geometry: ConvGeometry, transposed: bool = False) -> Array:
    """Returns the output [N H' W' O].

    With `transposed`, for one group only, the kernel is [kh kw O C] with its taps in reverse order,
    as the input's gradient needs it. Transposing the array itself would cost more than the product.
    """
    features = kernel.shape[2] if transposed else kernel.shape[3]
    name = choose.forward_algorithm(_images(x), x.shape[-1], features, geometry)
    if geometry.groups > 1:
        return FORWARD[name](x, kernel, geometry)
    return FORWARD[name](x, kernel, geometry, transposed)


def kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel, [kh kw C/groups O]."""
    name = choose.kernel_grad_algorithm(_images(x), x.shape[-1], dy.shape[-1], geometry)
    return KERNEL_GRAD[name](x, dy, geometry)


def input_grad(dy: Array, kernel: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the input, [N H W C]."""
    name = choose.input_grad_algorithm(kernel.shape[2], kernel.shape[3], geometry)
    return INPUT_GRAD[name](dy, kernel, geometry)


def pieces_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """XLA's own gradient of the kernel, summed in float32 over pieces of the batch."""
    size = choose.images_per_piece(_images(x), x.shape[-1], dy.shape[-1], geometry)
    total = jnp.float32(0)
    for first in range(0, x.shape[0], size):
        piece = slice(first, first + size)
        total = total + xla.kernel_grad(x[piece], dy[piece], geometry)
    return total.astype(x.dtype)


def _images(x: Array) -> int:
    return x.shape[0] if isinstance(x.shape[0], int) else 1  # symbolic in an exported program


def library(x: Array, kernel: Array, geometry: ConvGeometry, transposed: bool = False) -> Array:
    """XLA's own convolution."""
    if transposed:
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    return xla.forward(x, kernel, geometry)


# ---------------------------------------------------------------------------- phases


def phases(dy: Array, kernel: Array, geometry: ConvGeometry) -> Array:
    """The input's gradient by one convolution of `dy` for each phase of the strides.

    The convolutions use the transposed kernel. Input row h contributes to output row
    (h + top - i * dilation) / stride for each tap i for which this is an integer. So with stride 2,
    even and odd rows meet different taps.
    """
    transposed = geometry.groups == 1  # for more groups, the kernel itself is transposed here
    if not transposed:
        kernel = _transpose(kernel, geometry.groups)
    lines = []
    for row in _phases(0, geometry):
        line = []
        for column in _phases(1, geometry):
            size = (row.size, column.size)
            taps = (row.taps, column.taps)
            if not transposed:
                taps = (row.reversed_taps, column.reversed_taps)
            if not (all(taps) and all(size)):
                shape = (dy.shape[0], *size, kernel.shape[2 if transposed else 3])
                line.append(jnp.zeros(shape, dy.dtype))
                continue
            part = kernel[tuple(slice(t.start, t.stop, t.step) for t in taps)]
            inner = ConvGeometry(
                in_size=geometry.out_size,
                kernel_size=(part.shape[0], part.shape[1]),
                out_size=size,
                strides=(1, 1),
                padding=(row.padding, column.padding),
                dilation=(row.dilation, column.dilation),
                groups=geometry.groups,
                control_flow=geometry.control_flow,
            )
            line.append(forward(dy, part, inner, transposed))
        lines.append(_interleave(line, 2, geometry.in_size[1]))
    return _interleave(lines, 1, geometry.in_size[0])


class _Phase(NamedTuple):
    """The rows r, r + stride, ... of dx, with the taps that they meet and their convolution."""

    size: int  # the number of rows
    taps: range
    reversed_taps: range  # the positions of `taps` in a kernel with its taps in reverse order
    padding: tuple[int, int]  # of dy
    dilation: int


def _phases(axis: int, geometry: ConvGeometry) -> list[_Phase]:
    stride, dilation = geometry.strides[axis], geometry.dilation[axis]
    kernel, in_size = geometry.kernel_size[axis], geometry.in_size[axis]
    top, step = geometry.padding[axis][0], stride // math.gcd(stride, dilation)
    phases = []
    for r in range(stride):
        size = max(0, -(-(in_size - r) // stride))
        taps = [i for i in range(kernel) if (r + top - i * dilation) % stride == 0]
        if not taps:
            phases.append(_Phase(size, range(0), range(0), (0, 0), 1))
            continue
        first, last = taps[0], taps[-1]
        gap = dilation * step // stride  # rows of dy between neighboring taps
        # The row of dy that the phase's row 0 meets at its first tap.
        offset = (r + top - first * dilation) // stride
        before = (len(taps) - 1) * gap - offset
        after = size - 1 + offset - (geometry.out_size[axis] - 1)
        backwards = range(kernel - 1 - last, kernel - first, step)
        phases.append(_Phase(size, range(first, last + 1, step), backwards, (before, after), gap))
    return phases


def _interleave(pieces: list[Array], axis: int, size: int) -> Array:
    """[a0 a1 ...], [b0 b1 ...] -> [a0 b0 a1 b1 ...] along `axis`, cut to `size` entries."""
    if len(pieces) == 1:
        return pieces[0]
    longest = pieces[0].shape[axis]
    pads = [[(0, longest - x.shape[a] if a == axis else 0) for a in range(x.ndim)] for x in pieces]
    stacked = jnp.stack([jnp.pad(x, pad) for x, pad in zip(pieces, pads)], axis + 1)
    shape = list(pieces[0].shape)
    shape[axis] = longest * len(pieces)
    return lax.slice_in_dim(stacked.reshape(shape), 0, size, axis=axis)


def _transpose(kernel: Array, groups: int) -> Array:
    """Transposes the kernel, taps reversed: [kh kw C/groups O] -> [kh kw O/groups C]."""
    kh, kw, per_group, features = kernel.shape
    kernel = kernel[::-1, ::-1].reshape(kh, kw, per_group, groups, features // groups)
    return kernel.transpose(0, 1, 4, 3, 2).reshape(kh, kw, features // groups, groups * per_group)


# ---------------------------------------------------------------------------- tables of algorithms

FORWARD: dict[str, Callable[..., Array]] = {
    "library": library,
    "pointwise": matmul.pointwise,
    "patches": matmul.patches,
    "shifted": matmul.shifted,
    "winograd": winograd.winograd,
    "depthwise": depthwise.depthwise,
    "rotated": grouped.rotated,
    "batched": grouped.batched,
    "blocks": grouped.blocks,
}
INPUT_GRAD: dict[str, Callable[..., Array]] = {
    "library": xla.input_grad,
    "patches": matmul.patches_input_grad,
    "phases": phases,
}
KERNEL_GRAD: dict[str, Callable[..., Array]] = {
    "library": xla.kernel_grad,
    "pointwise": matmul.pointwise_kernel_grad,
    "patches": matmul.patches_kernel_grad,
    "shifted": matmul.shifted_kernel_grad,
    "winograd": winograd.winograd_kernel_grad,
    "pieces": pieces_kernel_grad,
    "depthwise": depthwise.depthwise_kernel_grad,
    "batched": grouped.batched_kernel_grad,
    "blocks": grouped.blocks_kernel_grad,
}
