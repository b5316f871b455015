"""The rows of a network's table as modules, whose outputs can be captured by their names."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from flax_cnns.layers.norm import NoNorm
from flax_cnns.layers.pool import avg_pool, max_pool
from flax_cnns.types import Array, ModuleDef


class ConvUnit(nn.Module):
    """Convolution, norm, activation: [N H W C] -> [N H' W' width]."""

    width: int
    kernel_size: tuple[int, int]
    conv: ModuleDef
    norm: ModuleDef = NoNorm
    stride: int | tuple[int, int] = 1
    padding: str | int = "SAME"
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = self.conv(
            self.width, self.kernel_size, strides=self.stride, padding=self.padding, name="conv"
        )
        return self.activation(self.norm(name="norm")(conv(x)))


class MaxPool(nn.Module):
    """`max_pool` as a module: [N H W C] -> [N H' W' C]."""

    window: int
    stride: int
    ceil: bool = False

    def __call__(self, x: Array) -> Array:
        return max_pool(x, self.window, self.stride, ceil=self.ceil)


class AvgPool(nn.Module):
    """`avg_pool` as a module: [N H W C] -> [N H' W' C]."""

    window: int
    stride: int

    def __call__(self, x: Array) -> Array:
        return avg_pool(x, self.window, self.stride)
