"""Fits weights to images of other channels, or of another size.

`adapt_channels` takes a stem's kernels from N channels to M, as timm does. For M = 1 they are
summed: exact for an image of N equal channels. Else they are repeated, cut to M and multiplied by
N / M: for N = 1 exact for an image of M equal channels. `resize_positions` resizes the grid of
position embeddings bicubically; the one of the class token stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flax_cnns.models import vit

POSITIONS = "position_embedding"  # the last name of such a leaf
FEW = 4  # at most so many input channels, and a kernel is taken to see images


class Plan(NamedTuple):
    """How a leaf is made to fit. `make` is None if it is not; `text` then says what would do it."""

    make: Callable[[np.ndarray], np.ndarray] | None
    text: str


def plan(
    path: str,
    here: tuple[int, ...],
    there: tuple[int, ...],
    *,
    stem: bool,
    positions: bool,
    first: bool = False,
) -> Plan | None:
    """The plan for a leaf of shape `here` whose weights have the shape `there`; None if these
    differ in more than the channels of images or the number of positions.

    `stem`, `positions`: whether these may be adapted. `first`: the layer is the network's first.
    """
    if is_stem(here, there, first=first):
        channels, came = here[2], there[2]
        if channels != 1 and came not in (1, 3):
            return Plan(None, f"a stem of {came} channels can only be adapted to 1 channel")
        how = "summed" if channels == 1 else f"repeated, cut and multiplied by {came}/{channels}"
        if stem:
            return Plan(
                lambda kernel: adapt_channels(kernel, channels),
                f"{came} input channels adapted to {channels}: {how}",
            )
        return Plan(None, f"adapt_stem=True fits them: {how} over the input channels")
    if is_positions(path, here, there):
        before, after = side(there[1]), side(here[1])
        if before is None or after is None:
            return Plan(
                None, "flax_cnns.models.vit.resize_positions resizes grids that are not square"
            )
        if positions:
            return Plan(
                lambda array: resize_positions(array, here[1]),
                f"positions of {before}x{before} patches resized bicubically to {after}x{after}",
            )
        return Plan(None, f"resize_positions=True fits them: resized to {after}x{after} patches")
    return None


def is_stem(here: tuple[int, ...], there: tuple[int, ...], *, first: bool = False) -> bool:
    """Whether kernels of these shapes [kh kw in out] differ in the channels of images alone.

    `first`: the layer is the network's first, whose channels may be many.
    """
    if len(here) != 4 or len(there) != 4 or here[2] == there[2]:
        return False
    alike = here[:2] == there[:2] and here[3] == there[3]
    return alike and (first or max(here[2], there[2]) <= FEW)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """f [kh kw N out] -> [kh kw channels out]; N is 1 or 3, or `channels` is 1."""
    came = kernel.shape[2]
    kernel = np.asarray(kernel, np.float32)
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, math.ceil(channels / came), 1))[:, :, :channels]
    return repeated * np.float32(came / channels)


def is_positions(path: str, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether the leaf is of positions [1 tokens C] that differ in their number alone."""
    named = path.rpartition("/")[2] == POSITIONS and len(here) == len(there) == 3
    return named and here[1] != there[1] and here[::2] == there[::2]


def side(tokens: int) -> int | None:
    """The side of the square grid of all tokens but the class token; None if it is not square."""
    found = math.isqrt(max(tokens - 1, 0))
    return found if found and found * found == tokens - 1 else None


def resize_positions(positions: np.ndarray, tokens: int) -> np.ndarray:
    """f [1 T C] -> [1 tokens C], both of a class token and a square grid."""
    before, after = side(positions.shape[1]), side(tokens)
    positions = np.asarray(positions, np.float32)
    return np.asarray(vit.resize_grid(positions, (before, before), (after, after)))
