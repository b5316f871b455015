"""Convolution on a CPU, in several ways.

XLA's own convolution is good on a CPU for dense kernels on maps of some size, and 10 to 100 times
slower than need be for groups, depthwise kernels, tiny maps, and inside loops. What follows are the
three products of a convolution, each in several ways that XLA turns into matmuls or plain loops:

    forward(x, kernel) -> y         [N H W C], [kh kw C/groups O] -> [N H' W' O]
    input_grad(dy, kernel) -> dx    the transpose of forward in x
    kernel_grad(x, dy) -> dkernel   the transpose of forward in the kernel

`forward_way`, `kernel_grad_way` and `input_grad_way` choose. Their thresholds were measured on two
AVX-512 cores, against XLA's own for every shape of the benchmark's sweep:

    python -m experiments.benchmark conv
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from flax_cnns.layers import library_conv
from flax_cnns.layers.window import Window
from flax_cnns.types import Array

# ---------------------------------------------------------------------------- the choice


LEAST_WORK = 1e8  # multiplications that make Winograd's many small operations worth their while
MOST_MEMORY = 2**29  # bytes of Winograd's tiles


def forward_way(images: int, channels: int, features: int, w: Window) -> str:
    """The name of the fastest way known for `forward`, by shapes alone."""
    if w.groups > 1 and channels == features <= 4 * w.groups and channels > w.groups:
        return "rotated"
    return _way(images, channels, features, w, narrowest=64)


def kernel_grad_way(images: int, channels: int, features: int, w: Window) -> str:
    """The name of the fastest way known for `kernel_grad`, by shapes alone."""
    return _way(images, channels, features, w, narrowest=32 if _places(w) <= 1024 else 128)


def _way(images: int, channels: int, features: int, w: Window, narrowest: int) -> str:
    places, least = _places(w), min(channels, features)
    if channels == w.groups > 1:  # a tap is an array to XLA: hundreds of them compile for long
        return "depthwise" if w.kernel[0] * w.kernel[1] <= 100 else "library"
    if w.groups > 1:
        together = _together(channels // w.groups, w.groups)
        few = w.groups // together <= 16  # each block is a convolution to compile
        return "blocks" if few and places > 36 and not w.control_flow else "batched"
    if w.kernel == (1, 1):
        return "pointwise"
    if w.kernel == w.strides and w.dilation == (1, 1) and not any(map(any, w.padding)):
        return "patches"
    square = w.kernel == (3, 3) and w.strides == w.dilation == (1, 1)
    enough = 9 * images * places * channels * features >= LEAST_WORK
    room = 16 * images * places * (channels + features) <= MOST_MEMORY
    if square and places >= 16 and least >= narrowest and enough and room:
        return "winograd"
    return "shifted" if w.control_flow or (places < 64 and least >= 32) else "library"


def input_grad_way(channels: int, features: int, w: Window) -> str:
    """ "library", or "phases": as forward convolutions of the gradient."""
    if w.control_flow or w.groups > 1 or w.strides == (1, 1) or w.kernel == (1, 1):
        return "phases"
    if w.kernel == w.strides and w.dilation == (1, 1) and not any(map(any, w.padding)):
        return "patches"
    return "phases" if _places(w) < 64 and min(channels, features) >= 32 else "library"


def _places(w: Window) -> int:
    return w.out_size[0] * w.out_size[1]


def _images(x: Array) -> int:
    return x.shape[0] if isinstance(x.shape[0], int) else 1  # exported for any number


def forward(x: Array, kernel: Array, w: Window, turned: bool = False) -> Array:
    """`turned` (without groups only): the kernel is [kh kw O C], its taps in reverse, as the
    gradient needs it. Turning the arrays themselves round would cost more than the product."""
    features = kernel.shape[2] if turned else kernel.shape[3]
    way = FORWARD[forward_way(_images(x), x.shape[-1], features, w)]
    return way(x, kernel, w) if w.groups > 1 else way(x, kernel, w, turned)


def kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    return KERNEL_GRAD[kernel_grad_way(_images(x), x.shape[-1], dy.shape[-1], w)](x, dy, w)


def input_grad(dy: Array, kernel: Array, w: Window) -> Array:
    return INPUT_GRAD[input_grad_way(kernel.shape[2], kernel.shape[3], w)](dy, kernel, w)


def phases(dy: Array, kernel: Array, w: Window) -> Array:
    """As convolutions of `dy` with the kernel turned round: one for each phase of the strides.

    An input row h takes part in output row (h + top - i * dilation) / stride for those taps i that
    make it whole: with stride 2, even rows meet other taps than odd ones.
    """
    turned = w.groups == 1
    if not turned:
        kernel = _turn(kernel, w.groups)
    lines = []
    for row in _phases(0, w):
        line = []
        for column in _phases(1, w):
            size = (row.size, column.size)
            taps = (row.taps, column.taps) if turned else (row.turned_taps, column.turned_taps)
            if not (all(taps) and all(size)):
                shape = (dy.shape[0], *size, kernel.shape[2 if turned else 3])
                line.append(jnp.zeros(shape, dy.dtype))
                continue
            part = kernel[tuple(slice(t.start, t.stop, t.step) for t in taps)]
            inner = Window(
                in_size=w.out_size,
                kernel=part.shape[:2],
                out_size=size,
                strides=(1, 1),
                padding=(row.padding, column.padding),
                dilation=(row.dilation, column.dilation),
                groups=w.groups,
                control_flow=w.control_flow,
            )
            line.append(forward(dy, part, inner, turned))
        lines.append(_interleave(line, 2, w.in_size[1]))
    return _interleave(lines, 1, w.in_size[0])


# ---------------------------------------------------------------------------- helpers


def _fence(x):
    """Keeps XLA from fusing what makes `x` into everything that reads it."""
    return lax.optimization_barrier(x)


def _pad(x: Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
    """Zeros around height and width; negative numbers crop."""
    rows, columns = padding
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)))


def _taps(padded: Array, w: Window) -> list[Array]:
    """What each tap of the kernel sees of a padded image: kh * kw views [N H' W' C]."""
    padded = _fence(padded)
    (sh, sw), (dh, dw), (height, width) = w.strides, w.dilation, w.out_size
    rows, columns = (height - 1) * sh + 1, (width - 1) * sw + 1
    return [
        padded[:, i * dh : i * dh + rows : sh, j * dw : j * dw + columns : sw]
        for i in range(w.kernel[0])
        for j in range(w.kernel[1])
    ]


def _rows(x: Array) -> Array:
    """[N H W C] -> [N H W, C]."""
    return x.reshape(-1, x.shape[-1])


# ---------------------------------------------------------------------------- input_grad's phases


class _Phase(NamedTuple):
    """The rows r, r + stride, ... of dx: which taps they meet, and dy's padding for them."""

    size: int  # how many rows
    taps: range
    turned_taps: range  # where these lie in a kernel with its taps in reverse
    padding: tuple[int, int]
    dilation: int


