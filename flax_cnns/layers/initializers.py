"""Initializers of kernels, named after the papers that proposed them.

The field of networks is called `kernel_init` because every linen module has a method `init`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import variance_scaling

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Dtype

# He et al. 2015, https://arxiv.org/abs/1502.01852, equation 14: N(0, 2 / fan_out), not truncated,
# with fan_out = k * k * output channels. The paper allows fan_in too; its authors' ResNet code and
# torchvision use fan_out.
he = variance_scaling(2.0, "fan_out", "normal")

# LeCun et al. 1998, "Efficient BackProp", equation 16: standard deviation 1 / sqrt(fan_in).
lecun = variance_scaling(1.0, "fan_in", "normal")

# Glorot & Bengio 2010, equation 16: uniform with variance 2 / (fan_in + fan_out). Keras's default.
xavier = variance_scaling(1.0, "fan_avg", "uniform")

# Caffe's filler "xavier": uniform with variance 1 / fan_in. Many released Caffe networks use it.
caffe_xavier = variance_scaling(1.0, "fan_in", "uniform")


def tensorflow_fan_out(distribution: Literal["normal", "truncated_normal"]) -> Callable:
    """Returns an initializer with variance 2 / fan_out, where fan_out is counted as in TensorFlow.

    For a depthwise kernel [k k 1 C], this fan_out is k^2. The released EfficientNet uses "normal",
    slim uses "truncated_normal". The first kernel of a network for images of one channel also has
    the shape [k k 1 C], but is not depthwise: initialize it with `he`.
    """
    depthwise = variance_scaling(2.0, "fan_in", distribution)
    dense = variance_scaling(2.0, "fan_out", distribution)

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        return (depthwise if shape[-2] == 1 else dense)(key, shape, dtype)

    return init


# `gaussian(0.01)` is N(0, 0.01^2), as in most papers before Xavier and He.
gaussian = jax.nn.initializers.normal

# Saxe et al. 2013, https://arxiv.org/abs/1312.6120: the kernel, reshaped to the matrix [k * k *
# input channels, output channels], has orthonormal columns, or orthonormal rows if it is wider than
# high.
orthogonal = jax.nn.initializers.orthogonal()


def dirac(rest: Callable) -> Callable:
    """Returns an initializer of convolutions with identity filters, as PyTorch's `dirac_`.

    The first min(C, F) filters of a kernel [k k C F] copy one input channel each: 1 at the center,
    0 elsewhere. `rest` initializes the other filters.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        kernel = rest(key, shape, dtype)
        channels = jnp.arange(min(shape[-2:]))
        kernel = kernel.at[..., : len(channels)].set(0)
        center = tuple(size // 2 for size in shape[:-2])
        return kernel.at[(*center, channels, channels)].set(1)

    return init


def make_whitening_kernel(images: np.ndarray, size: int = 2, epsilon: float = 5e-4) -> np.ndarray:
    """Makes a kernel f32 [size size C 2*size*size*C] that whitens the patches of images [N H W C].

    The filters are the eigenvectors of the patches' second moments (the mean is not subtracted),
    largest eigenvalue first, divided by sqrt(eigenvalue + epsilon); then the same with the other
    sign. The signs are such that the largest weight of each of the first filters is positive.
    Jordan 2024 (https://arxiv.org/abs/2404.00498), section 3.1, and his airbench94.py.
    """
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    patches = np.moveaxis(windows, 3, -1)  # [N h w k k C]
    flat = patches.reshape(-1, size * size * images.shape[-1]).astype(np.float64)
    values, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
    filters = (vectors / np.sqrt(values + epsilon))[:, ::-1]  # columns
    largest = np.take_along_axis(filters, abs(filters).argmax(0)[None], axis=0)
    filters = filters * np.sign(largest)
    kernel = np.concatenate([filters, -filters], axis=1)
    return kernel.reshape(size, size, images.shape[-1], -1).astype(np.float32)


INITIALIZERS = {
    "he": he,
    "lecun": lecun,
    "xavier": xavier,
    "gaussian": gaussian(0.01),
    "orthogonal": orthogonal,
}


def get_initializer(init: str | Callable, paper: Callable | None = None) -> Callable:
    """Returns the initializer (key, shape, dtype) -> kernel with a name such as "he".

    A function is returned as it is. `paper` is the initializer that the name "paper" stands for.
    Raises `UserError` for an unknown name.
    """
    if callable(init):
        return init
    known = INITIALIZERS if paper is None else INITIALIZERS | {"paper": paper}
    if init not in known:
        raise UserError(f"unknown kernel_init {init!r}{did_you_mean(init, known)}")
    return known[init]


def get_head_initializer(init: str | Callable, paper: Callable) -> Callable:
    """Returns the classifier's initializer: `paper` if `init` is "paper", else LeCun's.

    With few classes, He's variance, 2 / fan_out, would put the initial logits far from zero.
    """
    return paper if init == "paper" else lecun
