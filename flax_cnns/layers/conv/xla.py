"""The three products of a convolution by XLA's own convolution.

The products are computed like the derivatives of `lax.conv_general_dilated`. They run on GPU and
TPU, and on a CPU if no algorithm of ours is faster.
"""

from __future__ import annotations

from typing import Any

from jax import lax

from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.types import Array


def forward(x: Array, kernel: Array, geometry: ConvGeometry, precision: Any = None) -> Array:
    """Returns the output: [N H W C], [kh kw C/groups O] -> [N H' W' O]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
        precision=precision,
    )


def input_grad(dy: Array, kernel: Array, geometry: ConvGeometry, precision: Any = None) -> Array:
    """Returns the gradient of the input: [N H' W' O], [kh kw C/groups O] -> [N H W C].

    The strides become gaps of zeros in dy.
    """
    groups = geometry.groups
    if groups > 1:
        kh, kw, size, features = kernel.shape
        kernel = kernel.reshape(kh, kw, size, groups, features // groups)
        kernel = kernel.transpose(0, 1, 3, 2, 4).reshape(kh, kw, groups * size, -1)
    padding = []
    for n, before, reach, spread in _axes(geometry):
        padding.append((reach - before, n - spread + before))
    return lax.conv_general_dilated(
        dy,
        lax.rev(kernel, (0, 1)),
        (1, 1),
        padding,
        lhs_dilation=geometry.strides,
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWOI", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


def kernel_grad(x: Array, dy: Array, geometry: ConvGeometry, precision: Any = None) -> Array:
    """Returns the gradient of the kernel: [N H W C], [N H' W' O] -> [kh kw C/groups O].

    dy takes the place of the kernel, and the images are summed.
    """
    padding = []
    for n, before, reach, spread in _axes(geometry):
        padding.append((before, reach + spread - n - before))
    return lax.conv_general_dilated(
        x,
        dy,
        geometry.dilation,
        padding,
        rhs_dilation=geometry.strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=geometry.groups,
        precision=precision,
    )


def _axes(geometry: ConvGeometry) -> list[tuple[int, int, int, int]]:
    """Returns (pixels, padding before them, reach, spread) for height and for width.

    `reach` is the distance from the kernel's first tap to its last. `spread` is the number of
    pixels from the first output's position to the last's.
    """
    g = geometry
    axes = []
    for axis in (0, 1):
        reach = (g.kernel_size[axis] - 1) * g.dilation[axis]
        spread = (g.out_size[axis] - 1) * g.strides[axis] + 1
        axes.append((g.in_size[axis], g.padding[axis][0], reach, spread))
    return axes
