"""The three products of a convolution as XLA's own, written as the derivatives of
`lax.conv_general_dilated` are: what runs on GPU and TPU, and on a CPU where nothing is faster."""

from __future__ import annotations

from typing import Any

from jax import lax

from flax_cnns.layers.window import Window
from flax_cnns.types import Array


def forward(x: Array, kernel: Array, w: Window, precision: Any = None) -> Array:
    """[N H W C], [kh kw C/groups O] -> [N H' W' O]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        w.strides,
        w.padding,
        rhs_dilation=w.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=w.groups,
        precision=precision,
    )


def input_grad(dy: Array, kernel: Array, w: Window, precision: Any = None) -> Array:
    """[N H' W' O], [kh kw C/groups O] -> [N H W C]: the strides' gaps filled with zeros."""
    if w.groups > 1:
        kh, kw, size, features = kernel.shape
        kernel = kernel.reshape(kh, kw, size, w.groups, features // w.groups)
        kernel = kernel.transpose(0, 1, 3, 2, 4).reshape(kh, kw, w.groups * size, -1)
    padding = []
    for n, k, out, stride, (before, _), d in zip(*w[:5], w.dilation):
        reach, spread = (k - 1) * d, (out - 1) * stride + 1
        padding.append((reach - before, n - spread + before))
    return lax.conv_general_dilated(
        dy,
        lax.rev(kernel, (0, 1)),
        (1, 1),
        padding,
        lhs_dilation=w.strides,
        rhs_dilation=w.dilation,
        dimension_numbers=("NHWC", "HWOI", "NHWC"),
        feature_group_count=w.groups,
        precision=precision,
    )


def kernel_grad(x: Array, dy: Array, w: Window, precision: Any = None) -> Array:
    """[N H W C], [N H' W' O] -> [kh kw C/groups O]: dy as the kernel, images summed."""
    padding = []
    for n, k, out, stride, (before, _), d in zip(*w[:5], w.dilation):
        reach, spread = (k - 1) * d, (out - 1) * stride + 1
        padding.append((before, reach + spread - n - before))
    return lax.conv_general_dilated(
        x,
        dy,
        w.dilation,
        padding,
        rhs_dilation=w.strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=w.groups,
        precision=precision,
    )
