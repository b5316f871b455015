"""Deeply-Supervised Nets: the CIFAR network that the authors released (github.com/s9xie/DSN).

It is Network in Network's CIFAR network with three changes. All pooling is max pooling, no ReLU
follows the maps of the classes, and each of the three convolutions has a companion classifier: a
dense layer on all maps of the convolution, flattened, before ReLU. Companions act in training only.
Each adds its loss with the weight alpha_m: `config.train.aux_weight` for the heads `aux1`, `aux2`
and `aux3`.

The network that classifies has 966,986 parameters, the "about 1 M" of the tables. The companions
have 2,580,510 more, most of them in `aux1` (192 maps of 32x32, ten classes), so training has
3,547,496. This number depends on the size of the images that the network is initialized with.

What the paper leaves open, and what we do:

- Which layers have companions, and what the companions see. In the release they are on the
  convolutions conv1, conv2 and conv3, and not on the 1x1 convolutions. So are ours.
- The loss. The paper has squared hinge (an SVM) and softmax, for output and companions alike. The
  release takes squared hinge for CIFAR-10, and softmax for CIFAR-100 and SVHN. Our training takes
  softmax.
- alpha_m, which decays as 0.1 (1 - t/N) with the epoch t. N may be the number of all epochs or of
  those with companions; configs/cifar10_dsn.py takes the latter. The release does not decay its
  losses. It removes the companions after 50,000 of 200,000 steps; until then the companions
  themselves learn 1000 times more slowly than the rest.
- gamma, the loss below which a companion adds nothing. It has no published value; ours is 0.

`kernel_init="paper"` is the release's: N(0, 0.05^2), and for companions uniform with variance
1 / fan_in (Caffe's "xavier"). Biases start at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Deeply-Supervised Nets",
    authors="Lee, Xie, Gallagher, Zhang, Tu",
    year=2014,
    url="https://arxiv.org/abs/1409.5185",
)

MIN_IMAGE_SIZE = 4  # the two poolings, rounding up, turn 4 pixels into 2 and 1, but 3 into 1 and 0

# For each stage: kernel size and width of its convolution, widths of its 1x1 convolutions.
STAGES = ((5, 192, (160, 96)), (5, 192, (192, 192)), (3, 192, (192,)))


class MlpConv(nn.Module):
    """ReLU, then 1x1 convolutions with ReLU: [N H W C] -> [N H W widths[-1]]."""

    widths: Sequence[int]
    conv: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(x)
        for i, width in enumerate(self.widths, 1):
            x = nn.relu(self.conv(width, (1, 1), name=f"cccp{i}")(x))
        return x


class Companion(nn.Module):
    """Dense layer on all maps: [N H W C] -> logits f32 [N num_classes], sown in training."""

    head: ModuleDef

    @nn.compact
    def __call__(self, x: Array, train: bool) -> None:
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)  # [N H W C] -> [N H*W*C]
        x = self.head(name="head")(x)
        if train:
            self.sow("aux_logits", "logits", x)


class DSN(nn.Module):
    """Deeply-Supervised Net: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N 192] if `num_classes` is None. In training, if there are classes,
    the companions sow `aux_logits` aux1/logits, aux2/logits and aux3/logits. H and W are at least
    4. Training needs images of the size that the network was initialized with; classifying works at
    any size. The network normalizes nothing, so `axis_name` has no effect. Raises `UserError` if
    the images are too small or have other channels than `input_size`.
    """

    # architecture
    input_size: ImageSize = (32, 32, 3)
    # head
    num_classes: Classes | None = 10
    # regularization
    dropout: Rate = 0.5  # after each of the two poolings
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        paper = layers.gaussian(0.05)
        conv, _ = layers.building_blocks(self, train, paper=paper, use_bias=True)
        companion = partial(layers.make_head(self, layers.caffe_xavier), self.num_classes)
        x = images
        for i, (window, width, widths) in enumerate(STAGES, 1):  # 32x32 images: H = 32, 16, 8
            x = conv(width, (window, window), padding=window // 2, name=f"conv{i}")(x)
            if self.num_classes is not None and (train or self.is_initializing()):
                Companion(companion, name=f"aux{i}")(x, train)
            x = MlpConv(widths, conv, name=f"mlpconv{i}")(x)
            if i < len(STAGES):
                x = layers.max_pool(x, 3, 2, ceil=True)
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return layers.classify_by_maps(self, x, paper=paper, activation=None)


VARIANTS = {"dsn": partial(DSN)}
