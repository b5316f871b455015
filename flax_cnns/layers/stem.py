"""Where images enter: the check of their shape and the first layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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


def check_stages(depths: Sequence[int], widths: Sequence[int]) -> None:
    """Raises `UserError` unless there are as many of the ones as of the others."""
    if len(depths) != len(widths):
        raise UserError(
            f"expected a depth and a width for each stage, got depths {tuple(depths)} "
            f"and widths {tuple(widths)}"
        )


class ImageNetStem(nn.Module):
    """7x7/2, norm, ReLU, 3x3/2 max pool: [N H W C] -> [N H/4 W/4 width], rounded up."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    ceil: bool = False  # Caffe's pool: no padding, and its halving rounds down

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pool = _stem_pool(x, self.ceil)
        x = self.conv(self.width, (7, 7), strides=2, padding=3, name="conv")(x)
        return pool(nn.relu(self.norm(name="norm")(x)))


class DeepStem(nn.Module):
    """Three 3x3, the first with stride 2, in the place of the 7x7; then ImageNetStem's pool.

    He et al. 2018, https://arxiv.org/abs/1812.01187, figure 2b: width/2, width/2 and width
    channels, each behind a norm and a ReLU. [N H W C] -> [N H/4 W/4 width], rounded up.
    """

    width: int
    conv: ModuleDef
    norm: ModuleDef
    ceil: bool = False  # Caffe's pool, as in ImageNetStem

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pool = _stem_pool(x, self.ceil)
        for i, width in enumerate((self.width // 2, self.width // 2, self.width), 1):
            x = self.conv(width, (3, 3), strides=2 if i == 1 else 1, padding=1, name=f"conv{i}")(x)
            x = nn.relu(self.norm(name=f"norm{i}")(x))
        return pool(x)


def _stem_pool(images: Array, ceil: bool) -> Callable[[Array], Array]:
    """The 3x3/2 max pool behind a convolution of stride 2.

    Raises `UserError` where Caffe's would have no window on these images.
    """
    if not ceil:
        return partial(max_pool, window=3, stride=2, padding=1)
    check_images(images, images.shape[1:], smallest=3)
    return partial(max_pool, window=3, stride=2, ceil=True)


class CifarStem(nn.Module):
    """3x3, norm, ReLU: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    relu: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (3, 3), padding=1, name="conv")(x)
        x = self.norm(name="norm")(x)
        return nn.relu(x) if self.relu else x
