"""MobileNet v1: after the stem, each 3x3 convolution is depthwise and is followed by a 1x1.

Table 1 of the paper. In the table the last depthwise 3x3 has stride 2, on maps of 7x7 that stay
7x7; here its stride is 1, as in the released code, Keras and timm. The paper has ReLU. The released
code, Keras, timm and this file have ReLU6 (`activation=nn.relu` is the paper's). `width_mult` is
the paper's alpha (section 3.3), for every layer except the classifier. The paper's resolution
multiplier (section 3.4) is not a field but the size of the images: at 224, 192, 160 and 128 pixels,
the network of width 1 needs 569, 418, 290 and 186 million multiplications (table 7), with the same
parameters.

`keras_mobilenet` has TensorFlow's padding, which equals Keras's only on maps of even size. Keras
pads strided convolutions only at the end, so that a map of odd size becomes one row smaller than
here. Image sizes that are multiples of 32 have no such map.
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
STEM_WIDTH, STAGE_WIDTHS = 32, (64, 128, 256, 512, 1024)  # of the stem and the stages


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
    """MobileNet v1: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W; sizes round up at
    each of the five halvings. Raises `UserError` if the images have other channels than
    `input_size`.
    """

    # architecture
    width_mult: Factor = 1.0  # alpha; layers.round_width rounds the widths
    depths: Counts = (1, 2, 2, 6, 2)  # blocks per stage; all stages but the first halve H and W
    depth_multiplier: Count = 1  # maps per channel of a depthwise convolution
    activation: Callable = nn.relu6
    padding: str = "torch"  # or "same", TensorFlow's: layers.resolve_padding
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # of the pooled features
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's running statistics
    epsilon: Positive = 1e-5
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
        conv, norm = layers.building_blocks(self, train)
        layers.check_stages(self.depths, STAGE_WIDTHS)
        stem_width, *widths = (
            layers.round_width(n * self.width_mult) for n in (STEM_WIDTH, *STAGE_WIDTHS)
        )
        stem = layers.ConvUnit(
            stem_width,
            (3, 3),
            conv,
            norm,
            stride=2,
            padding=layers.resolve_padding(self.padding, 3),
            activation=self.activation,
            name="stem",
        )
        x = stem(images)  # H/2
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, (width, depth) in enumerate(zip(widths, self.depths), 1):  # H/2 to H/32
            block = partial(
                Block,
                width,
                norm=norm,
                activation=self.activation,
                padding=self.padding,
                depth_multiplier=self.depth_multiplier,
            )
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
