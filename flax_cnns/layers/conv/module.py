"""`Conv` and `conv2d`: the convolution that every network uses, as a module and as a function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Integral

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_cnns.layers.conv.control_flow import is_inside_control_flow
from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.layers.conv.primitive import forward_p
from flax_cnns.types import Array


class Conv(nn.Conv):
    """`nn.Conv`: its fields, its parameters, its meaning; [N H W C] -> [N H' W' features].

    `padding=1` pads both sides as PyTorch does; `"SAME"` is TensorFlow's and differs at stride 2.
    In the body of `nn.scan`, `nn.cond` or a loop of your own, open `layers.inside_control_flow()`:
    XLA's own convolution is many times slower there on a CPU. Policies of `jax.checkpoint` that go
    by JAX's own primitives (`checkpoint_dots`) do not save its output.
    """

    def __post_init__(self):
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
    """[N H W C] with a kernel [kh kw C/groups O] -> [N H' W' O], as `lax.conv_general_dilated`.

    `padding` is "SAME" (TensorFlow's), "VALID", a number for all sides, or one number or pair
    (before, after) for height and for width. `dilation` spreads the kernel. `precision` serves GPU
    and TPU. Inside a scan, a cond or a loop: `layers.inside_control_flow`. Raises what
    `lax.conv_general_dilated` raises for shapes that do not fit (TypeError, ValueError).
    """
    pair = lambda v: (v, v) if isinstance(v, Integral) else tuple(v)  # noqa: E731
    if not isinstance(padding, str):
        padding = [pair(p) for p in pair(padding)]
    return conv_general_dilated(
        x,
        kernel,
        pair(strides),
        padding,
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
    """`lax.conv_general_dilated`, and the library's own where it is not a plain image convolution
    of floating point numbers."""
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
    out = jax.eval_shape(library, x, kernel)  # which checks the shapes too
    dilation = tuple(int(d) for d in rhs_dilation or (1, 1))
    plain = (
        x.ndim == 4
        and dimension_numbers in (None, _LAYOUT, _numbers(x, kernel))
        and not any(n != 1 for n in lhs_dilation or ())
        and batch_group_count == 1
        and len(dilation) == 2
        and min(window_strides) > 0
        and preferred_element_type in (None, x.dtype)
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize > 1
        and not any(0 in v.shape for v in (x, kernel, out))
        and all(isinstance(n, int) for n in x.shape[1:])  # the batch's may be symbolic
        and not (is_sharded(x) or is_sharded(kernel))
    )
    if not plain:
        return library(x, kernel)
    if isinstance(padding, str):
        spread = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation)]
        padding = lax.padtype_to_pads(x.shape[1:3], spread, window_strides, padding)
    geometry = ConvGeometry(
        in_size=x.shape[1:3],
        kernel_size=kernel.shape[:2],
        out_size=out.shape[1:3],
        strides=tuple(int(s) for s in window_strides),
        padding=tuple((int(a), int(b)) for a, b in padding),
        dilation=dilation,
        groups=int(feature_group_count),
        control_flow=is_inside_control_flow(),
    )
    precision = tuple(precision) if isinstance(precision, list) else precision
    return forward_p.bind(*_aligned(x, kernel), geometry=geometry, precision=precision)


def _numbers(x: Array, kernel: Array) -> lax.ConvDimensionNumbers:
    return lax.conv_dimension_numbers(x.shape, kernel.shape, _LAYOUT)


def is_sharded(x: Array) -> bool:
    """By a mesh with explicit axes: shardings that are types, which JAX's own functions obey."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _aligned(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Inside `shard_map(check_vma=True)`: both vary over the axes that either varies over."""
    axes = [jax.typeof(v).mat.varying for v in (x, kernel)]
    if axes[0] == axes[1]:
        return x, kernel
    missing = [tuple(axes[1] - axes[0]), tuple(axes[0] - axes[1])]
    return tuple(
        lax.pcast(v, names, to="varying") if names else v for v, names in zip((x, kernel), missing)
    )
