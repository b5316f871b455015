"""Fits weights to images with another number of channels or of another size.

`adapt_channels` changes a stem's kernels from N to M input channels, as timm does. For M = 1 the
kernels are summed over the channels, which is exact for an image of N equal channels. For other M
they are repeated, cut to M channels and multiplied by N / M; for N = 1 this is exact for an image
of M equal channels. `resize_positions` resizes the grid of position embeddings bicubically; the
position embedding of the class token is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_cnns.models import vit

POSITION_LEAF = "position_embedding"  # last name in the path of such a leaf
MAX_IMAGE_CHANNELS = 4  # a kernel with at most so many input channels is assumed to see images


class AdaptPlan(NamedTuple):
    """How a leaf is made to fit the network.

    `adapt` is None if the leaf cannot or may not be adapted; `description` then says what would
    make it fit.
    """

    adapt: Callable[[np.ndarray], np.ndarray] | None
    description: str


def make_plan(
    path: str,
    here: tuple[int, ...],
    there: tuple[int, ...],
    *,
    stem: bool,
    positions: bool,
    first: bool = False,
) -> AdaptPlan | None:
    """The plan for a leaf of shape `here` whose weights have the shape `there`.

    None if the shapes are equal, or differ in more than the channels of images or the number of
    positions. `stem` and `positions` say which of the two may be adapted. `first`: the layer is the
    network's first.
    """
    if is_stem(here, there, first=first):
        channels, came = here[2], there[2]
        if channels != 1 and came not in (1, 3):
            return AdaptPlan(
                None, f"a stem with {came} input channels can only be adapted to 1 channel"
            )
        how = "summed" if channels == 1 else f"repeated, cut and multiplied by {came}/{channels}"
        if stem:
            return AdaptPlan(
                lambda kernel: adapt_channels(kernel, channels),
                f"{came} input channels adapted to {channels}: {how}",
            )
        return AdaptPlan(None, f"adapt_stem=True adapts the kernels: {how} over the input channels")
    if is_position_embedding(path, here, there):
        before, after = grid_side(there[1]), grid_side(here[1])
        if before is None or after is None:
            return AdaptPlan(
                None, "flax_cnns.models.vit.resize_positions resizes grids that are not square"
            )
        if positions:
            return AdaptPlan(
                lambda array: resize_positions(array, here[1]),
                f"positions of {before}x{before} patches resized bicubically to {after}x{after}",
            )
        return AdaptPlan(None, f"resize_positions=True resizes the grid to {after}x{after} patches")
    return None


def is_stem(here: tuple[int, ...], there: tuple[int, ...], *, first: bool = False) -> bool:
    """Whether two kernel shapes [kh kw in out] differ only in the number of image channels.

    `first`: the layer is the network's first, so its input is images, with any number of channels.
    """
    if len(here) != 4 or len(there) != 4 or here[2] == there[2]:
        return False
    alike = here[:2] == there[:2] and here[3] == there[3]
    return alike and (first or max(here[2], there[2]) <= MAX_IMAGE_CHANNELS)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """f [kh kw N out] -> [kh kw channels out]; N is 1 or 3, or `channels` is 1."""
    came = kernel.shape[2]
    kernel = np.asarray(kernel, np.float32)
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, math.ceil(channels / came), 1))[:, :, :channels]
    return repeated * np.float32(came / channels)


def is_position_embedding(path: str, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether the leaf holds position embeddings, and its shapes [1 T C] differ only in T."""
    named = path.rpartition("/")[2] == POSITION_LEAF and len(here) == len(there) == 3
    return named and here[1] != there[1] and here[::2] == there[::2]


def grid_side(tokens: int) -> int | None:
    """Side of the square grid of all tokens except the class token; None if it is not square."""
    side = math.isqrt(max(tokens - 1, 0))
    return side if side and side * side == tokens - 1 else None


def resize_positions(positions: np.ndarray, tokens: int) -> np.ndarray:
    """f [1 T C] -> [1 tokens C]; T and `tokens` count a class token and a square grid."""
    before, after = grid_side(positions.shape[1]), grid_side(tokens)
    assert before is not None  # `make_plan` refuses grids that are not square
    assert after is not None
    grid = jnp.asarray(positions, jnp.float32)
    return np.asarray(vit.resize_grid(grid, (before, before), (after, after)))
