"""VGG: configurations A to E of table 1, with and without BatchNorm, and with a CIFAR head.

The paper has neither BatchNorm nor CIFAR. With BatchNorm the convolutions keep their biases, as in
torchvision, although the norm's shift makes them redundant; vgg16_bn has 8,448 parameters more than
vgg16. The CIFAR networks have the layout of github.com/kuangliu/pytorch-cifar: the same five stages
reduce 32x32 to 1x1, and a single dense layer without dropout replaces three. cifar_vgg16 has 14.7 M
parameters instead of 138.4 M.

For images other than 224x224 the last maps are averaged to 7x7, as in torchvision. The paper
instead slides the dense layers over larger maps as convolutions and averages the scores.

`kernel_init="paper"` is N(0, 0.01^2) with zero biases. Section 3.1 says "10^-2 variance". He et al.
(https://arxiv.org/abs/1502.01852, section 2.2) read this as the standard deviation, and so do we.
In the paper only A learned from this initialization. The deeper networks started with the first
four convolutions and the dense layers of a trained A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Very Deep Convolutional Networks for Large-Scale Image Recognition",
    authors="Simonyan, Zisserman",
    year=2014,
    url="https://arxiv.org/abs/1409.1556",
)

MIN_IMAGE_SIZE = 32  # five halvings leave one pixel


class Stage(nn.Module):
    """Convolutions with ReLU, then 2x2 max pooling: [N H W C] -> [N H/2 W/2 width]."""

    width: int
    windows: Sequence[int]  # kernel size of each convolution: 3, in C also 1
    conv: ModuleDef
    norm: ModuleDef
    lrn: bool = False  # local response normalization before the pooling

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, window in enumerate(self.windows, 1):
            conv = self.conv(self.width, (window, window), padding=window // 2, name=f"conv{i}")
            x = nn.relu(self.norm(name=f"norm{i}")(conv(x)))
        if self.lrn:
            x = layers.local_response_norm(x)  # with AlexNet's constants: section 2.1
        return layers.max_pool(x, 2, 2)


class VGG(nn.Module):
    """VGG: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns the head's input if `num_classes` is None: fc7's output, f32 [N 4096], or pooled
    features f32 [N 512] with a CIFAR head. H and W are at least 32. Raises `UserError` if the
    images are too small or have other channels than `input_size`.
    """

    # architecture
    windows: Sequence[Counts]  # kernel sizes of the convolutions of each stage
    widths: Counts = (64, 128, 256, 512, 512)  # of the stages
    pool: Count = 7  # height and width of the maps that the dense layers take
    lrn: bool = False  # local response normalization after the first convolution: A-LRN
    input_size: ImageSize = (224, 224, 3)
    norm: str = "none"
    # head
    hidden: Sequence[Count] = (4096, 4096)  # fc6 and fc7
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.5  # of the outputs of fc6 and of fc7
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        paper = layers.gaussian(0.01)
        init = layers.get_initializer(self.kernel_init, paper=paper)
        dense = partial(nn.Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        conv, norm = layers.building_blocks(self, train, paper=paper, use_bias=True)
        x = images
        for i, (width, windows) in enumerate(zip(self.widths, self.windows)):  # H/2, ..., H/32
            lrn = self.lrn and i == 0
            x = Stage(width, windows, conv, norm, lrn, name=f"stage{i + 1}")(x)
        x = layers.adaptive_avg_pool(x, self.pool)
        x = x.reshape(x.shape[0], -1)  # [N H W C] -> [N H*W*C]
        for i, width in enumerate(self.hidden):
            x = nn.relu(dense(width, name=f"fc{i + 6}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i + 6}")(x)
        return layers.classify(self, x, paper=paper)


_A = ((3,), (3,), (3, 3), (3, 3), (3, 3))  # table 1
_B = ((3, 3),) * 5
_C = ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1))
_D = ((3, 3), (3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
_E = ((3, 3), (3, 3), (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3))

_VGG_BN = partial(VGG, norm="batch")
_CIFAR = partial(VGG, pool=1, hidden=(), num_classes=10, input_size=(32, 32, 3))
_CIFAR_BN = partial(_CIFAR, norm="batch")

VARIANTS = {
    "vgg11": partial(VGG, windows=_A),
    "vgg11_lrn": partial(VGG, windows=_A, lrn=True),
    "vgg13": partial(VGG, windows=_B),
    "vgg16_c": partial(VGG, windows=_C),
    "vgg16": partial(VGG, windows=_D),
    "vgg19": partial(VGG, windows=_E),
    "vgg11_bn": partial(_VGG_BN, windows=_A),
    "vgg13_bn": partial(_VGG_BN, windows=_B),
    "vgg16_c_bn": partial(_VGG_BN, windows=_C),
    "vgg16_bn": partial(_VGG_BN, windows=_D),
    "vgg19_bn": partial(_VGG_BN, windows=_E),
    "cifar_vgg11": partial(_CIFAR, windows=_A),
    "cifar_vgg13": partial(_CIFAR, windows=_B),
    "cifar_vgg16": partial(_CIFAR, windows=_D),
    "cifar_vgg19": partial(_CIFAR, windows=_E),
    "cifar_vgg11_bn": partial(_CIFAR_BN, windows=_A),
    "cifar_vgg13_bn": partial(_CIFAR_BN, windows=_B),
    "cifar_vgg16_bn": partial(_CIFAR_BN, windows=_D),
    "cifar_vgg19_bn": partial(_CIFAR_BN, windows=_E),
}

SOURCES = {
    "vgg11": ("torchvision",),
    "vgg13": ("torchvision",),
    "vgg16": ("torchvision", "keras"),
    "vgg19": ("torchvision", "keras"),
    "vgg11_bn": ("torchvision",),
    "vgg13_bn": ("torchvision",),
    "vgg16_bn": ("torchvision",),
    "vgg19_bn": ("torchvision",),
}
