"""First values of the kernels, by the name of the paper that proposed them.

Networks call the field `kernel_init`: `init` is a method of every linen module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Dtype

# He et al. 2015, https://arxiv.org/abs/1502.01852, equation 14: N(0, 2 / fan_out), not truncated,
# with fan_out = k * k * output channels. The paper allows either fan; its authors' ResNet code and
# torchvision take this one.
he = variance_scaling(2.0, "fan_out", "normal")

# LeCun et al. 1998, "Efficient BackProp", equation 16: standard deviation 1 / sqrt(fan_in).
lecun = variance_scaling(1.0, "fan_in", "normal")

# Glorot & Bengio 2010, equation 16: uniform with variance 2 / (fan_in + fan_out). Keras's default.
xavier = variance_scaling(1.0, "fan_avg", "uniform")

# Caffe's filler of that name: uniform with variance 1 / fan_in. What many released files ask for.
caffe_xavier = variance_scaling(1.0, "fan_in", "uniform")


def tensorflow_fan_out(distribution: str) -> Callable:
    """Variance 2 / fan_out, and 2 / k^2 for a depthwise kernel [k k 1 C], whose fan-out TensorFlow
    counts so: the released EfficientNet's ("normal") and slim's ("truncated_normal").

    The first kernel for images of one channel looks like a depthwise one: give it `he`.
    """
    window = variance_scaling(2.0, "fan_in", distribution)
    fan_out = variance_scaling(2.0, "fan_out", distribution)

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        return (window if shape[-2] == 1 else fan_out)(key, shape, dtype)

    return init


# `gaussian(0.01)`: N(0, 0.01^2), what most papers before Xavier and He used.
gaussian = jax.nn.initializers.normal

# Saxe et al. 2013, https://arxiv.org/abs/1312.6120: a kernel as the matrix [k * k * input channels,
# output channels] has orthonormal columns, or rows where it is wider than high.
orthogonal = jax.nn.initializers.orthogonal()

INITIALIZERS = {
    "he": he,
    "lecun": lecun,
    "xavier": xavier,
    "gaussian": gaussian(0.01),
    "orthogonal": orthogonal,
}


def get_initializer(init: str | Callable, paper: Callable | None = None) -> Callable:
    """`"he"` -> the function (key, shape, dtype) -> kernel; a function stays what it is.

    `paper` is what `"paper"` means for a network. Raises `UserError` for an unknown name.
    """
    if callable(init):
        return init
    known = INITIALIZERS if paper is None else INITIALIZERS | {"paper": paper}
    if init not in known:
        raise UserError(f"unknown kernel_init {init!r}{did_you_mean(init, known)}")
    return known[init]


def get_head_initializer(init: str | Callable, paper: Callable) -> Callable:
    """Of the layer that gives the classes: `paper` where `init` is "paper", else "lecun".

    He's variance, 2 / fan_out, would start few classes with logits far from zero.
    """
    return paper if init == "paper" else lecun
