"""ZFNet (figure 3): AlexNet with a first layer of 7x7/2 instead of 11x11/4, and without groups.

The figure's sizes (224, 110, 55, 26, 13, 6) require a padding of 1 in conv1, 0 in conv2 and 1 in
the 3x3 convolutions, and pooling with a last window that may extend beyond the edge (110 -> 55,
26 -> 13).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from flax_cnns import layers
from flax_cnns.models.alexnet import ResponseNorm, make_layers
from flax_cnns.models.fields import Classes, Count, ImageSize, Rate
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="Visualizing and Understanding Convolutional Networks",
    authors="Zeiler, Fergus",
    year=2013,
    url="https://arxiv.org/abs/1311.2901",
)

MIN_IMAGE_SIZE = 47  # leaves one pixel after the third pooling


class ZFNet(nn.Module):
    """ZFNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns fc7's output, f32 [N hidden], if `num_classes` is None. The maps are "contrast
    normalized across feature maps" after the first two poolings. The paper gives no constants for
    this; ours are AlexNet's. The paper's training scales down filters whose root mean square is
    above 0.1; this is not a part of the network and not done here.

    `kernel_init="paper"` is AlexNet's N(0, 0.01^2) with zero biases. Section 3 says that all
    weights start from 10^-2 and biases from 0. We do not take this literally: with equal weights
    the units of a layer would stay equal forever.

    H and W are at least 47. If the last maps are not 6x6, adaptive average pooling makes them 6x6
    for fc6, which is our addition. Raises `UserError` if the images are too small or have
    other channels than `input_size`.
    """

    # architecture
    widths: tuple[Count, Count, Count] = (384, 384, 256)  # of conv3, conv4 and conv5
    input_size: ImageSize = (224, 224, 3)
    # head
    num_classes: Classes | None = 1000
    hidden: Count = 4096  # units of fc6 and of fc7
    # regularization
    dropout: Rate = 0.5
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # changes nothing: no layer combines images

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        conv, dense, head, _ = make_layers(self, bias=0)
        unit = partial(layers.ConvUnit, conv=conv)
        pool = partial(layers.MaxPool, 3, 2, ceil=True)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        # Comments give the shapes for images of 224x224.
        x = unit(96, (7, 7), stride=2, padding=1, name="conv1")(images)  # [N 110 110 96]
        x = pool(name="pool1")(x)  # [N 55 55 96]
        x = ResponseNorm(name="norm1")(x)
        x = unit(256, (5, 5), stride=2, padding=0, name="conv2")(x)  # [N 26 26 256]
        x = pool(name="pool2")(x)  # [N 13 13 256]
        x = ResponseNorm(name="norm2")(x)
        for i, width in enumerate(self.widths, 3):
            x = unit(width, (3, 3), name=f"conv{i}")(x)  # [N 13 13 width]
        x = pool(name="pool5")(x)  # [N 6 6 C]
        x = lax.collapse(layers.adaptive_avg_pool(x, 6), 1)  # [N 36*C]
        x = drop(name="dropout6")(nn.relu(dense(self.hidden, name="fc6")(x)))
        x = drop(name="dropout7")(nn.relu(dense(self.hidden, name="fc7")(x)))
        return head(x)


VARIANTS = {
    "zfnet_fig3": partial(ZFNet),
    "zfnet_big": partial(ZFNet, widths=(512, 1024, 512)),  # table 2, second to last row
}
