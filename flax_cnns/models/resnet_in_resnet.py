"""ResNet in ResNet (RiR) for CIFAR: blocks with a shortcut, made of units with two streams.

A generalized residual unit (equation 1, figure 1b) has a residual stream r with a shortcut, a
transient stream t without, and four convolutions within and between the streams. Stacked units are
the "ResNet Init" networks. A block of RiR (figure 1d) is He et al.'s block with two such units in
place of its two convolutions.

This is a reconstruction, and the parameter counts are unverified. What we know about the 18-layer
wide network is what three released implementations (pytorchcv's, nutszebra's and weiaicunzai's)
have in common: one 3x3 convolution per stream; 4, 6 and 6 units with 48, 96 and 192 channels per
stream; a 1x1 convolution from both streams to the classes; and the mean of its maps.
Where they differ, we chose:

- Shortcuts: ours take every stride-th pixel and append zeros, which gives 9,469,940 parameters.
  pytorchcv's two 1x1 projections (23,040 parameters) make it 9,492,980.
- The outer shortcut: ours joins only the residual streams, after the unit's ReLU (nutszebra). The
  other implementations have no outer shortcut, as `resnet_init_18_wide` here.
- The stride: ours is on the first unit of a stage. One implementation has it on the second.
- The head: BatchNorm follows it, without ReLU (pytorchcv).

The paper's ResNet Init adds the identity to the initial values of a kernel. We have a shortcut
instead: the same network, except that weight decay does not shrink the identity. `rir_18` is our
choice: as many layers with 8, 16 and 32 channels per stream, that is, 16, 32 and 64 in total as in
He et al.'s networks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Counts, ImageSize
from flax_cnns.models.resnet import shortcut
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Resnet in Resnet: Generalizing Residual Architectures",
    authors="Targ, Almeida, Lyman",
    year=2016,
    url="https://arxiv.org/abs/1603.08029",
)
Streams = tuple[Array, Array]  # residual and transient, both [N H W C]


class Unit(nn.Module):
    """Equation 1: r' = s(W_rr * r + W_tr * t + shortcut(r)), t' = s(W_rt * r + W_tt * t).

    s is norm and ReLU, each W a 3x3 convolution. Each stream: [N H W C] -> [N H/stride W/stride
    width], rounded up.
    """

    width: int  # of each stream
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        r, t = streams
        conv = partial(self.conv, self.width, (3, 3), strides=self.stride, padding=1)
        kept = shortcut("A", r, self.width, self.stride, self.conv, self.norm)
        to_r = conv(name="r_to_r")(r) + conv(name="t_to_r")(t) + kept
        to_t = conv(name="r_to_t")(r) + conv(name="t_to_t")(t)
        return nn.relu(self.norm(name="norm_r")(to_r)), nn.relu(self.norm(name="norm_t")(to_t))


class Block(nn.Module):
    """Two units, and if `nested` a shortcut of the residual stream around both."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    nested: bool = True
    stride: int = 1

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        unit = partial(Unit, self.width, self.conv, self.norm)
        r, t = unit(name="unit2")(unit(stride=self.stride, name="unit1")(streams))
        if self.nested:
            r += shortcut("A", streams[0], self.width, self.stride, self.conv, self.norm)
        return r, t


class ResNetInResNet(nn.Module):
    """ResNet in ResNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] of both streams if `num_classes` is None: 384 channels in
    `rir_18_wide`. Takes any H and W. Raises `UserError` if the images have other channels than
    `input_size`, if `depths` and `widths` differ in length, and for `norm="group"`, since the norm
    after the head has one channel per class.
    """

    # architecture
    depths: Counts = (2, 3, 3)  # blocks per stage; a block has two units
    widths: Counts = (48, 96, 192)  # of each stream
    nested: bool = True  # RiR; False: ResNet Init, without the outer shortcuts
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
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
        layers.check_stages(self.depths, self.widths)
        conv, norm = layers.building_blocks(self, train)
        stem = partial(layers.CifarStem, self.widths[0], conv, norm)
        streams: Any = stem(name="stem_r")(images), stem(name="stem_t")(images)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            block = partial(Block, width, norm=norm, nested=self.nested)
            streams = stage(block, conv, depth, stride=1 if i == 0 else 2, name=f"stage{i + 1}")(
                streams
            )
        x = jnp.concatenate(streams, axis=-1)
        if self.num_classes is None:
            return layers.global_avg_pool(x)
        conv, norm = layers.building_blocks(self, train, dtype=jnp.float32)
        head = partial(conv, kernel_init=layers.get_initializer("lecun"), name="head")
        x = norm(name="head_norm")(head(self.num_classes, (1, 1))(x))
        return layers.global_avg_pool(x)  # [N H W num_classes] -> [N num_classes]


VARIANTS = {
    "rir_18": partial(ResNetInResNet, widths=(8, 16, 32)),
    "rir_18_wide": partial(ResNetInResNet),
    "resnet_init_18_wide": partial(ResNetInResNet, nested=False),
}
