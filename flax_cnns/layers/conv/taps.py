"""What the taps of a kernel see of an image: the views, slices and padding of all algorithms."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jax import lax

from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.types import Array, Dtype, PyTree


def fence(x: PyTree) -> PyTree:
    """Keeps XLA from fusing the computation of `x` into each operation that reads it."""
    return lax.optimization_barrier(x)


def pad_or_crop(x: Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
    """Pads height and width with zeros; negative numbers crop."""
    rows, columns = padding
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)))


def tap_views(padded: Array, geometry: ConvGeometry) -> list[Array]:
    """Returns what each tap of the kernel sees of a padded image: kh * kw views [N H' W' C]."""
    padded = fence(padded)
    (sh, sw), (dh, dw), (height, width) = geometry.strides, geometry.dilation, geometry.out_size
    rows, columns = (height - 1) * sh + 1, (width - 1) * sw + 1
    return [
        padded[:, i * dh : i * dh + rows : sh, j * dw : j * dw + columns : sw]
        for i in range(geometry.kernel_size[0])
        for j in range(geometry.kernel_size[1])
    ]


def flatten_positions(x: Array) -> Array:
    """[N H W C] -> [N H W, C]."""
    return x.reshape(-1, x.shape[-1])


def tap_overlaps(geometry: ConvGeometry) -> Iterator[tuple[int, int, tuple, tuple]]:
    """Yields i, j, source, target for each tap (i, j) that sees more than padding.

    The tap reads the pixels `source` and contributes to the outputs `target`; both are slices of
    [N H W].
    """
    rows, columns = _axis_overlaps(0, geometry), _axis_overlaps(1, geometry)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if row and column:
                whole = slice(None)
                yield i, j, (whole, row[0], column[0]), (whole, row[1], column[1])


def _axis_overlaps(axis: int, geometry: ConvGeometry) -> list[tuple[slice, slice] | None]:
    stride = geometry.strides[axis]
    overlaps: list[tuple[slice, slice] | None] = []
    for i in range(geometry.kernel_size[axis]):
        # The input row that output row 0 sees.
        shift = i * geometry.dilation[axis] - geometry.padding[axis][0]
        first = max(0, -(shift // stride))
        last = min(geometry.out_size[axis] - 1, (geometry.in_size[axis] - 1 - shift) // stride)
        if last < first:
            overlaps.append(None)
            continue
        source = slice(first * stride + shift, last * stride + shift + 1, stride)
        overlaps.append((source, slice(first, last + 1)))
    return overlaps


def pad_to_map(part: Array, target: tuple[slice, ...], size: tuple[int, int]) -> Array:
    """Pads outputs [... h w O] with zeros to a map of `size`, in which they lie at `target`."""
    pads = [(0, 0)] * (part.ndim - 3)
    pads += [(t.start, n - t.stop) for t, n in zip(target[1:], size)]
    return jnp.pad(part, [*pads, (0, 0)])


def assemble_kernel(
    taps: dict[tuple[int, int], Array], shape: tuple[int, int], geometry: ConvGeometry, dtype: Dtype
) -> Array:
    """Taps {(i, j): [C/groups O]} -> [kh kw C/groups O]. Missing taps are zero."""
    (height, width), zeros = geometry.kernel_size, jnp.zeros(shape, dtype)
    flat = [taps.get((i, j), zeros) for i in range(height) for j in range(width)]
    return jnp.stack(flat).reshape(height, width, *shape)
