"""The three products of a convolution as primitives, each of whose derivatives are the other two.

A convolution is bilinear, and so are the two transposes that its gradients are. So gradients of any
order work, forward and reverse, and each product is lowered as fast as it can be: on a CPU as
choose.py says, elsewhere as the library's convolution. The choice is made while a program is
lowered for its platform, and costs nothing when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_cnns.layers.conv import cpu, xla
from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.types import Array


def _output_shape(x: Any, kernel: Any, geometry: ConvGeometry) -> tuple[int, ...]:
    return (x.shape[0], *geometry.out_size, kernel.shape[-1])


def _input_shape(dy: Any, kernel: Any, geometry: ConvGeometry) -> tuple[int, ...]:
    return (dy.shape[0], *geometry.in_size, kernel.shape[2] * geometry.groups)


def _kernel_shape(x: Any, dy: Any, geometry: ConvGeometry) -> tuple[int, ...]:
    return (*geometry.kernel_size, x.shape[-1] // geometry.groups, dy.shape[-1])


def _primitive(name: str, shape: Callable, library: Callable, cpu: Callable) -> Primitive:
    primitive = Primitive(name)
    compiled = jax.jit(primitive.bind, static_argnames=("geometry", "precision"))

    def impl(a, b, **fields):
        with jax.disable_jit(False):  # else the primitive would call itself
            return compiled(a, b, **fields)

    primitive.def_impl(impl)

    def abstract(a, b, *, geometry, precision):
        del precision
        return a.update(shape=shape(a, b, geometry), weak_type=False)

    def on_cpu(a, b, *, geometry, precision):
        del precision  # float32 is float32 there
        # Sums of products in half precision would not be those that accelerators make, nor faster.
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return cpu(a.astype(wide), b.astype(wide), geometry).astype(a.dtype)

    def anywhere(a, b, *, geometry, precision):
        return library(a, b, geometry, precision)

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(anywhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return primitive


forward_p = _primitive("conv2d", _output_shape, xla.forward, cpu.forward)
input_grad_p = _primitive("conv2d_input_grad", _input_shape, xla.input_grad, cpu.input_grad)
kernel_grad_p = _primitive("conv2d_kernel_grad", _kernel_shape, xla.kernel_grad, cpu.kernel_grad)

# (what comes back, the two operands): the transpose of each product in either operand.
ad.defbilinear(
    forward_p,
    lambda dy, x, kernel, **fields: input_grad_p.bind(dy, kernel, **fields),
    lambda dy, x, kernel, **fields: kernel_grad_p.bind(x, dy, **fields),
)
ad.defbilinear(
    input_grad_p,
    lambda dx, dy, kernel, **fields: forward_p.bind(dx, kernel, **fields),
    lambda dx, dy, kernel, **fields: kernel_grad_p.bind(dx, dy, **fields),
)
ad.defbilinear(
    kernel_grad_p,
    lambda dk, x, dy, **fields: input_grad_p.bind(dy, dk, **fields),
    lambda dk, x, dy, **fields: forward_p.bind(x, dk, **fields),
)


# ---------------------------------------------------------------------------- vmap


def _batcher(primitive: Primitive, images: tuple[bool, bool], image_out: bool) -> Callable:
    """vmap: more images where the kernel is shared, more groups where there are many kernels."""

    def rule(operands, axes, *, geometry, precision):
        size = next(v.shape[a] for v, a in zip(operands, axes) if a is not None)
        if size == 0:
            one = [v if a is None else _without(v, a) for v, a in zip(operands, axes)]
            out = jax.eval_shape(
                partial(primitive.bind, geometry=geometry, precision=precision), *one
            )
            return jnp.zeros((0, *out.shape), out.dtype), 0
        shared = image_out and all(a is None or i for a, i in zip(axes, images))
        if not shared:
            axes, operands = zip(*(_mapped(v, a, size) for v, a in zip(operands, axes)))
            geometry = geometry._replace(groups=geometry.groups * size)
        operands = [
            v if a is None else _fold(v, a, 0 if shared else v.ndim - 2)
            for v, a in zip(operands, axes)
        ]
        out = primitive.bind(*operands, geometry=geometry, precision=precision)
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


batching.primitive_batchers[forward_p] = _batcher(forward_p, (True, False), True)
batching.primitive_batchers[input_grad_p] = _batcher(input_grad_p, (True, False), True)
batching.primitive_batchers[kernel_grad_p] = _batcher(kernel_grad_p, (True, True), False)
