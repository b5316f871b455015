"""MobileNet v1: behind the first layer, every 3x3 is one per channel with a 1x1 behind it.

Table 1 of the paper. Its last depthwise 3x3 has stride 2 there, on maps of 7x7 that stay 7x7: it is
1 here, as in everybody's code. The paper has ReLU; the released code, and with it Keras, timm and
this file, ReLU6 (`activation=nn.relu` is the paper's). `width_mult` is the paper's alpha, section
3.3, for every layer but the classes. Its resolution multiplier, section 3.4, is the size of the
images and no field: with 224, 192, 160 and 128 pixels the network of width 1 needs 569, 418, 290
and 186 million multiplications (table 7), with the same parameters.

`keras_mobilenet` has TensorFlow's padding, at even sizes: Keras pads strided convolutions behind
only, which makes a map of odd size one row less than here. Sizes that 32 divides meet no such map.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Counts, Factor, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
    authors="Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam",
    year=2017,
    url="https://arxiv.org/abs/1704.04861",
)
STEM_WIDTH, STAGE_WIDTHS = 32, (64, 128, 256, 512, 1024)  # of the first layer and of the stages


class Block(layers.SeparableConv):
    """Depthwise 3x3, norm, activation, 1x1, norm, activation (figure 3, right).

    [N H W C] -> [N H/stride W/stride width], rounded up.
    """

    activation: Callable = nn.relu6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = super().__call__(x)
        return self.activation(self.norm(name="pointwise_norm")(x))


class MobileNetV1(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    Any H and W; sizes round up at each of five halvings. Raises `UserError` where C is not that of
    `input_size`.
    """

    # architecture
    width_mult: Factor = 1.0  # alpha: widths are rounded by layers.round_width
    depths: Counts = (1, 2, 2, 6, 2)  # of the stages; all but the first halve
    depth_multiplier: Count = 1  # maps that a depthwise convolution makes of each channel
    activation: Callable = nn.relu6
    padding: str = "torch"  # or "same", TensorFlow's: layers.resolve_padding
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # of the pooled features
    # numerics
    momentum: Rate = 0.9  # of the running statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm
    # compilation
    scan: bool = False  # the repeats of a stage as one block under nn.scan: layers.Stage
    remat: bool = False  # compute the inside of each block again in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        conv, norm = layers.building_blocks(self, train)
        like = dict(norm=norm, activation=self.activation)
        layers.check_stages(self.depths, STAGE_WIDTHS)
        first, *widths = (
            layers.round_width(n * self.width_mult) for n in (STEM_WIDTH, *STAGE_WIDTHS)
        )
        stem = partial(layers.ConvUnit, first, (3, 3), conv, stride=2, **like)
        x = stem(padding=layers.resolve_padding(self.padding, 3), name="stem")(images)  # H/2
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        like |= dict(padding=self.padding, depth_multiplier=self.depth_multiplier)
        for i, (width, depth) in enumerate(zip(widths, self.depths), 1):  # H/2 to H/32
            block = partial(Block, width, **like)
            x = stage(block, conv, depth, 1 if i == 1 else 2, name=f"stage{i}")(x)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, x, dropout=dropout)


VARIANTS = {  # table 6
    "mobilenet_v1_100": partial(MobileNetV1),
    "mobilenet_v1_075": partial(MobileNetV1, width_mult=0.75),
    "mobilenet_v1_050": partial(MobileNetV1, width_mult=0.5),
    "mobilenet_v1_025": partial(MobileNetV1, width_mult=0.25),
    "mobilenetv1_100": partial(MobileNetV1),  # timm's names
    "mobilenetv1_125": partial(MobileNetV1, width_mult=1.25),
    "keras_mobilenet": partial(
        MobileNetV1, padding="same", dropout=1e-3, momentum=0.99, epsilon=1e-3
    ),
}
SOURCES = {
    "mobilenet_v1_100": ("timm",),
    "mobilenetv1_100": ("timm",),
    "mobilenetv1_125": ("timm",),
    "keras_mobilenet": ("keras",),
}
