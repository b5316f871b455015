"""Stems: the first layers of a network, which take images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn

from flax_cnns.layers.checks import check_images
from flax_cnns.layers.pool import max_pool
from flax_cnns.types import Array, ModuleDef


class ImageNetStem(nn.Module):
    """7x7/2 convolution, norm, ReLU, 3x3/2 max pool: [N H W C] -> [N H/4 W/4 width], rounded up."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    ceil: bool = False  # Caffe's pool, without padding: halves H and W, rounded down

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pool = _stem_pool(x, self.ceil)
        x = self.conv(self.width, (7, 7), strides=2, padding=3, name="conv")(x)
        return pool(nn.relu(self.norm(name="norm")(x)))


class DeepStem(nn.Module):
    """ImageNetStem with three 3x3 convolutions, the first with stride 2, in place of the 7x7.

    [N H W C] -> [N H/4 W/4 width], rounded up. He et al. 2018, https://arxiv.org/abs/1812.01187,
    figure 2b. The convolutions have width/2, width/2 and width channels, each followed by a norm
    and a ReLU. The max pool is ImageNetStem's.
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
    """Returns the 3x3/2 max pool that follows a convolution with stride 2.

    Raises `UserError` if Caffe's pool (`ceil`) would have no window on these images.
    """
    if not ceil:
        return partial(max_pool, window=3, stride=2, padding=1)
    check_images(images, images.shape[1:], smallest=3)
    return partial(max_pool, window=3, stride=2, ceil=True)


class CifarStem(nn.Module):
    """3x3 convolution, norm, ReLU: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    relu: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (3, 3), padding=1, name="conv")(x)
        x = self.norm(name="norm")(x)
        return nn.relu(x) if self.relu else x
