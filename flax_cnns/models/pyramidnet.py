"""PyramidNets for CIFAR: each of N units is wider than the unit before it, by alpha / N channels.

These are the additive networks of section 2.2 with the units of figure 6d. A unit has no ReLU
before its first convolution and a norm after its last. Its shortcut has no weights: it appends
zeros to the channels, and averages 2x2 pixels where maps shrink.

Unit k of N has floor(16 + alpha k / N) channels (equation 2 in exact arithmetic), so that the last
unit has 16 + alpha, as table 4 prints. If the widths were summed up in floating point, some sums
would fall short of a whole number and lose a channel: 110 layers with alpha 48 would end in 63
channels and have 1,732,856 parameters instead of 1,739,730; 272 layers with alpha 200 would have
26,046,428 instead of 26,049,562. The authors' released code, and most work since, rounds to the
nearest integer: `rounding="nearest"`. For alpha 270 both roundings give 28,485,477 parameters. The
paper prints 28.3M; we found no interpretation that gives this number.

ShakeDrop (Yamada et al. 2018, https://arxiv.org/abs/1802.02375) follows the last norm of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models.fields import AtLeast, Classes, Count, DescribedAs, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper, PyTree

PAPER = Paper(
    title="Deep Pyramidal Residual Networks",
    authors="Han, Kim, Kim",
    year=2017,
    url="https://arxiv.org/abs/1610.02915",
)
ROUNDINGS = {"down": math.floor, "nearest": lambda width: math.floor(width + 0.5)}


def shortcut(x: Array, width: int, stride: int) -> Array:
    """Shortcut without weights: [N H W C] -> [N H/stride W/stride width], sizes rounded up.

    Averages 2x2 pixels if `stride` is 2, and appends zeros to the channels. At the edge of maps of
    odd size it averages the pixels that exist.
    """
    if stride == 2:
        x = layers.avg_pool(x, 2, 2, ceil=True)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: [N H W C] -> [N H/stride W/stride width], rounded up."""

    branch_depth: ClassVar[int] = 2  # convolutions

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array, drop: PyTree = None, shake_drop: PyTree = None) -> Array:
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones

        def branch(block: BasicBlock, x: Array) -> Array:
            conv = partial(block.conv, block.width, (3, 3), padding=1)
            x = conv(strides=block.stride, name="conv1")(block.norm(name="norm1")(x))
            x = conv(name="conv2")(nn.relu(block.norm(name="norm2")(x)))
            return layers.shake_drop(block.norm(name="norm3", scale_init=last)(x), shake_drop)

        return layers.residual(shortcut(x, self.width, self.stride), branch, self, x, drop)


class Bottleneck(nn.Module):
    """1x1 (narrows), 3x3, 1x1 (widens): [N H W C] -> [N H/stride W/stride 4*width]."""

    branch_depth: ClassVar[int] = 3

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array, drop: PyTree = None, shake_drop: PyTree = None) -> Array:
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones

        def branch(block: Bottleneck, x: Array) -> Array:
            x = block.norm(name="norm1")(x)
            x = block.conv(block.width, (1, 1), padding=0, name="conv1")(x)
            x = nn.relu(block.norm(name="norm2")(x))
            x = block.conv(block.width, (3, 3), strides=block.stride, padding=1, name="conv2")(x)
            x = nn.relu(block.norm(name="norm3")(x))
            x = block.conv(4 * block.width, (1, 1), padding=0, name="conv3")(x)
            return layers.shake_drop(block.norm(name="norm4", scale_init=last)(x), shake_drop)

        return layers.residual(shortcut(x, 4 * self.width, self.stride), branch, self, x, drop)


class Stage(nn.Module):
    """Blocks of different widths, the first with the stride: [N H W C] -> [N H/stride W/stride C'].

    Works like `layers.Stage`, but without `scan`, since `nn.scan` needs identical blocks.
    """

    block: ModuleDef  # without width, stride and name
    widths: Sequence[int]
    stride: int = 1
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, *each: PyTree) -> Array:
        def run(block: Any, x: Array, drops: PyTree) -> Array:
            return block(x, *drops)

        if self.remat:
            run = nn.remat(run)
        for i, width in enumerate(self.widths):
            stride = self.stride if i == 0 else 1
            block = self.block(width, stride=stride, name=f"block{i + 1}")
            x = run(block, x, [layers.for_block(drops, i) for drops in each])
        return x


