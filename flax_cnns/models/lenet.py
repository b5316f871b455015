"""LeNet-5, the network of section II-B, with the layer names that the section uses.

`lenet5` differs from the network of 1998 in the four usual ways: C3 sees all six maps of S2 (the
paper's table I connects them sparsely); pooling is a plain mean without a trainable coefficient and
bias; tanh is not scaled to 1.7159 tanh(2x/3); and the output is linear with softmax loss instead of
RBF units. This gives 61,706 parameters.

`lenet5_original` follows the paper in all four, and has 60,000 parameters. The bitmaps with which
its output is compared are redrawn from figure 3, whose print does not show every pixel. The paper's
images are -0.1 where white and 1.175 where black.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import layers
from flax_cnns.models.fields import Classes, ImageSize
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Gradient-Based Learning Applied to Document Recognition",
    authors="LeCun, Bottou, Bengio, Haffner",
    year=1998,
    url="http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf",
)

MIN_IMAGE_SIZE = 32  # C5's 5x5 kernel needs 5x5 maps of S4


def paper_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Appendix A: uniform from -2.4 / F to 2.4 / F, where F is a unit's number of inputs."""
    limit = 2.4 / math.prod(shape[:-1])
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def paper_coefficient_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Appendix A for a coefficient that four inputs share: F is 4."""
    return jax.random.uniform(key, shape, dtype, -2.4 / 4, 2.4 / 4)


class LeNet(nn.Module):
    """LeNet-5 in today's usual form: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns features f32 [N 84] if `num_classes` is None. H and W are at least 32; larger images
    give C5 maps larger than 1x1, which are averaged. The modules c1, c3, c5 and f6 return values
    before tanh; s2 and s4 return values after it. The network has neither norms nor dropout, so
    `train` and `axis_name` have no effect. Raises `UserError` if the images are too small or have
    other channels than `input_size`.
    """

    # architecture
    input_size: ImageSize = (32, 32, 1)
    # head
    num_classes: Classes | None = 10
    # numerics
    kernel_init: str | Callable = "lecun"  # tanh keeps the scale at 1 / sqrt(fan_in)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        kernel_init = layers.get_initializer(self.kernel_init, paper=paper_init)
        shared = dict(param_dtype=self.param_dtype, kernel_init=kernel_init)
        conv: ModuleDef = partial(
            layers.Conv, kernel_size=(5, 5), padding="VALID", dtype=self.dtype, **shared
        )
        # Comments show the shapes for 32x32 images.
        x = jnp.tanh(conv(6, name="c1")(images))  # [N 28 28 6]
        x = layers.AvgPool(2, 2, name="s2")(x)  # [N 14 14 6]
        x = jnp.tanh(conv(16, name="c3")(x))  # [N 10 10 16]
        x = layers.AvgPool(2, 2, name="s4")(x)  # [N 5 5 16]
        x = jnp.tanh(conv(120, name="c5")(x))  # [N 1 1 120]
        x = jnp.mean(x, axis=(1, 2))  # [N 120]
        x = jnp.tanh(nn.Dense(84, dtype=self.dtype, name="f6", **shared)(x))  # [N 84]
        return layers.classify(self, x, head=partial(nn.Dense, dtype=jnp.float32, **shared))


# Table I: the maps of S2, numbered from 0, that each map of C3 sees; grouped by their number.
TABLE_I = {
    "three": ((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    "four": (
        *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
        *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    ),
    "six": ((0, 1, 2, 3, 4, 5),),
}

# The ten digits side by side, each of 7x12 pixels.
DIGITS = """
..###.. ...##.. .#####. ####### ....##. ####### ..####. ####### .#####. .#####.
.##.##. ..###.. ##...## .....## ...###. ##..... .##.... .....## ##...## ##...##
##...## .####.. #....## ....##. ..####. ##..... ##..... .....## ##...## ##...##
##...## ...##.. ....##. ...##.. .##.##. ##..... ##..... ....##. ##...## ##...##
##...## ...##.. ...##.. ..####. ##..##. ######. ######. ....##. .#####. .######
##...## ...##.. ..##... .....## ##..##. .....## ##...## ...##.. ##...## .....##
##...## ...##.. .##.... .....## ####### .....## ##...## ...##.. ##...## .....##
##...## ...##.. ##..... .....## ....##. .....## ##...## ..##... ##...## .....##
.##.##. ...##.. ##..... ##...## ....##. ##...## ##...## ..##... ##...## ....##.
..###.. .###### ####### .#####. ....##. .#####. .#####. ..##... .#####. .####..
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
"""


def make_rbf_codes(num_classes: int) -> np.ndarray:
    """Returns each class's code, f32 [num_classes 84]: +1 (ink) or -1, row by row of its bitmap.

    Classes beyond the ten digits have random codes, which are always the same. The paper names
    random codes as another choice (it has bitmaps of all ASCII).
    """
    lines = [line.split() for line in DIGITS.split("\n") if line]
    digits = np.array([[list(row) for row in column] for column in zip(*lines)]) == "#"
    more = np.random.RandomState(1998).randint(2, size=(max(num_classes - 10, 0), 84))
    ink = np.concatenate([digits.reshape(10, 84), more])[:num_classes]
    return np.where(ink, 1, -1).astype(np.float32)


def squash(x: Array) -> Array:
    """Appendix A: 1.7159 tanh(2x/3), the sigmoid that is 1 at 1 and -1 at -1."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


