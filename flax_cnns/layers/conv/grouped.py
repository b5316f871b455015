"""Grouped convolutions as sums of depthwise convolutions, batched matmuls, or dense blocks."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp

from flax_cnns.layers.conv import xla
from flax_cnns.layers.conv.choose import groups_per_block
from flax_cnns.layers.conv.depthwise import sum_weighted
from flax_cnns.layers.conv.geometry import ConvGeometry
from flax_cnns.layers.conv.taps import (
    assemble_kernel,
    fence,
    pad_or_crop,
    pad_to_map,
    tap_overlaps,
    tap_views,
)
from flax_cnns.types import Array


def rotated(x: Array, kernel: Array, geometry: ConvGeometry) -> Array:
    """A sum of depthwise convolutions, for few channels per group and as many outputs as inputs.

    The r-th depthwise convolution sees the channels of every group rotated by r.
    """
    size, channels = x.shape[-1] // geometry.groups, x.shape[-1]
    x = pad_or_crop(x, geometry.padding)
    x = x.reshape(*x.shape[:3], geometry.groups, size)
    kernel = kernel.reshape(*geometry.kernel_size, size, geometry.groups, size)
    total: Array | None = None
    for r in range(size):
        channels_rotated = jnp.roll(x, -r, -1).reshape(*x.shape[:3], channels)
        weights = [kernel[:, :, (o + r) % size, :, o] for o in range(size)]
        weights = fence(jnp.stack(weights, -1).reshape(*geometry.kernel_size, channels))
        part = sum_weighted(tap_views(channels_rotated, geometry), weights)
        total = part if total is None else fence(total + part)
    return cast(Array, total)


# ---------------------------------------------------------------------------- batched matmuls


def batched(x: Array, kernel: Array, geometry: ConvGeometry) -> Array:
    """`matmul.shifted` for groups, by matmuls that are batched over the groups."""
    groups, (per_group, features) = geometry.groups, kernel.shape[2:]
    x = _split_groups(x, groups)  # [G N H W C/G]
    kernel = kernel.reshape(*geometry.kernel_size, per_group, groups, features // groups)
    total = jnp.zeros((groups, x.shape[1], *geometry.out_size, features // groups), x.dtype)
    for i, j, source, target in tap_overlaps(geometry):
        part = jnp.einsum("gnhwc,cgo->gnhwo", x[(slice(None), *source)], kernel[i, j])
        total = total + pad_to_map(part, target, geometry.out_size)
    total = fence(total)  # or each reader would add all taps again
    return jnp.moveaxis(total, 0, 3).reshape(*total.shape[1:4], features)


def batched_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel, computed like `batched`."""
    groups, features = geometry.groups, dy.shape[-1]
    per_group = x.shape[-1] // groups
    x, dy, taps = _split_groups(x, groups), _split_groups(dy, groups), {}
    for i, j, source, target in tap_overlaps(geometry):
        a, b = x[(slice(None), *source)], dy[(slice(None), *target)]
        tap = jnp.einsum(
            "gmc,gmo->cgo",
            a.reshape(groups, -1, per_group),
            b.reshape(groups, -1, features // groups),
        )
        taps[i, j] = tap.reshape(per_group, features)
    return assemble_kernel(taps, (per_group, features), geometry, x.dtype)


def _split_groups(x: Array, groups: int) -> Array:
    """[N H W C] -> [G N H W C/G]."""
    return fence(jnp.moveaxis(x.reshape(*x.shape[:3], groups, -1), 3, 0))


# ---------------------------------------------------------------------------- blocks of groups


def blocks(x: Array, kernel: Array, geometry: ConvGeometry) -> Array:
    """A dense convolution for each block of neighboring groups, with zeros between the groups."""
    groups = geometry.groups
    per_block = groups_per_block(x.shape[-1] // groups, groups)
    kernel, count = _widen(kernel, groups, per_block), groups // per_block
    inner, parts = geometry._replace(groups=1), zip(_cut(x, count), _cut(kernel, count))
    return jnp.concatenate([xla.forward(a, k, inner) for a, k in parts], -1)


def blocks_kernel_grad(x: Array, dy: Array, geometry: ConvGeometry) -> Array:
    """Returns the gradient of the kernel, computed like `blocks`."""
    groups = geometry.groups
    per_block = groups_per_block(x.shape[-1] // groups, groups)
    count, inner = groups // per_block, geometry._replace(groups=1)
    parts = zip(_cut(x, count), _cut(dy, count))
    grads = [xla.kernel_grad(a, b, inner) for a, b in parts]
    return _narrow(jnp.concatenate(grads, -1), groups, per_block)


def _cut(x: Array, count: int) -> list[Array]:
    return jnp.split(x, count, axis=-1)


def _widen(kernel: Array, groups: int, per_block: int) -> Array:
    """[kh kw C/groups O] -> [kh kw per_block*C/groups O], with zeros between the groups."""
    kh, kw, size, features = kernel.shape
    kernel = kernel.reshape(kh, kw, 1, size, groups // per_block, per_block, features // groups)
    same = jnp.eye(per_block, dtype=kernel.dtype)[:, None, None, :, None]
    return (kernel * same).reshape(kh, kw, per_block * size, features)


def _narrow(kernel: Array, groups: int, per_block: int) -> Array:
    """The transpose of `_widen`."""
    kh, kw, wide, features = kernel.shape
    shape = (
        kh,
        kw,
        per_block,
        wide // per_block,
        groups // per_block,
        per_block,
        features // groups,
    )
    kernel = kernel.reshape(shape)
    parts = [kernel[:, :, n, :, :, n] for n in range(per_block)]
    return jnp.stack(parts, -2).reshape(kh, kw, wide // per_block, features)
