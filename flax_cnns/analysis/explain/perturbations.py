"""Saliency from hiding parts of the image: occlusion and RISE. They need no gradients."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.explain.targets import TargetLike, compute_scores, make_target
from flax_cnns.errors import UserError
from flax_cnns.types import Array


def occlusion(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: TargetLike = None,
    *,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    fill: float = 0.0,
) -> Array:
    """Returns how much the target decreases when a window hides part of the image: f32 [N H W].

    Zeiler & Fergus 2014, arXiv 1311.2901, section 4.2. A window of `window` pixels moves in steps
    of `stride` pixels (default: the window's size). Its pixels become `fill`; 0 is the mean color
    of normalized images. The last window of a row or column may be cut off at the border. Each
    pixel gets the mean over the windows that hide it. Raises `UserError` for a window that is
    larger than the image, for a stride larger than the window, and as `make_target` does.
    """
    height, width = images.shape[1:3]
    size = _pair("window", window)
    step = size if stride is None else _pair("stride", stride)
    if size[0] > height or size[1] > width:
        raise UserError(
            f"window: expected at most {height}x{width} pixels, got {size[0]}x{size[1]}"
        )
    if step[0] > size[0] or step[1] > size[1]:
        raise UserError(
            f"stride: expected at most the window {size}, got {step}; pixels are left out"
        )
    goal = make_target(target, model, variables, images)
    whole = compute_scores(model, variables, images, goal)
    total, hidden = np.zeros((len(images), height, width)), np.zeros((height, width))
    for top in _starts(height, size[0], step[0]):
        for left in _starts(width, size[1], step[1]):
            mask = np.zeros((height, width), bool)
            mask[top : top + size[0], left : left + size[1]] = True
            covered = jnp.where(mask[None, :, :, None], fill, images)
            fall = np.asarray(whole - compute_scores(model, variables, covered, goal))
            total += fall[:, None, None] * mask
            hidden += mask
    return jnp.asarray(total / hidden, jnp.float32)


def rise(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: TargetLike = None,
    *,
    key: Array,
    masks: int = 2000,
    cells: int = 7,
    keep: float = 0.5,
) -> Array:
    """Returns the mean of random masks, weighted by the target of the masked image, divided by
    `keep`: f32 [N H W].

    Petsiuk et al. 2018, arXiv 1806.07421, equation 6. A mask is a grid of `cells` x `cells` zeros
    and ones (one with probability `keep`), enlarged bilinearly and moved by up to a cell. All
    images get the same masks. If the target is a class, its probability is used, as in the paper.
    Equal keys give equal maps. Raises `UserError` as `make_target` does.
    """
    if masks < 1 or cells < 1 or not 0 < keep < 1:
        raise UserError(
            f"expected masks and cells of at least 1 and 0 < keep < 1, got {masks}, {cells}, {keep}"
        )
    goal = make_target(target, model, variables, images)
    if goal.function is None and goal.against is None:
        goal = dataclasses.replace(goal, of_probabilities=True)
    total = jnp.zeros(images.shape[:3], jnp.float32)
    for number in range(masks):
        mask = _make_mask(jax.random.fold_in(key, number), images.shape[1:3], cells, keep)
        score = compute_scores(model, variables, images * mask[None, :, :, None], goal)
        total += score[:, None, None] * mask
    return total / (masks * keep)


@partial(jax.jit, static_argnames=("size", "cells", "keep"))
def _make_mask(key: Array, size: tuple[int, int], cells: int, keep: float) -> Array:
    cell = [-(-n // cells) for n in size]
    key_grid, key_move = jax.random.split(key)
    grid = jax.random.bernoulli(key_grid, keep, (cells, cells)).astype(jnp.float32)
    # One cell more than the image needs, so that the mask can be moved.
    enlarged = jax.image.resize(grid, [(cells + 1) * n for n in cell], "bilinear")
    move = jax.random.randint(key_move, (2,), 0, jnp.asarray(cell))
    return jax.lax.dynamic_slice(enlarged, move, size)


def _starts(size: int, window: int, stride: int) -> range:
    """Returns the first pixel of each window. The last window reaches the border or crosses it."""
    return range(0, max(size - window, 0) + stride, stride)


def _pair(name: str, given: int | tuple[int, int]) -> tuple[int, int]:
    first, second = (given, given) if isinstance(given, int) else given
    if first < 1 or second < 1:
        raise UserError(f"{name}: expected at least 1 pixel, got {given}")
    return first, second
