"""ResNeXt: ResNet's bottleneck with a grouped 3x3 convolution, in the form of figure 3(c).

A name gives groups x channels per group: 32x4d has 32 groups of 4 channels in the first stage,
where `width` is 64. Strides are on the 3x3, as in torchvision and the authors' code. The paper has
50 and 101 layers with 32x4d and 101 with 64x4d for ImageNet; 101 with 32x8d is torchvision's
(Mahajan et al. 2018). CIFAR's networks are those of section 5.3: three stages of three bottlenecks,
9n + 2 = 29 layers. The first stage has 256 output channels, as on ImageNet.
"""

from __future__ import annotations

from functools import partial

from flax_cnns import layers
from flax_cnns.models.resnet import DEPTHS, ResNet
from flax_cnns.types import Paper

PAPER = Paper(
    title="Aggregated Residual Transformations for Deep Neural Networks",
    authors="Xie, Girshick, Dollár, Tu, He",
    year=2016,
    url="https://arxiv.org/abs/1611.05431",
)

_CIFAR = partial(
    ResNet,
    depths=(3, 3, 3),
    base_width=64,
    stem=layers.CifarStem,
    num_classes=10,
    input_size=(32, 32, 3),
)
VARIANTS = {
    "resnext50_32x4d": partial(ResNet, depths=DEPTHS[50], groups=32, base_width=4),
    "resnext101_32x4d": partial(ResNet, depths=DEPTHS[101], groups=32, base_width=4),
    "resnext101_32x8d": partial(ResNet, depths=DEPTHS[101], groups=32, base_width=8),
    "resnext101_64x4d": partial(ResNet, depths=DEPTHS[101], groups=64, base_width=4),
    "resnext29_8x64d": partial(_CIFAR, groups=8),
    "resnext29_16x64d": partial(_CIFAR, groups=16),
}
SOURCES = {
    "resnext50_32x4d": ("torchvision",),
    "resnext101_32x4d": ("timm",),
    "resnext101_32x8d": ("torchvision",),
    "resnext101_64x4d": ("torchvision",),
}
