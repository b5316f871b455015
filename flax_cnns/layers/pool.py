"""Pooling over height and width."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns.types import Array


def max_pool(x: Array, window: int, stride: int, padding: int = 0) -> Array:
    """[N H W C] -> [N H' W' C], H' = floor((H + 2 padding - window) / stride) + 1, as PyTorch."""
    return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding),) * 2)


def avg_pool(x: Array, window: int, stride: int) -> Array:
    """[N H W C] -> [N H' W' C], H' = floor((H - window) / stride) + 1."""
    return nn.avg_pool(x, (window, window), (stride, stride))


def global_avg_pool(x: Array) -> Array:
    """[N H W C] -> [N C] in float32, whatever computed x: the head and the loss are float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
