"""`Conv` and `conv2d`: the convolution of all networks, as a module and as a function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_cnns.layers.conv.control_flow import is_inside_control_flow
from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.layers.conv.primitive import forward_p
from flax_cnns.types import Array


class Conv(nn.Conv):
    """Drop-in replacement of `nn.Conv`, faster on a CPU: [N H W C] -> [N H' W' features].

    Fields, parameters and results are those of `nn.Conv`. `padding=1` pads both sides, as PyTorch
    does; `"SAME"` is TensorFlow's, which differs at stride 2. In the body of your own `nn.scan`,
    `nn.cond` or loop, open `layers.inside_control_flow()`: XLA's own convolution is many times
    slower there on a CPU. Policies of `jax.checkpoint` that depend on JAX's own primitives
    (`checkpoint_dots`) do not save the output of this layer.
    """

    def __post_init__(self) -> None:
        if self.conv_general_dilated is None:
            self.conv_general_dilated = conv_general_dilated
        super().__post_init__()


def conv2d(
    x: Array,
    kernel: Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
) -> Array:
    """Convolves images: [N H W C], kernel [kh kw C/groups O] -> [N H' W' O].

    The result is that of `lax.conv_general_dilated`. `padding` is "SAME" (TensorFlow's), "VALID", a
    number for all sides, or a number or pair (before, after) for height and another for width.
    `dilation` is the kernel's. `precision` has an effect on GPU and TPU only. Inside a scan, a cond
    or a loop, open `layers.inside_control_flow()`. Raises the errors of `lax.conv_general_dilated`
    (TypeError, ValueError) for shapes that do not fit.
    """
    pair = lambda v: (v, v) if isinstance(v, Integral) else tuple(v)  # noqa: E731
    pads = padding if isinstance(padding, str) else [pair(p) for p in pair(padding)]
    return conv_general_dilated(
        x,
        kernel,
        pair(strides),
        pads,
        rhs_dilation=pair(dilation),
        feature_group_count=groups,
        precision=precision,
    )


_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    x: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Array:
    """Drop-in replacement of `lax.conv_general_dilated`, with the default layout NHWC, HWIO, NHWC.

    Plain image convolutions of floating-point numbers use our primitive. All others call JAX's own
    function.
    """
    library = partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=_LAYOUT if dimension_numbers is None else dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    out = jax.eval_shape(library, x, kernel)  # also checks the shapes
    dilation = tuple(int(d) for d in rhs_dilation or (1, 1))
    plain = (
        x.ndim == 4
        and dimension_numbers in (None, _LAYOUT, _layout_numbers(x, kernel))
        and not any(n != 1 for n in lhs_dilation or ())
        and batch_group_count == 1
        and len(dilation) == 2
        and min(window_strides) > 0
        and preferred_element_type in (None, x.dtype)
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize > 1
        and not any(0 in v.shape for v in (x, kernel, out))
        and all(isinstance(n, int) for n in x.shape[1:])  # the batch size may be symbolic
        and not (is_sharded(x) or is_sharded(kernel))
    )
    if not plain:
        return library(x, kernel)
    if isinstance(padding, str):
        spread = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation)]
        padding = lax.padtype_to_pads(x.shape[1:3], spread, window_strides, padding)
    rows, columns = padding
    geometry = ConvGeometry(
        in_size=(x.shape[1], x.shape[2]),
        kernel_size=(kernel.shape[0], kernel.shape[1]),
        out_size=(out.shape[1], out.shape[2]),
        strides=(int(window_strides[0]), int(window_strides[1])),
        padding=((int(rows[0]), int(rows[1])), (int(columns[0]), int(columns[1]))),
        dilation=(dilation[0], dilation[1]),
        groups=int(feature_group_count),
        control_flow=is_inside_control_flow(),
    )
    precision = tuple(precision) if isinstance(precision, list) else precision
    x, kernel = _align_varying_axes(x, kernel)
    return forward_p.bind(x, kernel, geometry=geometry, precision=precision)


def _layout_numbers(x: Array, kernel: Array) -> lax.ConvDimensionNumbers:
    return lax.conv_dimension_numbers(x.shape, kernel.shape, _LAYOUT)


def is_sharded(x: Array) -> bool:
    """Whether x is sharded over a mesh with explicit axes.

    Such a sharding is part of the array's type, and only JAX's own functions follow it.
    """
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _align_varying_axes(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Inside `shard_map(check_vma=True)`, lets both arrays vary over the axes of either."""
    x_axes, kernel_axes = (jax.typeof(v).mat.varying for v in (x, kernel))
    return _vary_over(kernel_axes - x_axes, x), _vary_over(x_axes - kernel_axes, kernel)


def _vary_over(axes: frozenset[Any], x: Array) -> Array:
    return lax.pcast(x, tuple(axes), to="varying") if axes else x
