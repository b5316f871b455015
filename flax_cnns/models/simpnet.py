"""SimpNet: 13 convolutions of 3x3, and 3 SAF poolings that drop some of the best responses.

Widths, dropout rates, BatchNorm constants and initial values come from the network definitions that
the authors publish for CIFAR-10 (https://github.com/Coderx7/SimpNet, in SimpNetV2:
Architectures/CIFAR10 and Experiments/Slim Test/CIFAR10). Their conv1_0, conv4_2 and so on are
numbered from 1 to 13 here. Dropout follows each convolution except the last of a group, where the
SAF pooling drops instead. The 300K network drops nothing; its CIFAR-100 version has
saf_rate=(0.1, 0.2, 0.2). The README's 5.4M are 5,478,223 parameters.

Our running statistics differ. Caffe divides its moving sum by the sum of the weights, so that the
statistics start at those of the first batch. Ours start at mean 0 and variance 1, which matters in
runs of a few hundred steps: after 100 steps the initial values still have a weight of 0.95^100 =
0.006, or 0.99^100 = 0.37.
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
    """SimpNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. H and W are at least 4. Raises
    `UserError` if the images are too small or have other channels than `input_size`, and if the
    number of rates is not the number of groups.
    """

    # architecture
    widths: Sequence[Counts]  # of the convolutions, in one group for each pooling
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"  # or "group", for widths divisible by 16, or "none"
    # head
    num_classes: Classes | None = 10
    # regularization
    # After convolutions that no pooling follows: one rate, or one for each group of `widths`.
    dropout: Rate | Sequence[Rate] = 0.0
    # Of the pooling after each group; the last pools the whole map.
    saf_rate: Rate | Sequence[Rate] = 0.0
    saf: str = "random"  # layers.SAFPool.choose
    # numerics
    momentum: Rate = 0.95  # of the running statistics
    kernel_init: str | Callable = "he"
    # Numbers of the convolutions that `kernel_init="paper"` draws from N(0, 0.01^2).
    gaussian: Sequence[Count] = (3, 4, 5)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        # Every pooling except the last halves H and W.
        layers.check_images(images, self.input_size, 2 ** (len(self.widths) - 1))
        dropout, saf_rate = self._rates("dropout"), self._rates("saf_rate")
        x, number = images, 0
        for i, group in enumerate(self.widths):  # H, H/2, H/4
            for place, width in enumerate(group, 1):
                number += 1
                paper = layers.gaussian(0.01) if number in self.gaussian else layers.caffe_xavier
                conv, norm = layers.building_blocks(self, train, paper=paper, use_bias=True)
                x = layers.ConvUnit(width, (3, 3), conv, norm, name=f"conv{number}")(x)
                if place < len(group):  # after the last, the pooling drops instead
                    drop = nn.Dropout(dropout[i], name=f"dropout{number}")
                    x = drop(x, deterministic=not train)
            window = 2 if i + 1 < len(self.widths) else None
            x = layers.SAFPool(saf_rate[i], window, self.saf, name=f"pool{i + 1}")(x, train)
        return layers.classify(self, x, paper=layers.caffe_xavier)  # x: [N C]

    def _rates(self, field: str) -> Sequence[float]:
        """Returns the rates in `field`, one for each group of `widths`."""
        rates, groups = getattr(self, field), len(self.widths)
        if isinstance(rates, int | float):
            return (rates,) * groups
        if len(rates) != groups:
            raise UserError(
                f"{field} must be one rate, or {groups}: one for each pooling; got {len(rates)}"
            )
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
