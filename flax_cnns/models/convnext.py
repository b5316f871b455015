"""ConvNeXt: a ResNet with the design choices of transformers.

All blocks have one layout: a depthwise 7x7 and two 1x1 convolutions. Tiny to XL are section 3's
networks. Atto to nano are timm's smaller ones, with the same arithmetic: GELU is exact, LayerNorm
is over channels with epsilon 1e-6, and the last LayerNorm follows the pooling. XL, which the paper
trains on ImageNet-22K first, has 1000 classes here. Kernels start like torchvision's, N(0, 0.02^2),
and biases at 0. The paper trains T, S, B and L on ImageNet-1K with `drop_path` 0.1, 0.4, 0.5 and
0.5 (table 5). Here `drop_path` is 0 by default; if set, each image decides separately whether a
branch is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="A ConvNet for the 2020s",
    authors="Liu, Mao, Wu, Feichtenhofer, Darrell, Xie",
    year=2022,
    url="https://arxiv.org/abs/2201.03545",
)


class Stem(nn.Module):
    """4x4 convolution with stride 4, then norm: [N H W C] -> [N H/4 W/4 width], rounded down."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (4, 4), strides=4, padding=0, name="conv")(x)
        return self.norm(name="norm")(x)


class Downsample(nn.Module):
    """Norm, then 2x2 convolution with stride 2: [N H W C] -> [N H/2 W/2 width], rounded down."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.norm(name="norm")(x)
        return self.conv(self.width, (2, 2), strides=2, padding=0, name="conv")(x)


class Block(nn.Module):
    """Figure 4: depthwise 7x7, norm, widening 1x1, GELU, narrowing 1x1: [N H W C] -> [N H W C]."""

    conv: ModuleDef
    norm: ModuleDef
    expansion: int = 4
    layer_scale: float | None = 1e-6  # initial factor of each channel; None: no factors
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, drop: layers.DropPath | None = None) -> Array:
        def branch(block: Block, x: Array) -> Array:
            width = x.shape[-1]
            depthwise = partial(block.conv, feature_group_count=width, name="depthwise")
            y = block.norm(name="norm")(depthwise(width, (7, 7), padding=3)(x))
            y = block.conv(block.expansion * width, (1, 1), padding=0, name="expand")(y)
            y = nn.gelu(y, approximate=False)
            y = block.conv(width, (1, 1), padding=0, name="project")(y)
            if block.layer_scale is None:
                return y
            init = nn.initializers.constant(block.layer_scale)
            return y * block.param("layer_scale", init, (width,), block.param_dtype).astype(y.dtype)

        return layers.residual(x, branch, self, x, drop)


class ConvNeXt(nn.Module):
    """ConvNeXt: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled and normalized features f32 [N C] if `num_classes` is None. H and W are at least
    32 with four stages, and are rounded down at each halving. Raises `UserError` if the images are
    too small or have other channels than `input_size`.
    """

    # architecture
    depths: Counts  # blocks per stage
    width: Count  # of the first stage; each later stage has twice as many channels
    expansion: Count = 4  # of a block
    layer_scale: float | None = 1e-6  # initial factor per channel (section A.1); None: no factors
    input_size: ImageSize = (224, 224, 3)
    norm: str = "channel"  # or another of layers.make_norm's
    # head
    num_classes: Classes | None = 1000
    # regularization
    drop_path: Rate = 0.0  # rate of the last block: layers.make_drop_paths
    drop_path_mode: str = "sample"
    drop_path_schedule: str = "convnext"
    # numerics
    epsilon: Positive = 1e-6
    kernel_init: str | Callable = "paper"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm, if norm is "batch"
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        smallest = 4 * 2 ** (len(self.depths) - 1)
        layers.check_images(images, self.input_size, smallest)
        building_blocks = partial(
            layers.building_blocks, self, train, paper=layers.gaussian(0.02), use_bias=True
        )
        conv, norm = building_blocks()
        x = Stem(self.width, conv, norm, name="stem")(images)  # H/4
        drops = layers.make_drop_paths(self, self.depths, train)
        block = partial(
            Block,
            norm=norm,
            expansion=self.expansion,
            layer_scale=self.layer_scale,
            param_dtype=self.param_dtype,
        )
        stage = partial(layers.Stage, block, conv, scan=self.scan, remat=self.remat)
        for i, depth in enumerate(self.depths):  # H/4, H/8, H/16, H/32
            if i > 0:
                x = Downsample(self.width * 2**i, conv, norm, name=f"downsample{i}")(x)
            x = stage(depth, None, name=f"stage{i + 1}")(x, drops[i])
        _, head_norm = building_blocks(dtype=jnp.float32)
        x = head_norm(name="norm")(layers.global_avg_pool(x))  # [N H W C] -> [N C]
        return layers.classify(self, x, paper=layers.gaussian(0.02))


VARIANTS = {
    "convnext_atto": partial(ConvNeXt, depths=(2, 2, 6, 2), width=40),
    "convnext_femto": partial(ConvNeXt, depths=(2, 2, 6, 2), width=48),
    "convnext_pico": partial(ConvNeXt, depths=(2, 2, 6, 2), width=64),
    "convnext_nano": partial(ConvNeXt, depths=(2, 2, 8, 2), width=80),
    "convnext_tiny": partial(ConvNeXt, depths=(3, 3, 9, 3), width=96),
    "convnext_small": partial(ConvNeXt, depths=(3, 3, 27, 3), width=96),
    "convnext_base": partial(ConvNeXt, depths=(3, 3, 27, 3), width=128),
    "convnext_large": partial(ConvNeXt, depths=(3, 3, 27, 3), width=192),
    "convnext_xlarge": partial(ConvNeXt, depths=(3, 3, 27, 3), width=256),
}
SOURCES = (
    {f"convnext_{size}": ("timm",) for size in ("atto", "femto", "pico", "nano")}
    | {
        f"convnext_{size}": ("torchvision", "timm", "keras")
        for size in ("tiny", "small", "base", "large")
    }
    | {"convnext_xlarge": ("timm", "keras")}
)
