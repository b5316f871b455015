"""Pooling over height and width."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cnns.layers.conv import is_sharded
from flax_cnns.types import Array


def _out_size(n: int, window: int, stride: int, padding: int, ceil: bool) -> int:
    """PyTorch's: with `ceil` a last window that is partly outside counts, if it starts inside."""
    reach = n + 2 * padding - window
    if not ceil:
        return reach // stride + 1
    size = -(-reach // stride) + 1
    return size - 1 if (size - 1) * stride >= n + padding else size


def _geometry(
    x: Array, window: int, stride: int, padding: int | str, ceil: bool
) -> tuple[tuple[int, int], dict[str, tuple]]:
    """([H' W'], the arguments of flax's pooling that give it)."""
    sides = x.shape[-3:-1]
    if padding == "SAME":
        size = tuple(-(-n // stride) for n in sides)
        before = [max((m - 1) * stride + window - n, 0) // 2 for m, n in zip(size, sides)]
    else:
        size = tuple(_out_size(n, window, stride, padding, ceil) for n in sides)
        before = [padding, padding]
    pads = tuple(
        (p, max((m - 1) * stride + window - n - p, 0)) for m, n, p in zip(size, sides, before)
    )
    return size, dict(window_shape=(window, window), strides=(stride, stride), padding=pads)


def max_pool(
    x: Array, window: int, stride: int, padding: int | str = 0, ceil: bool = False
) -> Array:
    """[N H W C] -> [N H' W' C], H' = floor((H + 2 padding - window) / stride) + 1, as PyTorch.

    `ceil` rounds up instead, as Caffe always does. `padding="SAME"` is TensorFlow's: H / stride
    rounded up, with no more padding than that needs, and of an odd number the larger part behind.
    Where several pixels of a window are the largest, the first has the gradient.
    """
    size, args = _geometry(x, window, stride, padding, ceil)
    library = partial(nn.max_pool, **args)
    out = jax.eval_shape(library, x)
    plain = x.ndim == 4 and 0 not in out.shape and not is_sharded(x)
    if not plain or not jnp.issubdtype(x.dtype, jnp.floating):
        return library(x)

    def compared(x: Array) -> Array:
        # XLA's own has a slow gradient on a CPU, several times this one's.
        first = [before for before, _ in args["padding"]]
        best, *taps = _taps(x, window, stride, first, size)
        for tap in taps:
            best = jnp.where((tap > best) | jnp.isnan(tap), tap, best)
        return best

    return lax.platform_dependent(x, cpu=compared, default=library)


def _taps(
    x: Array, window: int, stride: int, before: Sequence[int], size: tuple[int, int]
) -> list[Array]:
    """What each place of a window sees: window * window arrays [N H' W' C], -inf in the padding.

    Strides are taken by splitting, whose gradient joins; that of a strided slice is slower.
    """
    cells = [n + (window - 1) // stride for n in size]
    pads = [(p, c * stride - n - p, 0) for p, c, n in zip(before, cells, x.shape[1:3])]
    x = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    x = x.reshape(x.shape[0], cells[0], stride, cells[1], stride, x.shape[-1])
    phases = [jnp.split(rows, stride, axis=4) for rows in jnp.split(x, stride, axis=2)]
    phases = lax.optimization_barrier([[p[:, :, 0, :, 0] for p in line] for line in phases])
    taps = []
    for i in range(window):
        for j in range(window):
            phase, row, column = phases[i % stride][j % stride], i // stride, j // stride
            taps.append(phase[:, row : row + size[0], column : column + size[1]])
    return taps


def avg_pool(
    x: Array,
    window: int,
    stride: int,
    padding: int | str = 0,
    ceil: bool = False,
    count_padding: bool = True,
) -> Array:
    """[N H W C] -> [N H' W' C], sizes as `max_pool`'s, means as PyTorch's.

    The padding counts as zeros, or with `count_padding=False` not at all, as it never does with
    `padding="SAME"`, TensorFlow's; what `ceil` adds beyond it never counts.
    """
    size, args = _geometry(x, window, stride, padding, ceil)
    counts = []
    for m, n, (before, _) in zip(size, x.shape[-3:-1], args["padding"]):
        counted = before if count_padding and padding != "SAME" else 0
        first, last = -counted, n + counted
        begin = np.arange(m) * stride - before
        counts.append(np.minimum(begin + window, last) - np.maximum(begin, first))
    counts = np.outer(*counts)[..., None]
    if (counts == window**2).all():
        return nn.avg_pool(x, **args)
    return nn.pool(x, 0.0, lax.add, **args) / jnp.asarray(counts, x.dtype)


def adaptive_avg_pool(x: Array, size: int) -> Array:
    """[N H W C] -> [N size size C], PyTorch's AdaptiveAvgPool2d; x itself where it has that size.

    Cell i is the mean of the pixels from floor(i H / size) to ceil((i + 1) H / size), likewise
    along W; so smaller maps are stretched.
    """
    if x.shape[-3:-1] == (size, size):
        return x

    def means(n: int) -> Array:  # [size n]
        begin = np.arange(size) * n // size
        end = -(-(np.arange(size) + 1) * n // size)
        inside = (np.arange(n) >= begin[:, None]) & (np.arange(n) < end[:, None])
        return jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)

    rows, columns = (means(n) for n in x.shape[-3:-1])
    # As exact as sums are on every device, where products may be rounded to bfloat16.
    return jnp.einsum("nhwc,ih,jw->nijc", x, rows, columns, precision=lax.Precision.HIGHEST)


def global_avg_pool(x: Array) -> Array:
    """[N H W C] -> [N C] in float32, whatever computed x: the head and the loss are float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
