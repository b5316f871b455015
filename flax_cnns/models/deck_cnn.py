"""The small CIFAR-100 classifier of the HSLU deck "Image Classification and Network Architectures".

It has three convolutions, two poolings and a dense layer. The deck builds the layers with Keras's
defaults, which `kernel_init="paper"` selects: glorot_uniform kernels and zero biases. A ReLU
follows each convolution; the softmax is part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, ImageSize
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="Image Classification and Network Architectures (lecture)",
    authors="HSLU",
    year=2020,  # of the newest network that the deck names; the deck is undated
    url="",
)

MIN_IMAGE_SIZE = 18  # conv3 needs 3x3 maps


class DeckCNN(nn.Module):
    """The deck's CNN: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns features f32 [N 512] if `num_classes` is None. H and W are at least 18; for images of
    other sizes than 32x32, the last maps are averaged to 4x4. The network has neither norms nor
    dropout, so `train` and `axis_name` have no effect. Raises `UserError` if the images are too
    small or have other channels than `input_size`.
    """

    # architecture
    input_size: ImageSize = (32, 32, 3)
    # head
    num_classes: Classes | None = 100
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        keras = layers.get_initializer("xavier")
        conv, _ = layers.building_blocks(self, train, paper=keras, use_bias=True)
        unit = partial(layers.ConvUnit, 32, (3, 3), conv, padding="VALID")
        x = unit(name="conv1")(images)  # [N 30 30 32]
        x = layers.MaxPool(2, 2, name="pool1")(x)  # [N 15 15 32]
        x = unit(name="conv2")(x)  # [N 13 13 32]
        x = layers.MaxPool(2, 2, name="pool2")(x)  # [N 6 6 32]
        x = unit(name="conv3")(x)  # [N 4 4 32]
        x = layers.adaptive_avg_pool(x, 4).astype(jnp.float32)
        x = x.reshape(x.shape[0], -1)  # [N 512]
        return layers.classify(self, x, paper=keras)


VARIANTS = {"deck003_cifar100_example": partial(DeckCNN)}
