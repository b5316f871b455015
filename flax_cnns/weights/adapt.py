"""Weights for images of other channels, or of another size: what may be asked for by name.

A stem's kernels from N channels to M, as timm does it: summed where M is 1 (exact for an image of N
equal channels), else repeated, cut to M and multiplied by N / M (from 1 channel exact for an image
of M equal channels). Positions: the grid resized bicubically, the class token's own left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flax_cnns.models import vit

POSITIONS = "position_embedding"  # the last name of such a leaf
FEW = 4  # channels of images, at most, where nothing else says that a kernel sees images


class Plan(NamedTuple):
    """How a leaf is made to fit; `make` is None where it is not, and `text` says what would."""

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
    """For a leaf of shape `here` whose weights have the shape `there`; None where these differ in
    more than the channels of images or the number of positions.

    `stem`, `positions`: whether that may be adapted. `first`: the layer is the network's first.
    """
    if is_stem(here, there, first=first):
        channels, came = here[2], there[2]
        if channels != 1 and came not in (1, 3):
            return Plan(None, f"a stem of {came} channels is adapted to 1 alone")
        how = "summed" if channels == 1 else f"repeated, cut and times {came}/{channels}"
        if stem:
            return Plan(
                lambda kernel: adapt_channels(kernel, channels),
                f"{came} input channels adapted to {channels}: {how}",
            )
        return Plan(None, f"adapt_stem=True takes them, {how} over the input channels")
    if is_positions(path, here, there):
        before, after = side(there[1]), side(here[1])
        if before is None or after is None:
            return Plan(None, "flax_cnns.models.vit.resize_positions resizes what is not square")
        if positions:
            return Plan(
                lambda array: resize_positions(array, here[1]),
                f"positions of {before}x{before} patches resized bicubically to {after}x{after}",
            )
        return Plan(None, f"resize_positions=True takes them, resized to {after}x{after} patches")
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
    """Of a square grid of all tokens but the class's; None where that is none."""
    found = math.isqrt(max(tokens - 1, 0))
    return found if found and found * found == tokens - 1 else None


def resize_positions(positions: np.ndarray, tokens: int) -> np.ndarray:
    """f [1 T C] -> [1 tokens C], both of a class token and a square grid."""
    before, after = side(positions.shape[1]), side(tokens)
    positions = np.asarray(positions, np.float32)
    return np.asarray(vit.resize_grid(positions, (before, before), (after, after)))
