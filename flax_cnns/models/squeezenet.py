"""SqueezeNet: table 1, its simple bypass (figure 2), and the authors' version 1.1.

Where the paper leaves details open we follow the authors' release (github.com/forresti/SqueezeNet):
pooling rounds sizes up as Caffe does, and ReLU also follows conv10 (here `head`).
`kernel_init="paper"` is the release's initialization: its "xavier" filler (uniform, variance
1 / fan_in), N(0, 0.01^2) in the head, and zero biases. The shapes in table 1 are those of 227x227
images, though the table says 224. The released 1.0 pads the 1x1 convolution conv10, so the mean
over its output includes a border of biases alone. Like torchvision, we do not pad it.

Version 1.1 is not in the paper. It has a smaller conv1, earlier pooling and 2.3 times fewer MACs.

`squeezenet1_1_c10` is 1.1 with ten classes and no other change: with a CIFAR image its last four
modules see 1x1 maps. `cifar_squeezenet1_1` is what Hasanpour et al. 2018
(https://arxiv.org/abs/1802.06205) trained on CIFAR-10: 1.1 with stride 1 in conv1 and in the first
pooling, so that the last four modules see 7x7 maps (github.com/Coderx7/SimpNet,
SimpNetV2/Experiments/SqueezeNet_v1.1_tests). "Optimized" in their table means with BatchNorm, here
`norm="batch"`, except after fire2's squeeze and fire4's expand1x1. The 768K of that table is
unverified. Their own list of layers has 727,626 parameters, as both of our networks have, or
733,226 with its BatchNorm (ours: 733,514). With 100 classes it has 773,796, and 1.0 with ten
classes has 740,554.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, CountOrZero, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size",
    authors="Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer",
    year=2016,
    url="https://arxiv.org/abs/1602.07360",
)

# Channels of fire2 to fire9: of the squeeze, and of each of the two expanding convolutions.
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Fire(nn.Module):
    """Fire module: a 1x1 (squeeze), then 1x1 and 3x3 (expand): [N H W C] -> [N H W 2*expand]."""

    squeeze: int
    expand: int
    unit: ModuleDef  # a layers.ConvUnit
    bypass: bool = False  # adds the input, which needs as many channels as the output

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.unit(self.squeeze, (1, 1), name="squeeze")(x)
        one = self.unit(self.expand, (1, 1), name="expand1x1")(y)
        three = self.unit(self.expand, (3, 3), name="expand3x3")(y)
        y = jnp.concatenate([one, three], axis=-1)
        return x + y if self.bypass else y


class SqueezeNet(nn.Module):
    """SqueezeNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns the pooled output of fire9, f32 [N 512], if `num_classes` is None. H and W are at least
    21 in 1.0, 17 in 1.1, 8 with CIFAR's stem. Raises `UserError` if the images are too small or
    have other channels than `input_size`.
    """

    # architecture
    conv1: tuple[Count, Count, Count, CountOrZero]  # width, kernel size, stride, padding
    pool_after: Sequence[Count]  # numbers of the fire modules that a pooling follows
    pool1_stride: Count = 2  # of the pooling after conv1
    bypass: Sequence[Count] = ()  # numbers of the fire modules with a bypass
    input_size: ImageSize = (224, 224, 3)
    norm: str = "none"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.5  # of fire9's output
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        width, window, stride, padding = self.conv1
        # The last two poolings round up: they reduce 4 pixels to 2 and 1, and 3 pixels to none. The
        # first pooling reduces 2 * pool1_stride + 4 pixels to 4.
        smallest = (2 * self.pool1_stride + 3) * stride + window - 2 * padding
        layers.check_images(images, self.input_size, smallest)
        paper = layers.caffe_xavier
        conv, norm = layers.building_blocks(self, train, paper=paper, use_bias=True)
        unit = partial(layers.ConvUnit, conv=conv, norm=norm)
        # Comments give the size of maps for images of 227x227, in 1.0 and in 1.1.
        conv1 = unit(width, (window, window), stride=stride, padding=padding, name="conv1")
        x = conv1(images)  # 111, 113
        x = layers.MaxPool(3, self.pool1_stride, ceil=True, name="pool1")(x)  # 55, 56
        for i, (squeeze, expand) in enumerate(FIRES, 2):
            x = Fire(squeeze, expand, unit, i in self.bypass, name=f"fire{i}")(x)
            if i in self.pool_after:
                x = layers.MaxPool(3, 2, ceil=True, name=f"pool{i}")(x)  # 27, 28; then 13, 14
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout9")(x)
        return layers.classify_by_maps(self, x, paper=layers.gaussian(0.01))


_1_0 = partial(SqueezeNet, conv1=(96, 7, 2, 0), pool_after=(4, 8))
_1_1 = partial(SqueezeNet, pool_after=(3, 5))
_C10: Any = dict(num_classes=10, input_size=(32, 32, 3))

VARIANTS = {
    "squeezenet1_0": partial(_1_0),
    "squeezenet1_0_bypass": partial(_1_0, bypass=(3, 5, 7, 9)),
    "squeezenet1_1": partial(_1_1, conv1=(64, 3, 2, 0)),
    "squeezenet1_1_c10": partial(_1_1, conv1=(64, 3, 2, 0), **_C10),
    "cifar_squeezenet1_1": partial(_1_1, conv1=(64, 3, 1, 0), pool1_stride=1, **_C10),
}

SOURCES = {"squeezenet1_0": ("torchvision",), "squeezenet1_1": ("torchvision",)}
