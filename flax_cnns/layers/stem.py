"""Where images enter: the check of their shape and the first layers."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from flax_cnns.errors import UserError
from flax_cnns.layers.pool import max_pool
from flax_cnns.types import Array, ModuleDef


def check_images(images: Array, input_size: Sequence[int], smallest: int = 1) -> None:
    """Raises `UserError` unless images are [N H W C], H and W at least `smallest`, C as expected.

    `input_size` is the network's (H, W, C): only C is binding.
    """
    if images.ndim != 4:
        raise UserError(f"expected images [N H W C], got the shape {tuple(images.shape)}")
    _, height, width, channels = images.shape
    if channels != input_size[-1]:
        raise UserError(
            f"expected images of {input_size[-1]} channels, got {channels} in the shape "
            f"{tuple(images.shape)}; create_model(..., input_size=({height}, {width}, {channels})) "
            f"makes a network for them"
        )
    if min(height, width) < smallest:
        raise UserError(
            f"images of {height}x{width} are too small: the smallest is {smallest}x{smallest}"
        )


class ImageNetStem(nn.Module):
    """7x7/2, norm, ReLU, 3x3/2 max pool: [N H W C] -> [N H/4 W/4 width], rounded up."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (7, 7), strides=2, padding=3, name="conv")(x)
        x = nn.relu(self.norm(name="norm")(x))
        return max_pool(x, 3, 2, padding=1)


class CifarStem(nn.Module):
    """3x3, norm, ReLU: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (3, 3), padding=1, name="conv")(x)
        return nn.relu(self.norm(name="norm")(x))
