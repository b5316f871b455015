"""Pooling over height and width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cnns.layers.conv import is_sharded
from flax_cnns.types import Array

MAX_CHOSEN_WINDOW = 3  # of `choose_taps`, which reads each pixel of a window


def _out_size(n: int, window: int, stride: int, padding: int, ceil: bool) -> int:
    """Returns PyTorch's output size.

    With `ceil`, a last window that lies partly outside the image is kept if it starts inside.
    """
    last_start = n + 2 * padding - window
    if not ceil:
        return last_start // stride + 1
    size = -(-last_start // stride) + 1
    return size - 1 if (size - 1) * stride >= n + padding else size


def _geometry(
    x: Array, window: int, stride: int, padding: int | str, ceil: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns ((H', W'), the keyword arguments of Flax's pooling functions)."""
    in_size = x.shape[-3:-1]
    if padding == "SAME":
        height, width = (-(-n // stride) for n in in_size)
        before = [
            max((m - 1) * stride + window - n, 0) // 2 for m, n in zip((height, width), in_size)
        ]
    else:
        pad = cast(int, padding)
        height, width = (_out_size(n, window, stride, pad, ceil) for n in in_size)
        before = [pad, pad]
    size = height, width
    pads = tuple(
        (p, max((m - 1) * stride + window - n - p, 0)) for m, n, p in zip(size, in_size, before)
    )
    return size, dict(window_shape=(window, window), strides=(stride, stride), padding=pads)


def max_pool(
    x: Array, window: int, stride: int, padding: int | str = 0, ceil: bool = False
) -> Array:
    """Max pooling as in PyTorch: [N H W C] -> [N H' W' C].

    H' = floor((H + 2 padding - window) / stride) + 1; `ceil` rounds up instead, as Caffe always
    does. `padding="SAME"` is TensorFlow's: H' = ceil(H / stride), with no more padding than needed.
    If the padding is odd, the larger part is at the bottom and on the right. If several pixels of a
    window are the largest, the first gets the gradient.
    """
    size, args = _geometry(x, window, stride, padding, ceil)

    def library(x: Array) -> Array:
        return nn.max_pool(x, **args)

    out = jax.eval_shape(library, x)
    plain = x.ndim == 4 and 0 not in out.shape and not is_sharded(x)
    if not plain or not jnp.issubdtype(x.dtype, jnp.floating):
        return library(x)

    before = [start for start, _ in args["padding"]]
    ours: dict[str, Callable[[Array], Array]] = {
        "cpu": partial(compare_taps, window=window, stride=stride, before=before, size=size)
    }
    if window <= MAX_CHOSEN_WINDOW:
        ours["cuda"] = partial(choose_taps, window=window, stride=stride, before=before, size=size)
    return lax.platform_dependent(x, **ours, default=library)


def compare_taps(
    x: Array, window: int, stride: int, before: Sequence[int], size: tuple[int, int]
) -> Array:
    """Max pooling for a CPU, where the gradient of XLA's own takes several times as long.

    `before` is the padding at the top and on the left, `size` is (H', W').
    """
    largest, *taps = _taps(x, window, stride, before, size)
    for tap in taps:
        largest = jnp.where((tap > largest) | jnp.isnan(tap), tap, largest)
    return largest


def choose_taps(
    x: Array, window: int, stride: int, before: Sequence[int], size: tuple[int, int]
) -> Array:
    """Max pooling for an NVIDIA GPU; the arguments are those of `compare_taps`.

    The gradient of XLA's own writes four index arrays in int32 and a padded image, and scatters.
    Here, one int8 per window says which pixel is the largest, and the gradient is one kernel
    (experiments/results/accelerators.md).
    """
    pads = [
        (p, max((m - 1) * stride + window - n - p, 0), 0)
        for p, m, n in zip(before, size, x.shape[1:3])
    ]
    padded = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    reach = [(m - 1) * stride + 1 for m in size]
    taps = [
        lax.slice(
            padded,
            (0, i, j, 0),
            (x.shape[0], i + reach[0], j + reach[1], x.shape[-1]),
            (1, stride, stride, 1),
        )
        for i in range(window)
        for j in range(window)
    ]
    largest = lax.stop_gradient(taps[0])
    chosen = jnp.zeros(largest.shape, jnp.int8)
    for index, tap in enumerate(map(lax.stop_gradient, taps[1:]), 1):
        is_larger = (tap > largest) | jnp.isnan(tap)
        largest = jnp.where(is_larger, tap, largest)
        chosen = jnp.where(is_larger, jnp.int8(index), chosen)
    out = taps[0]
    for index, tap in enumerate(taps[1:], 1):
        out = jnp.where(chosen == index, tap, out)
    return out


def _taps(
    x: Array, window: int, stride: int, before: Sequence[int], size: tuple[int, int]
) -> list[Array]:
    """Returns what each position of a window sees: window * window arrays [N H' W' C].

    The padding is -inf. The strides are applied by splits, whose gradient is a concatenation. The
    gradient of a strided slice is slower.
    """
    counts = [n + (window - 1) // stride for n in size]  # strides that the windows cover
    pads = [(p, c * stride - n - p, 0) for p, c, n in zip(before, counts, x.shape[1:3])]
    x = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    x = x.reshape(x.shape[0], counts[0], stride, counts[1], stride, x.shape[-1])
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
    """Average pooling as in PyTorch: [N H W C] -> [N H' W' C], with the sizes of `max_pool`.

    Padding counts as zeros. The means leave it out if `count_padding` is False, and always with
    TensorFlow's `padding="SAME"`. The pixels that `ceil` adds beyond the padding never count.
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
    """PyTorch's AdaptiveAvgPool2d: [N H W C] -> [N size size C]; x if it already has that size.

    Row i is the mean of the rows from floor(i H / size) up to, but not including,
    ceil((i + 1) H / size). The same holds for columns. Maps smaller than `size` are stretched.
    """
    if x.shape[-3:-1] == (size, size):
        return x

    def means(n: int) -> Array:  # [size n]
        begin = np.arange(size) * n // size
        end = -(-(np.arange(size) + 1) * n // size)
        inside = (np.arange(n) >= begin[:, None]) & (np.arange(n) < end[:, None])
        return jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)

    rows, columns = (means(n) for n in x.shape[-3:-1])
    # Some devices round the factors of matmuls to bfloat16 unless the precision is the highest.
    return jnp.einsum("nhwc,ih,jw->nijc", x, rows, columns, precision=lax.Precision.HIGHEST)


def global_avg_pool(x: Array) -> Array:
    """Means over H and W: [N H W C] of any dtype -> f32 [N C], because the head is float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
