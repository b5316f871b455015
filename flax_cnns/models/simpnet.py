"""SimpNet: thirteen 3x3 convolutions, three of them with SAF pooling, which is max pooling with
some of the best responses missing.

Widths, rates of dropout, constants of BatchNorm and first values are those of the network
definitions its authors publish for CIFAR-10 (https://github.com/Coderx7/SimpNet, in SimpNetV2:
Architectures/CIFAR10 and Experiments/Slim Test/CIFAR10); convolutions are counted from 1 to 13 here
where those say conv1_0, conv4_2. Dropout stands behind every convolution and every pooling: 0.2 and
from the second pooling on 0.3 (5M); 0.2 (9M); 0.1 and from there on 0.2 (600K); none (300K; its
CIFAR-100 network has saf_rate=(0.1, 0.2, 0.2)). The README's 5.4M are 5,478,223 parameters.

We differ in the running statistics: Caffe divides its moving sum by the sum of its weights, so it
starts at the first batch's; ours starts at mean 0 and variance 1, which a run of a few
hundred steps notices: after 100 of them 0.95^100 = 0.006, or 0.99^100 = 0.37, is still the start's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Rate
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="Towards Principled Design of Deep Convolutional Networks: Introducing SimpNet",
    authors="Hasanpour, Rouhani, Fayyaz, Sabokrou, Adeli",
    year=2018,
    url="https://arxiv.org/abs/1802.06205",
)


class SimpNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    Any H and W from 4 on. Raises `UserError` where the images are smaller or have other channels
    than `input_size`, and where there are not as many rates as groups.
    """

    # architecture
    widths: Sequence[Counts]  # of the convolutions up to each of the poolings
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"  # "group" for widths that 16 divides; "none"
    # head
    num_classes: Classes | None = 10
    # regularization
    # Behind a convolution that no pooling follows: one rate, or one for each group of `widths`.
    dropout: Rate | Sequence[Rate] = 0.0
    # Of the pooling behind each group, the last over the whole map; `saf`: layers.SAFPool.choose.
    saf_rate: Rate | Sequence[Rate] = 0.0
    saf: str = "random"
    # numerics
    momentum: Rate = 0.95  # of the running statistics
    kernel_init: str | Callable = "he"
    gaussian: Sequence[Count] = (3, 4, 5)  # convolutions that "paper" starts with N(0, 0.01^2)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        # Every pooling but the last halves.
        layers.check_images(images, self.input_size, 2 ** (len(self.widths) - 1))
        dropout, saf_rate = self._rates("dropout"), self._rates("saf_rate")
        x, number = images, 0
        for i, group in enumerate(self.widths):  # H, H/2, H/4
            for place, width in enumerate(group, 1):
                number += 1
                paper = layers.gaussian(0.01) if number in self.gaussian else layers.caffe_xavier
                conv, norm = layers.building_blocks(self, train, paper=paper, use_bias=True)
                x = layers.ConvUnit(width, (3, 3), conv, norm, name=f"conv{number}")(x)
                if place < len(group):  # else the pooling drops
                    drop = nn.Dropout(dropout[i], name=f"dropout{number}")
                    x = drop(x, deterministic=not train)
            window = 2 if i + 1 < len(self.widths) else None
            x = layers.SAFPool(saf_rate[i], window, self.saf, name=f"pool{i + 1}")(x, train)
        return layers.classify(self, x, paper=layers.caffe_xavier)  # of [N C]

    def _rates(self, field: str) -> Sequence[float]:
        """The field as one rate for each group of `widths`."""
        rates, groups = getattr(self, field), len(self.widths)
        if isinstance(rates, int | float):
            return (rates,) * groups
        if len(rates) != groups:
            raise UserError(f"{field} is one rate or {groups}, one a pooling; got {len(rates)}")
        return rates


VARIANTS = {
    "simpnet_5m": partial(
        SimpNet,
        widths=((66, 128, 128, 128, 192), (192, 192, 192, 192, 288), (288, 355, 432)),
        dropout=(0.2, 0.2, 0.3),
        saf_rate=(0.2, 0.3, 0.3),
    ),
    "simpnet_9m": partial(
        SimpNet,
        widths=((128, 182, 182, 182, 182), (182, 182, 182, 182, 430), (430, 455, 600)),
        dropout=0.2,
        saf_rate=0.2,
    ),
    "simpnet_slim_300k": partial(
        SimpNet,
        widths=((30, 40, 40, 40, 50), (50, 50, 50, 50, 58), (58, 70, 90)),
        momentum=0.99,
        gaussian=(),
    ),
    "simpnet_slim_600k": partial(
        SimpNet,
        widths=((40, 60, 60, 60, 72), (73, 73, 73, 75, 81), (82, 90, 120)),
        dropout=(0.1, 0.1, 0.2),
        saf_rate=(0.1, 0.2, 0.2),
        momentum=0.99,
        gaussian=(),
    ),
}
