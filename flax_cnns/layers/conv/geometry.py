"""The geometry of a convolution: everything about it but its arrays."""

from __future__ import annotations

from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """Height before width everywhere; hashable, so that it can be a primitive's parameter."""

    in_size: tuple[int, int]
    kernel_size: tuple[int, int]
    out_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # negative: cropped
    dilation: tuple[int, int]  # of the kernel
    groups: int = 1
    control_flow: bool = False  # inside lax.scan, lax.cond or lax.while_loop

    @property
    def positions(self) -> int:
        """Pixels of an output map."""
        return self.out_size[0] * self.out_size[1]

    @property
    def is_patchwise(self) -> bool:
        """Whether each pixel is read by one position alone: the kernel's size is its stride."""
        undilated, unpadded = self.dilation == (1, 1), not any(map(any, self.padding))
        return self.kernel_size == self.strides and undilated and unpadded
