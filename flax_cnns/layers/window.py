"""The geometry of a convolution: everything about it but its arrays."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """Height before width everywhere; hashable, so that it can be a primitive's parameter."""

    in_size: tuple[int, int]
    kernel: tuple[int, int]
    out_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # negative: cropped
    dilation: tuple[int, int]  # of the kernel
    groups: int = 1
    control_flow: bool = False  # inside lax.scan, lax.cond or lax.while_loop
