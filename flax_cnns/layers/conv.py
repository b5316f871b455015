"""The convolution that every network uses: the meaning of `nn.Conv`, the fastest lowering known.

A convolution is bilinear, and so are the two transposes that its gradients are. Each of the three
is a primitive here, and each one's derivatives are the other two. So gradients of any order work,
forward and reverse, and each is lowered as fast as it can be: on a CPU as `cpu_conv.py` chooses by
shape, elsewhere as the library's convolution. The choice is made while a program is lowered for its
platform, and costs nothing when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_cnns.layers import cpu_conv, library_conv
from flax_cnns.layers.window import Window
from flax_cnns.types import Array


class Conv(nn.Conv):
    """`nn.Conv`: its fields, its parameters, its meaning; [N H W C] -> [N H' W' features].

    `padding=1` pads both sides as PyTorch does; `"SAME"` is TensorFlow's and differs at stride 2.
    `control_flow=True` says that it runs inside `nn.scan`, `nn.cond` or a loop, where XLA's own
    convolution is many times slower on a CPU, and no lowering can see that it is there. Policies
    of `jax.checkpoint` that go by JAX's own primitives (`checkpoint_dots`) do not save its output.
    """

    control_flow: bool = False

    def __post_init__(self):
        # Functions, and not partials: modules with equal fields must be equal. A copy of a module
        # comes with the function of the original.
        if self.conv_general_dilated in (None, _as_lax, _as_lax_in_control_flow):
            ours = _as_lax_in_control_flow if self.control_flow else _as_lax
            self.conv_general_dilated = ours
        super().__post_init__()


def conv2d(
    x: Array,
    kernel: Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    control_flow: bool = False,
    precision: lax.PrecisionLike = None,
) -> Array:
    """[N H W C] with a kernel [kh kw C/groups O] -> [N H' W' O], as `lax.conv_general_dilated`.

    `padding` is "SAME" (TensorFlow's), "VALID", a number for all sides, or one number or pair
    (before, after) for height and for width. `dilation` spreads the kernel. `control_flow`: it
    runs inside a scan, a cond or a loop. `precision` serves GPU and TPU. Raises what
    `lax.conv_general_dilated` raises for shapes that do not fit (TypeError, ValueError).
    """
    pair = lambda v: (v, v) if isinstance(v, Integral) else tuple(v)  # noqa: E731
    if not isinstance(padding, str):
        padding = [pair(p) for p in pair(padding)]
    return _as_lax(
        x,
        kernel,
        pair(strides),
        padding,
        rhs_dilation=pair(dilation),
        feature_group_count=groups,
        control_flow=control_flow,
        precision=precision,
    )


_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _as_lax(
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
    *,
    control_flow: bool = False,
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
    window = Window(
        in_size=x.shape[1:3],
        kernel=kernel.shape[:2],
        out_size=out.shape[1:3],
        strides=tuple(int(s) for s in window_strides),
        padding=tuple((int(a), int(b)) for a, b in padding),
        dilation=dilation,
        groups=int(feature_group_count),
        control_flow=control_flow,
    )
    precision = tuple(precision) if isinstance(precision, list) else precision
    return _forward.bind(*_aligned(x, kernel), window=window, precision=precision)


def _as_lax_in_control_flow(*args: Any, **kwargs: Any) -> Array:
    return _as_lax(*args, **kwargs, control_flow=True)


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


# ---------------------------------------------------------------------------- the primitives


def _output_shape(x: Any, kernel: Any, window: Window) -> tuple[int, ...]:
    return (x.shape[0], *window.out_size, kernel.shape[-1])


def _input_shape(dy: Any, kernel: Any, window: Window) -> tuple[int, ...]:
    return (dy.shape[0], *window.in_size, kernel.shape[2] * window.groups)


def _kernel_shape(x: Any, dy: Any, window: Window) -> tuple[int, ...]:
    return (*window.kernel, x.shape[-1] // window.groups, dy.shape[-1])


def _primitive(name: str, shape: Callable, library: Callable, cpu: Callable) -> Primitive:
    primitive = Primitive(name)
    compiled = jax.jit(primitive.bind, static_argnames=("window", "precision"))

    def impl(a, b, **fields):
        with jax.disable_jit(False):  # else the primitive would call itself
            return compiled(a, b, **fields)

    primitive.def_impl(impl)

    def abstract(a, b, *, window, precision):
        del precision
        return a.update(shape=shape(a, b, window), weak_type=False)

    def on_cpu(a, b, *, window, precision):
        del precision  # float32 is float32 there
        # Sums of products in half precision would not be those that accelerators make, nor faster.
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return cpu(a.astype(wide), b.astype(wide), window).astype(a.dtype)

    def anywhere(a, b, *, window, precision):
        return library(a, b, window, precision)

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(anywhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return primitive


_forward = _primitive("conv2d", _output_shape, library_conv.forward, cpu_conv.forward)
_input_grad = _primitive(
    "conv2d_input_grad", _input_shape, library_conv.input_grad, cpu_conv.input_grad
)
_kernel_grad = _primitive(
    "conv2d_kernel_grad", _kernel_shape, library_conv.kernel_grad, cpu_conv.kernel_grad
)

# (what comes back, the two operands): the transpose of each product in either operand.
ad.defbilinear(
    _forward,
    lambda dy, x, kernel, **fields: _input_grad.bind(dy, kernel, **fields),
    lambda dy, x, kernel, **fields: _kernel_grad.bind(x, dy, **fields),
)
ad.defbilinear(
    _input_grad,
    lambda dx, dy, kernel, **fields: _forward.bind(dx, kernel, **fields),
    lambda dx, dy, kernel, **fields: _kernel_grad.bind(dx, dy, **fields),
)
ad.defbilinear(
    _kernel_grad,
    lambda dk, x, dy, **fields: _input_grad.bind(dy, dk, **fields),
    lambda dk, x, dy, **fields: _forward.bind(x, dk, **fields),
)


# ---------------------------------------------------------------------------- vmap


def _batcher(primitive: Primitive, images: tuple[bool, bool], image_out: bool) -> Callable:
    """vmap: more images where the kernel is shared, more groups where there are many kernels."""

    def rule(operands, axes, *, window, precision):
        size = next(v.shape[a] for v, a in zip(operands, axes) if a is not None)
        if size == 0:
            one = [v if a is None else _without(v, a) for v, a in zip(operands, axes)]
            out = jax.eval_shape(partial(primitive.bind, window=window, precision=precision), *one)
            return jnp.zeros((0, *out.shape), out.dtype), 0
        shared = image_out and all(a is None or i for a, i in zip(axes, images))
        if not shared:
            axes, operands = zip(*(_mapped(v, a, size) for v, a in zip(operands, axes)))
            window = window._replace(groups=window.groups * size)
        operands = [
            v if a is None else _fold(v, a, 0 if shared else v.ndim - 2)
            for v, a in zip(operands, axes)
        ]
        out = primitive.bind(*operands, window=window, precision=precision)
        axis = 0 if shared else out.ndim - 1
        out = out.reshape(*out.shape[:axis], size, -1, *out.shape[axis + 1 :])
        return out, axis

    return rule


def _mapped(v: Array, axis: int | None, size: int) -> tuple[int, Array]:
    if axis is not None:
        return axis, v
    return 0, jnp.broadcast_to(v, (size, *v.shape))


def _without(v: Array, axis: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape[:axis] + v.shape[axis + 1 :], v.dtype)


def _fold(v: Array, axis: int, place: int) -> Array:
    """Moves a mapped axis in front of the axis `place` of what is mapped, and into it."""
    v = jnp.moveaxis(v, axis, place)
    return v.reshape(*v.shape[:place], -1, *v.shape[place + 2 :])


batching.primitive_batchers[_forward] = _batcher(_forward, (True, False), True)
batching.primitive_batchers[_input_grad] = _batcher(_input_grad, (True, False), True)
batching.primitive_batchers[_kernel_grad] = _batcher(_kernel_grad, (True, True), False)
