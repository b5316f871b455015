"""The network of airbench94, which learns CIFAR-10 to 94 % within seconds on one GPU.

The first layer, `whiten`, is a 2x2 convolution without padding. With `config.model.whiten`, a run
fills its kernel with whitening filters of the training images' patches
(`layers.make_whitening_kernel`); its config freezes the kernel and trains the bias. Three stages
follow, each of a 3x3 convolution, 2x2 max pooling, and another 3x3 convolution. BatchNorm without
scale, and GELU, come after the pooling and after the second convolution. The last map is reduced
to its maximum, and the logits are divided by 9. 1,971,640 parameters at 32x32x3.

`kernel_init="paper"` is the authors': identity filters (`layers.dirac`), and PyTorch's default,
uniform with variance 1 / (3 fan_in), for the other filters, the head and `whiten`.

Where we differ: the authors pool the last map, 3x3, with a window of 3x3. We take the maximum over
a map of any size, which is the same for images of 28 to 32 pixels. The authors compute in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Counts, ImageSize, Positive
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    authors="Jordan",
    year=2024,
    url="https://arxiv.org/abs/2404.00498",
)

MIN_IMAGE_SIZE = 9  # whiten and three poolings turn 9 pixels into 1
WHITEN_SIZE = 2  # height and width of the patches

UNIFORM = variance_scaling(1 / 3, "fan_in", "uniform")


class Block(nn.Module):
    """Convolution, pooling, convolution: [N H W C] -> [N H//2 W//2 width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (3, 3), padding=1, name="conv1")(x)
        x = layers.max_pool(x, 2, 2)
        x = gelu(self.norm(name="norm1")(x))
        x = self.conv(self.width, (3, 3), padding=1, name="conv2")(x)
        return gelu(self.norm(name="norm2")(x))


def gelu(x: Array) -> Array:
    """GELU by the error function, PyTorch's default."""
    return nn.gelu(x, approximate=False)


class Airbench(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; features f32 [N widths[-1]] if
    `num_classes` is None.

    H and W are at least 9. Raises `UserError` if the images are smaller or have other channels than
    `input_size`.
    """

    # architecture
    widths: Counts = (64, 256, 256)  # of the stages
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    momentum: float = 0.6
    epsilon: float = 1e-12
    scale: bool = False  # of the norms
    # head
    num_classes: Classes | None = 10
    logit_scale: Positive = 1 / 9
    # numerics
    kernel_init: str | Callable = "paper"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        conv, norm = layers.building_blocks(self, train, paper=layers.dirac(UNIFORM))
        first = layers.get_initializer(self.kernel_init, paper=UNIFORM)
        window = (WHITEN_SIZE, WHITEN_SIZE)
        width = 2 * WHITEN_SIZE**2 * images.shape[-1]  # each filter and its negative
        whiten = conv(width, window, padding=0, use_bias=True, kernel_init=first, name="whiten")
        x = gelu(whiten(images.astype(self.dtype)))
        for i, stage in enumerate(self.widths, 1):  # 32x32 images: H = 15, 7, 3
            x = Block(stage, conv, norm, name=f"stage{i}")(x)
        x = jnp.max(x, axis=(1, 2)).astype(jnp.float32)  # [N widths[-1]]
        if self.num_classes is None:
            return x
        head = layers.make_head(self, UNIFORM)
        return self.logit_scale * head(self.num_classes, use_bias=False, name="head")(x)


VARIANTS = {"airbench94": partial(Airbench)}
