"""Wide residual networks: a few pre-activation blocks of two 3x3, k times as wide as a ResNet's.

WRN-d-k for CIFAR follows the released code. d = 6n + 4 counts the stem, the 6n convolutions of the
blocks and three projections (from 16 to 16k channels, to 32k, to 64k; k = 1 needs only two). A
block whose width changes applies norm and ReLU before it splits. `dropout` (0.3 in the paper) is
between the two convolutions, after norm and ReLU.

`wide_resnet50_2` and `wide_resnet101_2` for ImageNet are torchvision's: ResNets whose 3x3 are twice
as wide, with ReLU after the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import Classes, Count, ImageSize, Rate
from flax_cnns.models.resnet import DEPTHS, ResNet
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Wide Residual Networks",
    authors="Zagoruyko, Komodakis",
    year=2016,
    url="https://arxiv.org/abs/1605.07146",
)


class Block(nn.Module):
    """Two 3x3 convolutions: [N H W C] -> [N H/stride W/stride width], rounded up."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, drop: layers.DropPath | None = None, key: jax.Array | None = None
    ) -> Array:
        """Applies the block; `key` is the dropout's random key, None in evaluation."""
        projects = x.shape[-1] != self.width
        shortcut = x
        if projects:
            x = nn.relu(self.norm(name="norm1")(x))  # for shortcut and branch
            shortcut = self.conv(
                self.width, (1, 1), strides=self.stride, padding=0, name="projection"
            )(x)

        def branch(block: Block, x: Array) -> Array:
            y = x if projects else nn.relu(block.norm(name="norm1")(x))
            y = block.conv(block.width, (3, 3), strides=block.stride, padding=1, name="conv1")(y)
            y = nn.relu(block.norm(name="norm2")(y))
            if key is not None:
                y = nn.Dropout(block.dropout, deterministic=False, name="dropout")(y, rng=key)
            return block.conv(block.width, (3, 3), padding=1, name="conv2")(y)

        return layers.residual(shortcut, branch, self, x, drop)


class WideResNet(nn.Module):
    """Wide ResNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W. Raises
    `UserError` if the images have other channels than `input_size`, if `depth` is not 6n + 4, or if
    training with dropout lacks the random stream "dropout".
    """

    # architecture
    depth: Count  # d
    width_mult: Count  # k
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
    # regularization
    dropout: Rate = 0.0  # between the two convolutions of a block; 0.3 in the paper
    drop_path: Rate = 0.0  # rate of the last block: layers.make_drop_paths
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        n, rest = divmod(self.depth - 4, 6)
        if rest or n < 1:
            below = max(10, self.depth - rest)
            near = f"{below} or {below + 6}" if self.depth > 10 else "10"
            raise UserError(
                f"expected a depth of 6n + 4, n blocks in each of three stages, "
                f"got {self.depth}; the nearest is {near}"
            )
        conv, norm = layers.building_blocks(self, train)
        x = conv(16, (3, 3), padding=1, name="stem")(images)
        drops = layers.make_drop_paths(self, (n, n, n), train)
        keys: Any = [None] * 3
        if self.dropout and train and not self.is_initializing():
            keys = jax.random.split(layers.make_key(self, "dropout"), (3, n))
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i in range(3):
            block = partial(Block, 16 * self.width_mult * 2**i, norm=norm, dropout=self.dropout)
            stride = 1 if i == 0 else 2
            x = stage(block, conv, n, stride, name=f"stage{i + 1}")(x, drops[i], keys[i])
        x = nn.relu(norm(name="norm")(x))
        return layers.classify(self, x)


VARIANTS = {  # tables 4 and 5, WRN-d-k; table 8
    "wrn_16_4": partial(WideResNet, depth=16, width_mult=4),
    "wrn_16_8": partial(WideResNet, depth=16, width_mult=8),
    "wrn_16_10": partial(WideResNet, depth=16, width_mult=10),
    "wrn_22_8": partial(WideResNet, depth=22, width_mult=8),
    "wrn_22_10": partial(WideResNet, depth=22, width_mult=10),
    "wrn_28_10": partial(WideResNet, depth=28, width_mult=10),
    "wrn_28_12": partial(WideResNet, depth=28, width_mult=12),
    "wrn_40_1": partial(WideResNet, depth=40, width_mult=1),
    "wrn_40_2": partial(WideResNet, depth=40, width_mult=2),
    "wrn_40_4": partial(WideResNet, depth=40, width_mult=4),
    "wrn_40_8": partial(WideResNet, depth=40, width_mult=8),
    "wrn_28_10_c100": partial(WideResNet, depth=28, width_mult=10, num_classes=100),
    "wide_resnet50_2": partial(ResNet, depths=DEPTHS[50], base_width=128),
    "wide_resnet101_2": partial(ResNet, depths=DEPTHS[101], base_width=128),
}
SOURCES = {name: ("torchvision",) for name in ("wide_resnet50_2", "wide_resnet101_2")}
