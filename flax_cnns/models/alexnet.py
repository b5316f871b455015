"""AlexNet: the two-GPU network of 2012, its single-tower form, and torchvision's layout of 2014.

The paper's images of 224 pixels give 55x55 maps only with three pixels of padding in total. Like
the authors' own code, we take 227 pixels instead. The grouped convolutions give the result of two
GPUs that exchange maps only before conv3, fc6, fc7 and the head. Section 3.3 sums over neighbors
among *all* maps of a layer, so we normalize across the border between the two halves, as Caffe
does. Two GPUs that exchange nothing there could not do this, and the four maps at the border would
differ.

`alexnet_single_tower` is the network of the lecture deck "Convolutional Neural Networks". It has no
groups, which costs 1.4 million parameters and 57 % more multiplications. It normalizes after the
pooling instead of before, as Caffe's CaffeNet does.

`alexnet` is torchvision's. It follows the single-tower network of "One weird trick for
parallelizing convolutional neural networks" (Krizhevsky 2014, https://arxiv.org/abs/1404.5997):
fewer maps and no response normalization. Its dropout acts on the inputs of fc6 and fc7; in 2012 it
acts on their outputs.
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

MIN_IMAGE_SIZE = 67  # leaves one pixel after the third pooling
MIN_IMAGE_SIZE_PADDED = 63  # the same if conv1 pads


class ResponseNorm(nn.Module):
    """Local response normalization over five maps (section 3.3): [N H W C] -> [N H W C]."""

    def __call__(self, x: Array) -> Array:
        return layers.local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0)


def make_layers(network: nn.Module, bias: float) -> tuple[ModuleDef, ModuleDef, Callable, Callable]:
    """Makes a network's layers: (convolution, dense layer, head, initializer of biases).

    Must be called inside `network`. The initializer gives `bias` if `kernel_init` is "paper",
    otherwise 0. The hidden dense layers use this initializer; a convolution starts with biases of 0
    unless it gets the initializer as `bias_init`. The head is the identity if `network.num_classes`
    is None.
    """
    paper = layers.gaussian(0.01)
    kernel_init = layers.get_initializer(network.kernel_init, paper=paper)
    bias_init = nn.initializers.constant(bias if network.kernel_init == "paper" else 0.0)
    shared = dict(dtype=network.dtype, param_dtype=network.param_dtype, kernel_init=kernel_init)
    dense = partial(nn.Dense, bias_init=bias_init, **shared)
    head = partial(layers.classify, network, paper=paper)
    return partial(layers.Conv, **shared), dense, head, bias_init


class AlexNet(nn.Module):
    """AlexNet of 2012: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns fc7's output f32 [N hidden] if `num_classes` is None. H and W are at least 67. If the
    last maps are not 6x6, fc6 takes their adaptive 6x6 means, an addition of ours.
    `kernel_init="paper"` is section 5: kernels N(0, 0.01^2), and biases of 1 in conv2, conv4,
    conv5, fc6 and fc7. Raises `UserError` if the images are too small or have other channels than
    `input_size`.
    """

    # architecture
    groups: Count = 2  # GPUs; each has its part of the maps of conv2, conv4, conv5
    pool_first: bool = False  # pool before normalizing, not after
    input_size: ImageSize = (227, 227, 3)
    # head
    num_classes: Classes | None = 1000
    hidden: Count = 4096  # units of fc6 and fc7
    # regularization
    dropout: Rate = 0.5
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # unused: there is no BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        conv, dense, head, bias_init = make_layers(self, bias=1)
        unit = partial(layers.ConvUnit, conv=conv)
        grouped_conv = partial(conv, feature_group_count=self.groups, bias_init=bias_init)
        grouped = partial(unit, conv=grouped_conv)
        max_pool = partial(layers.MaxPool, 3, 2)  # section 3.4: windows overlap
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)

        def norm_and_pool(x: Array, i: int) -> Array:
            norm, pool = ResponseNorm(name=f"norm{i}"), max_pool(name=f"pool{i}")
            return norm(pool(x)) if self.pool_first else pool(norm(x))

        # Comments show the shapes for 227x227 images.
        x = unit(96, (11, 11), stride=4, padding=0, name="conv1")(images)  # [N 55 55 96]
        x = norm_and_pool(x, 1)  # [N 27 27 96]
        x = grouped(256, (5, 5), name="conv2")(x)  # [N 27 27 256]
        x = norm_and_pool(x, 2)  # [N 13 13 256]
        x = unit(384, (3, 3), name="conv3")(x)  # [N 13 13 384]
        x = grouped(384, (3, 3), name="conv4")(x)  # [N 13 13 384]
        x = grouped(256, (3, 3), name="conv5")(x)  # [N 13 13 256]
        x = max_pool(name="pool5")(x)  # [N 6 6 256]
        x = lax.collapse(layers.adaptive_avg_pool(x, 6), 1)  # [N 9216]
        x = drop(name="dropout6")(nn.relu(dense(self.hidden, name="fc6")(x)))
        x = drop(name="dropout7")(nn.relu(dense(self.hidden, name="fc7")(x)))
        return head(x)


class OneWeirdTrick(nn.Module):
    """AlexNet of 2014, torchvision's: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns fc7's output f32 [N hidden] if `num_classes` is None. H and W are at least 63; fc6 takes
    adaptive 6x6 means of the last maps, as in torchvision. `kernel_init="paper"` gives the initial
    values of 2012, because the paper of 2014 gives none. Raises `UserError` if the images are too
    small or have other channels than `input_size`.
    """

    # architecture
    input_size: ImageSize = (224, 224, 3)
    # head
    num_classes: Classes | None = 1000
    hidden: Count = 4096  # units of fc6 and fc7
    # regularization
    dropout: Rate = 0.5
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # unused: there is no BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE_PADDED)
        conv, dense, head, bias_init = make_layers(self, bias=1)
        unit = partial(layers.ConvUnit, conv=conv)
        biased = partial(unit, conv=partial(conv, bias_init=bias_init))
        pool = partial(layers.MaxPool, 3, 2)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        # Comments show the shapes for 224x224 images.
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
