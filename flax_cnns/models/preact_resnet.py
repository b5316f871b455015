"""Pre-activation ResNets for ImageNet: norm and ReLU before each convolution, none after the sum.

The block is the paper's "full pre-activation", figure 4 (e), the only one it tries on ImageNet.
cifar_preact.py has the five orders that the paper compares on CIFAR. As section 4 describes, the
first block of a stage applies norm and ReLU before it splits, so that its projection and its branch
have the same input; norm and ReLU also follow the last sum; the stem has neither. The stride is on
the 3x3, as in timm, which costs 4.1 GMACs (50 layers). The paper's ResNets have the stride on the
first 1x1, which costs 3.9 GMACs. `resnetv2_*` are timm's names of the same networks.

`keras_*` are Keras's networks. The last block of a stage has the stride, and its shortcut takes
every second pixel, so all other blocks of a stage work on larger maps. Stem, projections and the
ends of branches have biases. The stem's max pooling pads the maps with zeros; since no ReLU
precedes it, such a zero can be the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Positive, Rate
from flax_cnns.models.resnet import DEPTHS
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Identity Mappings in Deep Residual Networks",
    authors="He, Zhang, Ren, Sun",
    year=2016,
    url="https://arxiv.org/abs/1603.05027",
)


class Stem(nn.Module):
    """7x7/2 convolution, 3x3/2 max pooling: [N H W C] -> [N H/4 W/4 width], rounded up."""

    width: int
    conv: ModuleDef
    bias: bool
    pad_zeros: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = self.conv(self.width, (7, 7), strides=2, padding=3, use_bias=self.bias, name="conv")
        x = conv(x)
        if self.pad_zeros:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return layers.max_pool(x, 3, 2, padding=0 if self.pad_zeros else 1)


class Bottleneck(nn.Module):
    """1x1 (narrows), 3x3, 1x1 (widens): [N H W C] -> [N H/stride W/stride 4*width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    bias: bool = False  # in the projection and the last convolution

    @nn.compact
    def __call__(self, x: Array, drop: layers.DropPath | None = None) -> Array:
        projects = x.shape[-1] != 4 * self.width
        shortcut = x
        if projects:
            x = nn.relu(self.norm(name="norm1")(x))  # for shortcut and branch
            projection = self.conv(
                4 * self.width,
                (1, 1),
                strides=self.stride,
                padding=0,
                use_bias=self.bias,
                name="projection",
            )
            shortcut = projection(x)
        elif self.stride > 1:
            shortcut = layers.max_pool(x, 1, self.stride)

        def branch(block: Bottleneck, x: Array) -> Array:
            y = x if projects else nn.relu(block.norm(name="norm1")(x))
            y = block.conv(block.width, (1, 1), padding=0, name="conv1")(y)
            y = nn.relu(block.norm(name="norm2")(y))
            y = block.conv(block.width, (3, 3), strides=block.stride, padding=1, name="conv2")(y)
            y = nn.relu(block.norm(name="norm3")(y))
            last = block.conv(4 * block.width, (1, 1), padding=0, use_bias=block.bias, name="conv3")
            return last(y)

        return layers.residual(shortcut, branch, self, x, drop)


class LateStrideStage(nn.Module):
    """An unrolled `layers.Stage` whose last block has the stride, instead of the first."""

    block: ModuleDef
    conv: ModuleDef
    depth: int
    stride: int = 1
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, drops: layers.DropPath | None = None) -> Array:
        def run(block: nn.Module, x: Array, drop: layers.DropPath | None) -> Array:
            return block(x, drop)

        if self.remat:
            run = nn.remat(run)
        for i in range(self.depth):
            stride = self.stride if i == self.depth - 1 else 1
            block = self.block(conv=self.conv, stride=stride, name=f"block{i + 1}")
            x = run(block, x, layers.for_block(drops, i))
        return x


class PreActResNet(nn.Module):
    """Pre-activation ResNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W; sizes round up at
    each of the five halvings. Raises `UserError` if the images have other channels than
    `input_size`, and for `scan` with `late_stride`.
    """

    # architecture
    depths: Counts  # blocks per stage
    width: Count = 64  # of the stem and the first stage; each stage doubles it
    input_size: ImageSize = (224, 224, 3)
    bias: bool = False  # in the stem, the projections and the last convolutions of branches
    late_stride: bool = False  # in the last blocks of stages 1 to 3, not the first of 2 to 4
    pad_zeros: bool = False  # the padding of the stem's pooling is 0, not -inf
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    drop_path: Rate = 0.0  # rate of the last block: layers.make_drop_paths
    drop_path_mode: str = "batch"
    drop_path_schedule: str = "linear"
    # numerics
    momentum: Rate = 0.9  # of the running statistics, in Flax's sense
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    # Layers of optimizer.layer_decay, as in timm: see train.optimizers.layer_exponents.
    layer_groups = (("norm", "below"),)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        if self.scan and self.late_stride:
            raise UserError(
                "expected scan=False, got True: with late_stride the last block of a stage differs "
                "from the others; remat=True saves memory too, and resnetv2_50 can be scanned"
            )
        conv, norm = layers.building_blocks(self, train)
        x = Stem(self.width, conv, self.bias, self.pad_zeros, name="stem")(images)  # H/4
        drops = layers.make_drop_paths(self, self.depths, train)
        stage = partial(LateStrideStage if self.late_stride else layers.Stage, remat=self.remat)
        if self.scan:
            stage = partial(stage, scan=True)
        strides = [2] * (len(self.depths) - 1)
        strides = [*strides, 1] if self.late_stride else [1, *strides]
        for i, (depth, stride) in enumerate(zip(self.depths, strides)):
            block = partial(Bottleneck, self.width * 2**i, norm=norm, bias=self.bias)
            x = stage(block, conv, depth, stride, name=f"stage{i + 1}")(x, drops[i])
        x = nn.relu(norm(name="norm")(x))
        return layers.classify(self, x)


_Keras = partial(
    PreActResNet,
    bias=True,
    late_stride=True,
    pad_zeros=True,
    momentum=0.99,
    epsilon=1.001e-5,
)
VARIANTS = {
    "preact_resnet50": partial(PreActResNet, depths=DEPTHS[50]),
    "preact_resnet101": partial(PreActResNet, depths=DEPTHS[101]),
    "preact_resnet152": partial(PreActResNet, depths=DEPTHS[152]),
    "preact_resnet200": partial(PreActResNet, depths=DEPTHS[200]),
    "resnetv2_50": partial(PreActResNet, depths=DEPTHS[50]),
    "resnetv2_101": partial(PreActResNet, depths=DEPTHS[101]),
    "resnetv2_152": partial(PreActResNet, depths=DEPTHS[152]),
    "keras_resnet50v2": partial(_Keras, depths=DEPTHS[50]),
    "keras_resnet101v2": partial(_Keras, depths=DEPTHS[101]),
    "keras_resnet152v2": partial(_Keras, depths=DEPTHS[152]),
}
_TIMM = ("preact_resnet50", "preact_resnet101", "preact_resnet152")
_TIMM_V2 = ("resnetv2_50", "resnetv2_101", "resnetv2_152")
SOURCES = {name: ("timm",) for name in _TIMM + _TIMM_V2} | {
    name: ("keras",) for name in VARIANTS if name.startswith("keras_")
}