class Squashed(nn.Module):
    """A layer of weighted sums, then `squash`."""

    sums: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return squash(self.sums(name="sums")(x))


class Subsampling(nn.Module):
    """Sum of each 2x2, times a coefficient, plus a bias, squashed: [N H W C] -> [N H/2 W/2 C].

    Each map has its own coefficient and bias.
    """

    coefficient_init: Callable
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        per_map = (x.shape[-1:], self.param_dtype)
        coefficient = self.param("coefficient", self.coefficient_init, *per_map)
        bias = self.param("bias", nn.initializers.zeros, *per_map)
        x, coefficient, bias = nn.dtypes.promote_dtype(x, coefficient, bias, dtype=self.dtype)
        return squash(4 * layers.avg_pool(x, 2, 2) * coefficient + bias)


class SparseC3(nn.Module):
    """C3 with the connections of table I, squashed: [N H W 6] -> [N H-4 W-4 16].

    One grouped convolution computes all maps of C3 that see equally many maps of S2, on a copy of
    the maps that each sees.
    """

    conv: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sums = [
            self.conv(len(maps), feature_group_count=len(maps), name=name)(x[..., np.ravel(maps)])
            for name, maps in TABLE_I.items()
        ]
        return squash(jnp.concatenate(sums, axis=-1))


class RBF(nn.Module):
    """Minus the squared distance to each class's fixed code: [N 84] -> [N num_classes]."""

    num_classes: int

    def __call__(self, x: Array) -> Array:
        return -jnp.sum(jnp.square(x[:, None] - make_rbf_codes(self.num_classes)), axis=-1)


class OriginalLeNet(nn.Module):
    """LeNet-5 of 1998: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns features f32 [N 84] if `num_classes` is None. Logits are minus the squared distances of
    F6 to the codes of `make_rbf_codes`, so that softmax cross entropy is the paper's equation 9
    without its constant j, the "rubbish" class. The first ten classes are the digits; any others
    have random codes. `kernel_init="paper"` is appendix A, also for the coefficients of S2 and S4,
    which have four inputs; otherwise the coefficients start at 1/4, as in a mean. Appendix A does
    not mention biases, which start at 0. Image sizes and errors are as in `LeNet`.
    """

    # architecture
    input_size: ImageSize = (32, 32, 1)
    # head
    num_classes: Classes | None = 10
    # numerics
    kernel_init: str | Callable = "lecun"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        kernel_init = layers.get_initializer(self.kernel_init, paper=paper_init)
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        shared = dict(kernel_init=kernel_init, **dtypes)
        conv = partial(layers.Conv, kernel_size=(5, 5), padding="VALID", **shared)
        mean_init = nn.initializers.constant(1 / 4)
        coefficient_init = paper_coefficient_init if self.kernel_init == "paper" else mean_init
        subsampling = partial(Subsampling, coefficient_init, **dtypes)
        # Comments show the shapes for 32x32 images.
        x = Squashed(partial(conv, 6), name="c1")(images)  # [N 28 28 6]
        x = subsampling(name="s2")(x)  # [N 14 14 6]
        x = SparseC3(conv, name="c3")(x)  # [N 10 10 16]
        x = subsampling(name="s4")(x)  # [N 5 5 16]
        x = Squashed(partial(conv, 120), name="c5")(x)  # [N 1 1 120]
        x = jnp.mean(x, axis=(1, 2))  # [N 120]
        x = Squashed(partial(nn.Dense, 84, **shared), name="f6")(x)  # [N 84]
        return layers.classify(self, x, head=RBF)


VARIANTS = {"lenet5": partial(LeNet), "lenet5_original": partial(OriginalLeNet)}
