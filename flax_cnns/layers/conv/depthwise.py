"""Depthwise convolutions as sums of shifted images times their weights."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
from jax import lax

from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.layers.conv.taps import fence, pad_or_crop, tap_views
from flax_cnns.types import Array


def depthwise(x: Array, kernel: Array, geometry: ConvGeometry) -> Array:
    """Returns the output. Each input channel gives `features / channels` output channels."""
    return sum_weighted(_repeated_views(x, kernel.shape[-1], geometry), kernel[:, :, 0])


def depthwise_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel."""
    views = _repeated_views(x, dy.shape[-1], geometry)
    return _correlate(views, dy).reshape(*geometry.kernel_size, 1, -1)


def _repeated_views(x: Array, features: int, geometry: ConvGeometry) -> list[Array]:
    """Returns what each tap sees, kh * kw views [N H' W' features], with channels repeated."""
    times = features // x.shape[-1]
    repeated = jnp.repeat(x, times, -1) if times > 1 else x
    return tap_views(pad_or_crop(repeated, geometry.padding), geometry)


def sum_weighted(views: list[Array], kernel: Array) -> Array:
    """Returns the sum of all taps' views [N H W C] times their weights in the kernel [kh kw C]."""
    weights = kernel.reshape(-1, kernel.shape[-1])
    return cast(Array, sum(view * weight for view, weight in zip(views, weights)))


def _correlate(views: list[Array], dy: Array) -> Array:
    """Returns the sums over N H W of view * dy, [taps C], for all taps in one pass over the rows.

    Separate sums would read both arrays once for each tap, and XLA would not vectorize them.
    """
    products = [view * dy for view in views]
    zeros = [jnp.zeros((), dy.dtype)] * len(views)
    sums = lax.reduce(products, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (1,))
    return jnp.stack(fence([jnp.sum(s, (0, 1)) for s in fence(sums)]))
