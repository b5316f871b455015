"""Network in Network: the CIFAR and ImageNet networks that the first author released for Caffe.

The paper gives no widths. The released files do: CIFAR-10's (gist mavenlin/e56253735ef32c3c296d,
about 1 M parameters) and ImageNet's (gist mavenlin/d802a5849de39225bcc6). `nin_cifar100` is
CIFAR-10's network with 100 classes. The files settle what the paper leaves open: all pooling is 3x3
with stride 2 and rounds sizes up, as Caffe does; ReLU also follows the last 1x1 convolution, which
gives one map per class, and the mean of each map is the class's logit. The files differ from the
paper's section 4.1 in two points: the second pooling of the CIFAR network is average pooling, where
the paper has max pooling; the ImageNet network has dropout only before its last mlpconv, where the
paper has it between all of them.

The last 1x1 convolution of the last mlpconv is named `head`, so that fine-tuning can replace it.
`kernel_init="paper"` is the initialization of the released files: N(0, 0.05^2), but N(0, 0.01^2)
for ImageNet's conv1, conv3 and head; biases start at zero. The first author's older cuda-convnet
files have smaller standard deviations, 0.001 and 0.01. The paper gives no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, CountOrZero, Counts, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Network In Network",
    authors="Lin, Chen, Yan",
    year=2013,
    url="https://arxiv.org/abs/1312.4400",
)


class Row(NamedTuple):
    """An mlpconv, the pooling after it (None after the last), and whether dropout follows."""

    kernel_size: Count
    widths: Counts  # of the convolution and of the 1x1 convolutions
    stride: Count = 1
    padding: CountOrZero = 0
    std: float = 0.05  # standard deviation of the convolution's initial values, as released
    pool: Callable | None = layers.max_pool
    drop: bool = True


class MlpConv(nn.Module):
    """A convolution, then 1x1 convolutions, each with ReLU: [N H W C] -> [N H' W' widths[-1]]."""

    row: Row
    conv: ModuleDef
    kernel_init: str | Callable

    @nn.compact
    def __call__(self, x: Array) -> Array:
        row = self.row
        kernel_size = (row.kernel_size, row.kernel_size)
        init = layers.get_initializer(self.kernel_init, paper=layers.gaussian(row.std))
        conv = partial(self.conv, strides=row.stride, padding=row.padding, kernel_init=init)
        x = nn.relu(conv(row.widths[0], kernel_size, name="conv")(x))
        init = layers.get_initializer(self.kernel_init, paper=layers.gaussian(0.05))
        for i, width in enumerate(row.widths[1:], 1):
            x = nn.relu(self.conv(width, (1, 1), kernel_init=init, name=f"cccp{i}")(x))
        return x


class NIN(nn.Module):
    """Network in Network: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None: the last mlpconv without its last
    convolution, the head, has 192 (CIFAR) or 1024 channels. H and W are at least `smallest`: 4
    (CIFAR) or 39. The network has no norms, so `axis_name` changes nothing. Raises `UserError` if
    the images are too small or have other channels than `input_size`.
    """

    # architecture
    rows: Sequence[Row]
    smallest: Count = 4  # pixels; of smaller images the pooling would leave nothing
    input_size: ImageSize = (32, 32, 3)
    # head
    num_classes: Classes | None = 10
    # regularization
    dropout: Rate = 0.5  # after the mlpconvs whose row has `drop`
    # numerics
    head_std: float = 0.05  # standard deviation of the head's initial values, as released
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, self.smallest)
        conv = partial(layers.Conv, dtype=self.dtype, param_dtype=self.param_dtype)
        x = images
        for i, row in enumerate(self.rows, 1):  # H: 32, 16, 8 (CIFAR); 54, 27, 13, 6 (ImageNet)
            x = MlpConv(row, conv, self.kernel_init, name=f"mlpconv{i}")(x)
            if row.pool:
                x = row.pool(x, 3, 2, ceil=True)
            if row.drop:
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return layers.classify_by_maps(self, x, paper=layers.gaussian(self.head_std))


_CIFAR = (
    Row(5, (192, 160, 96), padding=2),
    Row(5, (192, 192, 192), padding=2, pool=layers.avg_pool),
    Row(3, (192, 192), padding=1, pool=None, drop=False),
)
_IMAGENET = (
    Row(11, (96, 96, 96), stride=4, std=0.01, drop=False),
    Row(5, (256, 256, 256), padding=2, drop=False),
    Row(3, (384, 384, 384), padding=1, std=0.01),
    Row(3, (1024, 1024), padding=1, pool=None, drop=False),
)

VARIANTS = {
    "nin_cifar10": partial(NIN, rows=_CIFAR),
    "nin_cifar100": partial(NIN, rows=_CIFAR, num_classes=100),
    "nin_imagenet": partial(
        NIN,
        rows=_IMAGENET,
        smallest=39,
        head_std=0.01,
        num_classes=1000,
        input_size=(224, 224, 3),
    ),
}