def _phases(axis: int, w: Window) -> list[_Phase]:
    stride, dilation, kernel = w.strides[axis], w.dilation[axis], w.kernel[axis]
    top, step = w.padding[axis][0], stride // math.gcd(stride, dilation)
    phases = []
    for r in range(stride):
        size = max(0, -(-(w.in_size[axis] - r) // stride))
        taps = [i for i in range(kernel) if (r + top - i * dilation) % stride == 0]
        if not taps:
            phases.append(_Phase(size, range(0), range(0), (0, 0), 1))
            continue
        first, last = taps[0], taps[-1]
        gap = dilation * step // stride  # rows of dy between neighbouring taps
        offset = (r + top - first * dilation) // stride  # dx row 0 of the phase: dy row at tap 0
        before = (len(taps) - 1) * gap - offset
        after = size - 1 + offset - (w.out_size[axis] - 1)
        turned = range(kernel - 1 - last, kernel - first, step)
        phases.append(_Phase(size, range(first, last + 1, step), turned, (before, after), gap))
    return phases


def _interleave(pieces: list[Array], axis: int, size: int) -> Array:
    """[a0 a1 ...], [b0 b1 ...] -> [a0 b0 a1 b1 ...] along an axis, `size` in all."""
    if len(pieces) == 1:
        return pieces[0]
    longest = pieces[0].shape[axis]
    pads = [[(0, longest - x.shape[a] if a == axis else 0) for a in range(x.ndim)] for x in pieces]
    stacked = jnp.stack([jnp.pad(x, pad) for x, pad in zip(pieces, pads)], axis + 1)
    shape = list(pieces[0].shape)
    shape[axis] = longest * len(pieces)
    return lax.slice_in_dim(stacked.reshape(shape), 0, size, axis=axis)


def _turn(kernel: Array, groups: int) -> Array:
    """The kernel of the transpose: [kh kw C/groups O] -> [kh kw O/groups C], taps reversed."""
    kh, kw, per_group, features = kernel.shape
    kernel = kernel[::-1, ::-1].reshape(kh, kw, per_group, groups, features // groups)
    return kernel.transpose(0, 1, 4, 3, 2).reshape(kh, kw, features // groups, groups * per_group)


# ---------------------------------------------------------------------------- library


def library(x: Array, kernel: Array, w: Window, turned: bool = False) -> Array:
    """XLA's own."""
    if turned:
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    return library_conv.forward(x, kernel, w)


# ---------------------------------------------------------------------------- matmuls


def _product(x: Array, kernel: Array, turned: bool) -> Array:
    """[... C] with [C O], or turned [O C] -> [... O]."""
    return jnp.einsum("...c,oc->...o" if turned else "...c,co->...o", x, kernel)


def pointwise(x: Array, kernel: Array, w: Window, turned: bool = False) -> Array:
    """A 1x1 kernel is one matmul over every (strided) place."""
    return _product(_taps(_pad(x, w.padding), w)[0], kernel[0, 0], turned)


def patches(x: Array, kernel: Array, w: Window, turned: bool = False) -> Array:
    """The kernel's size is its stride: each pixel is in one place's patch, and one matmul does."""
    kernel = kernel[::-1, ::-1].swapaxes(2, 3) if turned else kernel
    return _product(_cut_out(x, w), kernel.reshape(-1, kernel.shape[-1]), False)


def patches_kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    taps = _rows(_cut_out(x, w)).T @ _rows(dy)
    return taps.reshape(*w.kernel, x.shape[-1], dy.shape[-1])


def patches_input_grad(dy: Array, kernel: Array, w: Window) -> Array:
    (kh, kw), (height, width), channels = w.kernel, w.out_size, kernel.shape[2]
    pixels = _product(dy, kernel.reshape(-1, kernel.shape[-1]), True)
    pixels = pixels.reshape(-1, height, width, kh, kw, channels).transpose(0, 1, 3, 2, 4, 5)
    pixels = pixels.reshape(-1, height * kh, width * kw, channels)
    return _pad(pixels, ((0, w.in_size[0] - height * kh), (0, w.in_size[1] - width * kw)))


def _cut_out(x: Array, w: Window) -> Array:
    """[N H W C] -> [N H' W' kh*kw*C] where the kernel's size is its stride, without padding."""
    (kh, kw), (height, width) = w.kernel, w.out_size
    x = x[:, : height * kh, : width * kw].reshape(x.shape[0], height, kh, width, kw, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)


def pointwise_kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    return (_rows(_taps(_pad(x, w.padding), w)[0]).T @ _rows(dy))[None, None]


def shifted(x: Array, kernel: Array, w: Window, turned: bool = False) -> Array:
    """One matmul for each tap, over those places only where it meets the image."""
    total = jnp.zeros((x.shape[0], *w.out_size, kernel.shape[2 if turned else 3]), x.dtype)
    for i, j, source, target in _meetings(w):
        tap = kernel[-1 - i, -1 - j] if turned else kernel[i, j]
        total = total + _place(_product(x[source], tap, turned), target, w.out_size)
    return total


def shifted_kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    shape, taps = (x.shape[-1], dy.shape[-1]), {}
    for i, j, source, target in _meetings(w):
        taps[i, j] = _rows(x[source]).T @ _rows(dy[target])
    return _assemble(taps, shape, w, x.dtype)


def batched(x: Array, kernel: Array, w: Window) -> Array:
    """`shifted` for groups: matmuls with the group as their batch."""
    per_group, features = kernel.shape[2:]
    x = _split(x, w.groups)  # [G N H W C/G]
    kernel = kernel.reshape(*w.kernel, per_group, w.groups, features // w.groups)
    total = jnp.zeros((w.groups, x.shape[1], *w.out_size, features // w.groups), x.dtype)
    for i, j, source, target in _meetings(w):
        part = jnp.einsum("gnhwc,cgo->gnhwo", x[(slice(None), *source)], kernel[i, j])
        total = total + _place(part, target, w.out_size)
    return jnp.moveaxis(total, 0, 3).reshape(*total.shape[1:4], features)


def batched_kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    per_group, features = x.shape[-1] // w.groups, dy.shape[-1]
    x, dy, taps = _split(x, w.groups), _split(dy, w.groups), {}
    for i, j, source, target in _meetings(w):
        a, b = x[(slice(None), *source)], dy[(slice(None), *target)]
        tap = jnp.einsum(
            "gmc,gmo->cgo",
            a.reshape(w.groups, -1, per_group),
            b.reshape(w.groups, -1, features // w.groups),
        )
        taps[i, j] = tap.reshape(per_group, features)
    return _assemble(taps, (per_group, features), w, x.dtype)


def _meetings(w: Window):
    """For each tap: its place (i, j), the pixels it reads and the outputs it adds to, as slices of
    [N H W]. A tap that only ever sees padding is left out."""
    rows, columns = _meeting(0, w), _meeting(1, w)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if row and column:
                whole = slice(None)
                yield i, j, (whole, row[0], column[0]), (whole, row[1], column[1])


def _meeting(axis: int, w: Window) -> list[tuple[slice, slice] | None]:
    stride, found = w.strides[axis], []
    for i in range(w.kernel[axis]):
        shift = i * w.dilation[axis] - w.padding[axis][0]  # input row of output row 0
        first = max(0, -(shift // stride))
        last = min(w.out_size[axis] - 1, (w.in_size[axis] - 1 - shift) // stride)
        if last < first:
            found.append(None)
            continue
        source = slice(first * stride + shift, last * stride + shift + 1, stride)
        found.append((source, slice(first, last + 1)))
    return found


def _place(part: Array, target: tuple[slice, ...], size: tuple[int, int]) -> Array:
    """Zeros around outputs [... h w O] so that they lie at `target` of a map of this size."""
    pads = [(0, 0)] * (part.ndim - 3)
    pads += [(t.start, n - t.stop) for t, n in zip(target[1:], size)]
    return jnp.pad(part, [*pads, (0, 0)])


def _assemble(taps: dict, shape: tuple[int, int], w: Window, dtype) -> Array:
    """Taps {(i, j): [C/groups O]} -> [kh kw C/groups O]; what is missing is zero."""
    zeros = jnp.zeros(shape, dtype)
    flat = [taps.get((i, j), zeros) for i in range(w.kernel[0]) for j in range(w.kernel[1])]
    return jnp.stack(flat).reshape(*w.kernel, *shape)


def _split(x: Array, groups: int) -> Array:
    """[N H W C] -> [G N H W C/G]."""
    return _fence(jnp.moveaxis(x.reshape(*x.shape[:3], groups, -1), 3, 0))


# ---------------------------------------------------------------------------- Winograd

# F(2x2, 3x3) of Lavin & Gray 2015, https://arxiv.org/abs/1509.09308, section 4.1: two by two
# outputs from 16 products in the place of 36. Each row is a sum of inputs.
_B = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T: 4 pixels -> 4
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G: 3 taps -> 4
_A = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T: 4 products -> 2 outputs


def winograd(x: Array, kernel: Array, w: Window, turned: bool = False) -> Array:
    """3x3 at stride 1: 2.25 times fewer multiplications, as 16 matmuls.

    An infinite pixel may give NaN where XLA's own gives infinity: tiles are differences of pixels.
    """
    order = (2, 1, 0) if turned else (0, 1, 2)
    kernels = _fence(_transform(_G, _G, [[kernel[i, j] for j in order] for i in order]))
    products = [
        [_product(p, k, turned) for p, k in zip(pixels, line)]
        for pixels, line in zip(_tiles(x, w), kernels)
    ]
    outputs = _fence(_transform(_A, _A, _fence(products)))
    y = jnp.stack([jnp.stack(line, 3) for line in outputs], 2)  # [N th 2 tw 2 O]
    n, th, _, tw, _, features = y.shape
    y = y.reshape(n, 2 * th, 2 * tw, features)
    return y[:, : w.out_size[0], : w.out_size[1]]


def winograd_kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    odd = tuple((0, n % 2) for n in w.out_size)
    dy = _fence(_pad(dy, odd))
    outputs = [[dy[:, i::2, j::2] for j in range(2)] for i in range(2)]
    outputs = _fence(_transform(_transposed(_A), _transposed(_A), outputs))
    products = [
        [_rows(a).T @ _rows(b) for a, b in zip(pixels, line)]
        for pixels, line in zip(_tiles(x, w), outputs)
    ]
    taps = _transform(_transposed(_G), _transposed(_G), _fence(products))
    return jnp.stack([jnp.stack(line) for line in taps])


def _tiles(x: Array, w: Window) -> list[list[Array]]:
    """The transformed pixels of each tile of 2x2 outputs: 4 x 4 arrays [N tiles_h tiles_w C]."""
    th, tw = -(-w.out_size[0] // 2), -(-w.out_size[1] // 2)
    (top, _), (left, _) = w.padding
    below, right = 2 * th + 2 - w.in_size[0] - top, 2 * tw + 2 - w.in_size[1] - left
    x = _fence(_pad(x, ((top, below), (left, right))))
    pixels = [
        [x[:, i : i + 2 * th - 1 : 2, j : j + 2 * tw - 1 : 2] for j in range(4)] for i in range(4)
    ]
    # Fences and four axes: with the places in one axis XLA's loops compute with indices instead.
    return _fence(_transform(_B, _B, pixels))


def _transposed(matrix: tuple) -> tuple:
    return tuple(zip(*matrix))


def _transform(left, right, grid: list[list[Array]]) -> list[list[Array]]:
    """left @ grid @ right^T, where the entries of the grid are arrays."""
    half = [[_combine(row, column) for column in zip(*grid)] for row in left]
    return [[_combine(row, line) for row in right] for line in half]


def _combine(factors, arrays) -> Array:
    total = None
    for factor, x in zip(factors, arrays):
        if factor:
            term = x if factor == 1 else -x if factor == -1 else jnp.asarray(factor, x.dtype) * x
            total = term if total is None else total + term
    return total


# ---------------------------------------------------------------------------- sums of products


def depthwise(x: Array, kernel: Array, w: Window) -> Array:
    """One channel in, `features / channels` out: the shifted images times their weights, added."""
    times = kernel.shape[-1] // x.shape[-1]
    taps = _taps(_pad(jnp.repeat(x, times, -1) if times > 1 else x, w.padding), w)
    return _weigh(taps, kernel[:, :, 0])


def depthwise_kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    times = dy.shape[-1] // x.shape[-1]
    taps = _taps(_pad(jnp.repeat(x, times, -1) if times > 1 else x, w.padding), w)
    return _correlate(taps, dy).reshape(*w.kernel, 1, -1)


def rotated(x: Array, kernel: Array, w: Window) -> Array:
    """Few channels a group, as many out as in: a sum of depthwise ones, the r-th of which sees the
    channels of every group turned by r places."""
    size, channels = x.shape[-1] // w.groups, x.shape[-1]
    x = _pad(x, w.padding)
    x = x.reshape(*x.shape[:3], w.groups, size)
    kernel, total = kernel.reshape(*w.kernel, size, w.groups, size), None
    for r in range(size):
        turned = jnp.roll(x, -r, -1).reshape(*x.shape[:3], channels)
        weights = [kernel[:, :, (o + r) % size, :, o] for o in range(size)]
        weights = _fence(jnp.stack(weights, -1).reshape(*w.kernel, channels))
        part = _weigh(_taps(turned, w), weights)
        total = part if total is None else _fence(total + part)
    return total


# ---------------------------------------------------------------------------- blocks of groups


def blocks(x: Array, kernel: Array, w: Window) -> Array:
    """Dense convolutions of neighbouring groups, with zeros where they are strangers."""
    together = _together(x.shape[-1] // w.groups, w.groups)
    kernel, pieces = _widen(kernel, w.groups, together), w.groups // together
    inner, parts = w._replace(groups=1), zip(_cut(x, pieces), _cut(kernel, pieces))
    return jnp.concatenate([library(a, k, inner) for a, k in parts], -1)


def blocks_kernel_grad(x: Array, dy: Array, w: Window) -> Array:
    together = _together(x.shape[-1] // w.groups, w.groups)
    pieces, inner = w.groups // together, w._replace(groups=1)
    parts = zip(_cut(x, pieces), _cut(dy, pieces))
    grads = [library_conv.kernel_grad(a, b, inner) for a, b in parts]
    return _narrow(jnp.concatenate(grads, -1), w.groups, together)


def _together(size: int, groups: int) -> int:
    """How many groups of `size` channels make a block: 32 channels, up to 128 where that leaves no
    more than 16 blocks."""
    fitting = [n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * size <= 128)]
    few = [n for n in fitting if groups // n <= 16] or fitting[-1:]
    return max([n for n in fitting if n * size <= 32 and n >= few[0]], default=few[0])


def _cut(x: Array, pieces: int) -> list[Array]:
    return jnp.split(x, pieces, axis=-1)


def _widen(kernel: Array, groups: int, together: int) -> Array:
    """[kh kw C/groups O] -> [kh kw together*C/groups O], zero between different groups."""
    kh, kw, size, features = kernel.shape
    kernel = kernel.reshape(kh, kw, 1, size, groups // together, together, features // groups)
    same = jnp.eye(together, dtype=kernel.dtype)[:, None, None, :, None]
    return (kernel * same).reshape(kh, kw, together * size, features)


def _narrow(kernel: Array, groups: int, together: int) -> Array:
    """The transpose of `_widen`."""
    kh, kw, wide, features = kernel.shape
    shape = (kh, kw, together, wide // together, groups // together, together, features // groups)
    kernel = kernel.reshape(shape)
    parts = [kernel[:, :, n, :, :, n] for n in range(together)]
    return jnp.stack(parts, -2).reshape(kh, kw, wide // together, features)


# ---------------------------------------------------------------------------- correlation


def _weigh(taps: list[Array], kernel: Array) -> Array:
    """taps [N H W C] each, kernel [kh kw C]: their products, added."""
    return sum(tap * weight for tap, weight in zip(taps, kernel.reshape(-1, kernel.shape[-1])))


def _correlate(taps: list[Array], dy: Array) -> Array:
    """sum over N H W of tap * dy, for all taps in one pass over the rows: [taps, C].

    Separate sums would read both arrays once for each tap, and XLA would not vectorise them.
    """
    products = [tap * dy for tap in taps]
    zeros = [jnp.zeros((), dy.dtype)] * len(taps)
    sums = lax.reduce(products, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (1,))
    return jnp.stack(_fence([jnp.sum(s, (0, 1)) for s in _fence(sums)]))


# ---------------------------------------------------------------------------- by name

FORWARD = {
    "library": library,
    "pointwise": pointwise,
    "patches": patches,
    "shifted": shifted,
    "winograd": winograd,
    "depthwise": depthwise,
    "rotated": rotated,
    "batched": batched,
    "blocks": blocks,
}
INPUT_GRAD = {
    "library": library_conv.input_grad,
    "patches": patches_input_grad,
    "phases": phases,
}
KERNEL_GRAD = {
    "library": library_conv.kernel_grad,
    "pointwise": pointwise_kernel_grad,
    "patches": patches_kernel_grad,
    "shifted": shifted_kernel_grad,
    "winograd": winograd_kernel_grad,
    "depthwise": depthwise_kernel_grad,
    "batched": batched_kernel_grad,
    "blocks": blocks_kernel_grad,
}
