"""AlexNet: of 2012 for two GPUs, as one tower, and the layout of 2014 that torchvision has.

The paper's images of 224 give maps of 55 only if padded by three pixels in all; as the authors' own
code, we take 227. The grouped convolutions are what two GPUs compute that exchange maps only in
front of conv3, fc6, fc7 and the head. Section 3.3 sums over neighbors among *all* maps of a
layer, so we normalize over the border between the two halves, as Caffe does; two GPUs that do not
speak there could not, and the four maps at the border would differ.

`alexnet_single_tower` is the network of the lectures: no groups, which costs 1.4 million parameters
and 57 % more multiplications, and normalization behind the pooling in place of before it (Caffe's
CaffeNet has that order too).

`alexnet` is torchvision's, after the network of one tower in "One weird trick for parallelizing
convolutional neural networks" (Krizhevsky 2014, https://arxiv.org/abs/1404.5997): fewer maps, no
response normalization, and dropout on what fc6 and fc7 take in; in 2012 it is on what they give.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="ImageNet Classification with Deep Convolutional Neural Networks",
    authors="Krizhevsky, Sutskever, Hinton",
    year=2012,
    url="https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks",
)

MIN_IMAGE_SIZE = 67  # what leaves one pixel behind the third pooling
MIN_IMAGE_SIZE_PADDED = 63  # the same where conv1 pads


class ResponseNorm(nn.Module):
    """Section 3.3, over five neighboring maps: [N H W C] -> [N H W C]."""

    def __call__(self, x: Array) -> Array:
        return layers.local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0)


def make_layers(net: nn.Module, bias: float) -> tuple[ModuleDef, ModuleDef, Callable, Callable]:
    """Called inside `net`: its convolution, its fully connected layer, its head (which is the
    identity without classes), and the initializer of those biases that in the paper start from
    `bias`, hidden fully connected layers' among them."""
    paper = layers.gaussian(0.01)
    kernel_init = layers.get_initializer(net.kernel_init, paper=paper)
    bias_init = nn.initializers.constant(bias if net.kernel_init == "paper" else 0.0)
    given = dict(dtype=net.dtype, param_dtype=net.param_dtype, kernel_init=kernel_init)
    dense = partial(nn.Dense, bias_init=bias_init, **given)
    head = partial(layers.classify, net, paper=paper)
    return partial(layers.Conv, **given), dense, head, bias_init


class AlexNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; fc7's f32 [N hidden] if it is None.

    H and W are at least 67; where the last maps are not 6x6, fc6 takes means of them that are
    (adaptive pooling, an addition of ours). `kernel_init="paper"` is section 5: N(0, 0.01^2), and
    biases of 1 in conv2, conv4, conv5, fc6 and fc7. Raises `UserError` where images are too small
    or have other channels than `input_size`.
    """

    # architecture
    groups: Count = 2  # GPUs, of which each has its part of the maps of conv2, conv4 and conv5
    pool_first: bool = False  # pooling before normalization
    input_size: ImageSize = (227, 227, 3)
    # head
    num_classes: Classes | None = 1000
    hidden: Count = 4096  # units of fc6 and of fc7
    # regularization
    dropout: Rate = 0.5
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # there is nothing to synchronise

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        conv, dense, head, ones = make_layers(self, bias=1)
        unit = partial(layers.ConvUnit, conv=conv)
        split = partial(unit, conv=partial(conv, feature_group_count=self.groups, bias_init=ones))
        pool = partial(layers.MaxPool, 3, 2)  # section 3.4: windows overlap
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)

        def shrink(x: Array, i: int) -> Array:
            norm, down = ResponseNorm(name=f"norm{i}"), pool(name=f"pool{i}")
            return norm(down(x)) if self.pool_first else down(norm(x))

        # In comments the shapes for 227x227.
        x = unit(96, (11, 11), stride=4, padding=0, name="conv1")(images)  # [N 55 55 96]
        x = shrink(x, 1)  # [N 27 27 96]
        x = split(256, (5, 5), name="conv2")(x)  # [N 27 27 256]
        x = shrink(x, 2)  # [N 13 13 256]
        x = unit(384, (3, 3), name="conv3")(x)  # [N 13 13 384]
        x = split(384, (3, 3), name="conv4")(x)  # [N 13 13 384]
        x = split(256, (3, 3), name="conv5")(x)  # [N 13 13 256]
        x = pool(name="pool5")(x)  # [N 6 6 256]
        x = lax.collapse(layers.adaptive_avg_pool(x, 6), 1)  # [N 9216]
        x = drop(name="dropout6")(nn.relu(dense(self.hidden, name="fc6")(x)))
        x = drop(name="dropout7")(nn.relu(dense(self.hidden, name="fc7")(x)))
        return head(x)


class OneWeirdTrick(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; fc7's f32 [N hidden] if it is None.

    H and W are at least 63; fc6 takes means of 6x6 of whatever the last maps are, as torchvision.
    `kernel_init="paper"` is that of 2012: the paper of 2014 does not say. Raises `UserError` where
    images are too small or have other channels than `input_size`.
    """

    # architecture
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
    axis_name: str | None = None  # there is nothing to synchronise

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE_PADDED)
        conv, dense, head, ones = make_layers(self, bias=1)
        unit = partial(layers.ConvUnit, conv=conv)
        biased = partial(unit, conv=partial(conv, bias_init=ones))
        pool = partial(layers.MaxPool, 3, 2)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        # In comments the shapes for 224x224.
        x = unit(64, (11, 11), stride=4, padding=2, name="conv1")(images)  # [N 55 55 64]
        x = pool(name="pool1")(x)  # [N 27 27 64]
        x = biased(192, (5, 5), name="conv2")(x)  # [N 27 27 192]
        x = pool(name="pool2")(x)  # [N 13 13 192]
        x = unit(384, (3, 3), name="conv3")(x)  # [N 13 13 384]
        x = biased(256, (3, 3), name="conv4")(x)  # [N 13 13 256]
        x = biased(256, (3, 3), name="conv5")(x)  # [N 13 13 256]
        x = pool(name="pool5")(x)  # [N 6 6 256]
        x = lax.collapse(layers.adaptive_avg_pool(x, 6), 1)  # [N 9216]
        x = nn.relu(dense(self.hidden, name="fc6")(drop(name="dropout6")(x)))
        x = nn.relu(dense(self.hidden, name="fc7")(drop(name="dropout7")(x)))
        return head(x)


VARIANTS = {
    "alexnet_2gpu": partial(AlexNet),
    "alexnet_single_tower": partial(AlexNet, groups=1, pool_first=True),
    "alexnet": partial(OneWeirdTrick),
}

SOURCES = {"alexnet": ("torchvision",)}
