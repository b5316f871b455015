"""LeNet-5, the network of section II-B, with its layers' names from there.

We differ from 1998 as everyone since does: C3 sees all six maps of S2 (the paper's table I connects
them sparsely), pooling is a plain mean without a trainable coefficient and bias, tanh is not scaled
to 1.7159 tanh(2x/3), and the output is linear with softmax loss in place of RBF units. That makes
61,706 parameters, where the paper's connections have 60,000.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="Gradient-Based Learning Applied to Document Recognition",
    authors="LeCun, Bottou, Bengio, Haffner",
    year=1998,
    url="http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf",
)

SMALLEST = 32  # C5's 5x5 window needs 5x5 maps of S4


class LeNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; features f32 [N 84] if it is None.

    H and W are at least 32; larger images give C5 maps of more than 1x1, of which the mean is
    taken. It normalises nothing and has no dropout: `train` and `axis_name` change nothing. Raises
    `UserError` where the images are too small or have other channels than `input_size`.
    """

    num_classes: int | None = 10
    input_size: tuple[int, int, int] = (32, 32, 1)
    kernel_init: str | Callable = "lecun"  # tanh keeps the scale at 1 / sqrt(fan_in)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, SMALLEST)
        given = dict(param_dtype=self.param_dtype, kernel_init=layers.initializer(self.kernel_init))
        conv = partial(layers.Conv, kernel_size=(5, 5), padding="VALID", dtype=self.dtype, **given)
        # In comments the shapes for 32x32.
        x = jnp.tanh(conv(6, name="c1")(images))  # [N 28 28 6]
        x = layers.avg_pool(x, 2, 2)  # S2: [N 14 14 6]
        x = jnp.tanh(conv(16, name="c3")(x))  # [N 10 10 16]
        x = layers.avg_pool(x, 2, 2)  # S4: [N 5 5 16]
        x = jnp.tanh(conv(120, name="c5")(x))  # [N 1 1 120]
        x = jnp.mean(x, axis=(1, 2))  # [N 120]
        x = jnp.tanh(nn.Dense(84, dtype=self.dtype, name="f6", **given)(x))  # [N 84]
        x = x.astype(jnp.float32)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head", **given)(x)


VARIANTS = {"lenet5": partial(LeNet)}
