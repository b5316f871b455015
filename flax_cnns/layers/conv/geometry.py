"""The geometry of a convolution: all its parameters except the arrays."""

from __future__ import annotations

from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """Sizes, strides, padding, dilation and groups; pairs are (height, width).

    The tuple is hashable, so that it can be a parameter of a primitive.
    """

    in_size: tuple[int, int]
    kernel_size: tuple[int, int]
    out_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # (before, after); negative numbers crop
    dilation: tuple[int, int]  # of the kernel
    groups: int = 1
    control_flow: bool = False  # inside lax.scan, lax.cond or lax.while_loop

    @property
    def positions(self) -> int:
        """The number of pixels of an output map."""
        return self.out_size[0] * self.out_size[1]

    @property
    def is_patchwise(self) -> bool:
        """Whether the kernel's size is its stride, so that no two positions read the same pixel."""
        undilated, unpadded = self.dilation == (1, 1), not any(map(any, self.padding))
        return self.kernel_size == self.strides and undilated and unpadded