class PyramidNet(nn.Module):
    """PyramidNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W. Raises
    `UserError` if the images have other channels than `input_size`, if `depth` does not give three
    equal stages of whole blocks, or if `alpha` is negative.
    """

    # architecture
    depth: Count  # layers: convolutions of branches, stem and head
    # The last block has this many more channels than the stem.
    alpha: Annotated[float, AtLeast(0), DescribedAs("a number of at least 0")]
    block: ModuleDef = BasicBlock
    rounding: str = "down"  # of widths; "nearest" as in the released code
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
    # regularization
    drop_path: Rate = 0.0  # rate of stochastic depth in the last block: layers.make_drop_paths
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    shake_drop: Rate = 0.0  # rate of ShakeDrop in the last block: layers.make_shake_drops
    shake_drop_level: str = "image"  # or "batch", "channel", "pixel"
    shake_drop_alpha: tuple[float, float] = (-1.0, 1.0)
    shake_drop_beta: tuple[float, float] = (0.0, 1.0)
    # numerics
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # each block starts as the identity: its last norm is 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    remat: bool = False  # recompute the inside of each block in the backward pass

    def compute_widths(self) -> list[list[int]]:
        """Returns the channels inside each block, for each of the three stages."""
        block: Any = self.block
        convs = 3 * block.branch_depth  # one more block per stage adds so many
        depth, rest = divmod(self.depth - 2, convs)
        if rest or depth < 1:
            near = (convs * n + 2 for n in (max(depth, 1), max(depth, 1) + 1))
            raise UserError(
                f"expected a depth of {convs}n + 2 for {block.__name__}, got {self.depth}; "
                f"the nearest are {' and '.join(map(str, near))}"
            )
        if self.alpha < 0:
            raise UserError(f"alpha must be a number of at least 0, got {self.alpha}")
        if self.rounding not in ROUNDINGS:
            raise UserError(
                f"unknown rounding {self.rounding!r}{did_you_mean(self.rounding, ROUNDINGS)}"
            )
        # Not a running sum of alpha / N: its rounding errors would turn 64 into 63.
        total = 3 * depth
        widths = [
            ROUNDINGS[self.rounding](16 + self.alpha * k / total) for k in range(1, total + 1)
        ]
        return [widths[i : i + depth] for i in range(0, total, depth)]

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        widths = self.compute_widths()
        conv, norm = layers.building_blocks(self, train)
        depths = [len(stage) for stage in widths]
        drops = layers.make_drop_paths(self, depths, train)
        shake_drops = layers.make_shake_drops(self, depths, train)
        x = layers.CifarStem(16, conv, norm, relu=False, name="stem")(images)
        block = partial(self.block, conv=conv, norm=norm, zero_init=self.zero_init)
        for i in range(3):
            stride = 1 if i == 0 else 2
            stage = Stage(block, widths[i], stride, remat=self.remat, name=f"stage{i + 1}")
            x = stage(x, drops[i], shake_drops[i])
        x = nn.relu(norm(name="norm")(x))
        return layers.classify(self, x)


_110_a270 = partial(PyramidNet, depth=110, alpha=270)
_272_a200 = partial(PyramidNet, depth=272, alpha=200, block=Bottleneck)
VARIANTS = {  # table 4; ShakeDrop as in its paper, p_L = 0.5
    "pyramidnet_110_a48": partial(PyramidNet, depth=110, alpha=48),
    "pyramidnet_110_a84": partial(PyramidNet, depth=110, alpha=84),
    "pyramidnet_110_a270": _110_a270,
    "pyramidnet_110_a270_shakedrop": partial(_110_a270, shake_drop=0.5),
    "pyramidnet_272_a200": _272_a200,
    "pyramidnet_272_a200_rounded": partial(_272_a200, rounding="nearest"),
    "pyramidnet_272_a200_shakedrop": partial(_272_a200, shake_drop=0.5),
}
