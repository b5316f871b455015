"""Pooling over height and width."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_cnns.layers.conv import is_sharded
from flax_cnns.types import Array


def max_pool(x: Array, window: int, stride: int, padding: int = 0) -> Array:
    """[N H W C] -> [N H' W' C], H' = floor((H + 2 padding - window) / stride) + 1, as PyTorch.

    Where several pixels of a window are the largest, the first has the gradient.
    """
    pads = ((padding, padding),) * 2
    library = partial(
        nn.max_pool, window_shape=(window, window), strides=(stride, stride), padding=pads
    )
    out = jax.eval_shape(library, x)
    plain = x.ndim == 4 and 0 not in out.shape and not is_sharded(x)
    if not plain or not jnp.issubdtype(x.dtype, jnp.floating):
        return library(x)

    def compared(x: Array) -> Array:
        # XLA's own has a slow gradient on a CPU, several times this one's.
        best, *taps = _taps(x, window, stride, padding, out.shape[1:3])
        for tap in taps:
            best = jnp.where((tap > best) | jnp.isnan(tap), tap, best)
        return best

    return lax.platform_dependent(x, cpu=compared, default=library)


def _taps(x: Array, window: int, stride: int, padding: int, size: tuple[int, int]) -> list[Array]:
    """What each place of a window sees: window * window arrays [N H' W' C], -inf in the padding.

    Strides are taken by splitting, whose gradient joins; that of a strided slice is slower.
    """
    cells = [n + (window - 1) // stride for n in size]
    pads = [(padding, c * stride - n - padding, 0) for c, n in zip(cells, x.shape[1:3])]
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


def avg_pool(x: Array, window: int, stride: int) -> Array:
    """[N H W C] -> [N H' W' C], H' = floor((H - window) / stride) + 1."""
    return nn.avg_pool(x, (window, window), (stride, stride))


def global_avg_pool(x: Array) -> Array:
    """[N H W C] -> [N C] in float32, whatever computed x: the head and the loss are float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
