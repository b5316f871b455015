"""Squeeze-and-excitation in ResNet, ResNeXt and SENet-154, the winner of ILSVRC 2017.

Each branch ends in `layers.SqueezeExcite`. There are two kinds of networks:

- `se_resnet50` and others are the authors' Caffe networks, which timm calls `legacy_seresnet50` and
  so on. The first 1x1 of a bottleneck has the stride (in ResNeXt and SENet-154 the 3x3), and the
  stem's max pooling rounds sizes up instead of padding. The authors released no networks with
  blocks of two 3x3; these blocks have a ReLU before the squeeze, as in timm.
- `seresnet50` and others are timm's own: torchvision's networks, with at least 8 channels between
  the two dense layers of a squeeze-and-excitation.

SENet-154 comes from the paper's section 6.1 and its appendix: a ResNeXt-152 64x4d with half as many
channels in the first 1x1 of a bottleneck, 3x3 projections where the size changes, a deep stem, and
dropout 0.2 before the classes. `legacy_senet154` is the authors' network. `senet154` is timm's own,
with padded pooling and without dropout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn

from flax_cnns import layers
from flax_cnns.models.resnet import DEPTHS, BasicBlock, Bottleneck, BottleneckV1, ResNet
from flax_cnns.types import Array, Paper

PAPER = Paper(
    title="Squeeze-and-Excitation Networks",
    authors="Hu, Shen, Albanie, Sun, Wu",
    year=2017,
    url="https://arxiv.org/abs/1709.01507",
)


class RectifiedSqueezeExcite(layers.SqueezeExcite):
    """Squeeze-and-excitation after a ReLU: [N H W C] -> [N H W C]."""

    def __call__(self, x: Array) -> Array:
        return super().__call__(nn.relu(x))


_CAFFE: Any = dict(stem=partial(layers.ImageNetStem, ceil=True), attention=layers.SqueezeExcite)
_CAFFE_BASIC: Any = _CAFFE | dict(block=BasicBlock, attention=RectifiedSqueezeExcite)
_32X4D: Any = dict(groups=32, base_width=4)
_154 = partial(
    ResNet,
    depths=DEPTHS[152],
    block=partial(Bottleneck, first_reduction=2),
    groups=64,
    base_width=4,
    shortcut="3x3",
    stem_width=128,
)
_TIMM: Any = dict(attention=partial(layers.SqueezeExcite, divisor=8))
VARIANTS = {
    "legacy_seresnet18": partial(ResNet, depths=DEPTHS[18], **_CAFFE_BASIC),
    "legacy_seresnet34": partial(ResNet, depths=DEPTHS[34], **_CAFFE_BASIC),
    "legacy_seresnet50": partial(ResNet, depths=DEPTHS[50], block=BottleneckV1, **_CAFFE),
    "legacy_seresnet101": partial(ResNet, depths=DEPTHS[101], block=BottleneckV1, **_CAFFE),
    "legacy_seresnet152": partial(ResNet, depths=DEPTHS[152], block=BottleneckV1, **_CAFFE),
    "legacy_seresnext50_32x4d": partial(ResNet, depths=DEPTHS[50], **_32X4D, **_CAFFE),
    "legacy_seresnext101_32x4d": partial(ResNet, depths=DEPTHS[101], **_32X4D, **_CAFFE),
    "legacy_senet154": partial(
        _154, dropout=0.2, **_CAFFE | dict(stem=partial(layers.DeepStem, ceil=True))
    ),
    "seresnet18": partial(ResNet, depths=DEPTHS[18], block=BasicBlock, **_TIMM),
    "seresnet34": partial(ResNet, depths=DEPTHS[34], block=BasicBlock, **_TIMM),
    "seresnet50": partial(ResNet, depths=DEPTHS[50], **_TIMM),
    "seresnet101": partial(ResNet, depths=DEPTHS[101], **_TIMM),
    "seresnet152": partial(ResNet, depths=DEPTHS[152], **_TIMM),
    "seresnext50_32x4d": partial(ResNet, depths=DEPTHS[50], **_32X4D, **_TIMM),
    "seresnext101_32x4d": partial(ResNet, depths=DEPTHS[101], **_32X4D, **_TIMM),
    "senet154": partial(_154, stem=layers.DeepStem, **_TIMM),
}
# The authors' networks also have the authors' names: `se_resnet50` is `legacy_seresnet50`.
ALIASES = {
    name.replace("legacy_se", "se_"): name for name in VARIANTS if name.startswith("legacy_seres")
}
VARIANTS |= {alias: VARIANTS[name] for alias, name in ALIASES.items()}
SOURCES = {name: ("timm",) for name in VARIANTS}
