"""The three products of a convolution as primitives. The derivatives of each are the other two.

A convolution is bilinear. Its two transposes, which compute its gradients, are bilinear too.
Therefore gradients of any order work, in forward and reverse mode. Each product has its own
lowering: on a CPU by the algorithm that choose.py selects, elsewhere by XLA's convolution. The
choice is made while a program is lowered for its platform, and costs nothing when the program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def _make_primitive(
    name: str, out_shape: Callable, library: Callable, on_cpu: Callable
) -> Primitive:
    """Returns a primitive with two array operands.

    `on_cpu` computes it on a CPU, and `library` on all other platforms.
    """
    primitive = Primitive(name)
    compiled = jax.jit(primitive.bind, static_argnames=("geometry", "precision"))

    def impl(a: Array, b: Array, **fields: Any) -> Array:
        with jax.disable_jit(False):  # without jit, the primitive would call itself
            return compiled(a, b, **fields)

    primitive.def_impl(impl)

    def abstract(a: Any, b: Any, *, geometry: ConvGeometry, precision: Any) -> Any:
        del precision
        return a.update(shape=out_shape(a, b, geometry), weak_type=False)

    def lower_on_cpu(a: Array, b: Array, *, geometry: ConvGeometry, precision: Any) -> Array:
        del precision  # on a CPU, float32 products have full precision
        # In half precision a CPU would be no faster, and its sums would differ from accelerators'.
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return on_cpu(a.astype(wide), b.astype(wide), geometry).astype(a.dtype)

    def lower_elsewhere(a: Array, b: Array, *, geometry: ConvGeometry, precision: Any) -> Array:
        return library(a, b, geometry, precision)

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(lower_elsewhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(lower_on_cpu, multiple_results=False), "cpu")
    return primitive


forward_p = _make_primitive("conv2d", _output_shape, xla.forward, cpu.forward)
input_grad_p = _make_primitive("conv2d_input_grad", _input_shape, xla.input_grad, cpu.input_grad)
kernel_grad_p = _make_primitive(
    "conv2d_kernel_grad", _kernel_shape, xla.kernel_grad, cpu.kernel_grad
)

# The transpose of each product in either operand: (cotangent, the two operands).
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


def _make_batcher(primitive: Primitive, images: tuple[bool, bool], image_out: bool) -> Callable:
    """Returns the vmap rule of a product.

    If only images are mapped, the mapped axis becomes more images; if kernels are mapped, more
    groups. `images` says which operands are images, and `image_out` whether the result is images.
    """

    def rule(
        operands: Sequence[Any], axes: Sequence[Any], *, geometry: ConvGeometry, precision: Any
    ) -> tuple[Array, int]:
        size = next(v.shape[a] for v, a in zip(operands, axes) if a is not None)
        if size == 0:
            single = [v if a is None else _without_axis(v, a) for v, a in zip(operands, axes)]
            out = jax.eval_shape(
                partial(primitive.bind, geometry=geometry, precision=precision), *single
            )
            return jnp.zeros((0, *out.shape), out.dtype), 0
        only_images = image_out and all(a is None or i for a, i in zip(axes, images))
        if not only_images:
            axes, operands = zip(*(_broadcast(v, a, size) for v, a in zip(operands, axes)))
            geometry = geometry._replace(groups=geometry.groups * size)
        operands = [
            v if a is None else _fold(v, a, 0 if only_images else v.ndim - 2)
            for v, a in zip(operands, axes)
        ]
        out = primitive.bind(*operands, geometry=geometry, precision=precision)
        axis = 0 if only_images else out.ndim - 1
        out = out.reshape(*out.shape[:axis], size, -1, *out.shape[axis + 1 :])
        return out, axis

    return rule


def _broadcast(v: Array, axis: int | None, size: int) -> tuple[int, Array]:
    """Returns (mapped axis, array); an array without a mapped axis is repeated `size` times."""
    if axis is not None:
        return axis, v
    return 0, jnp.broadcast_to(v, (size, *v.shape))


def _without_axis(v: Array, axis: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape[:axis] + v.shape[axis + 1 :], v.dtype)


def _fold(v: Array, axis: int, place: int) -> Array:
    """Merges the mapped axis into the axis `place`, counted without the mapped axis."""
    v = jnp.moveaxis(v, axis, place)
    return v.reshape(*v.shape[:place], -1, *v.shape[place + 2 :])


batching.primitive_batchers[forward_p] = _make_batcher(forward_p, (True, False), True)
batching.primitive_batchers[input_grad_p] = _make_batcher(input_grad_p, (True, False), True)
batching.primitive_batchers[kernel_grad_p] = _make_batcher(kernel_grad_p, (True, True), False)
