"""LeNet-5, the network of section II-B, with its layers' names from there.

`lenet5` differs from 1998 as everyone since does: C3 sees all six maps of S2 (the paper's table I
connects them sparsely), pooling is a plain mean without a trainable coefficient and bias, tanh is
not scaled to 1.7159 tanh(2x/3), and the output is linear with softmax loss in place of RBF units.
That makes 61,706 parameters.

`lenet5_original` has all four as they were, and 60,000 parameters. The bitmaps that its output is
compared with are drawn again, after figure 3: its print does not show every pixel. The paper's
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

MIN_IMAGE_SIZE = 32  # C5's 5x5 window needs 5x5 maps of S4


def paper_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Appendix A: uniform from -2.4 / F to 2.4 / F, where F is a unit's number of inputs."""
    limit = 2.4 / math.prod(shape[:-1])
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def paper_coefficient_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """The same for a coefficient that four inputs share."""
    return jax.random.uniform(key, shape, dtype, -2.4 / 4, 2.4 / 4)


class LeNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; features f32 [N 84] if it is None.

    H and W are at least 32; larger images give C5 maps of more than 1x1, of which the mean is
    taken. What c1, c3, c5 and f6 give by name is before tanh, s2 and s4 come after it. It
    normalizes nothing and has no dropout: `train` and `axis_name` change nothing. Raises
    `UserError` where the images are too small or have other channels than `input_size`.
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
        given = dict(param_dtype=self.param_dtype, kernel_init=kernel_init)
        conv = partial(layers.Conv, kernel_size=(5, 5), padding="VALID", dtype=self.dtype, **given)
        # In comments the shapes for 32x32.
        x = jnp.tanh(conv(6, name="c1")(images))  # [N 28 28 6]
        x = layers.AvgPool(2, 2, name="s2")(x)  # [N 14 14 6]
        x = jnp.tanh(conv(16, name="c3")(x))  # [N 10 10 16]
        x = layers.AvgPool(2, 2, name="s4")(x)  # [N 5 5 16]
        x = jnp.tanh(conv(120, name="c5")(x))  # [N 1 1 120]
        x = jnp.mean(x, axis=(1, 2))  # [N 120]
        x = jnp.tanh(nn.Dense(84, dtype=self.dtype, name="f6", **given)(x))  # [N 84]
        return layers.classify(self, x, head=partial(nn.Dense, dtype=jnp.float32, **given))


# Table I: the maps of S2 that each map of C3 sees, from 0, by how many they are.
TABLE_I = {
    "three": ((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    "four": (
        *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
        *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    ),
    "six": ((0, 1, 2, 3, 4, 5),),
}

# The ten digits on 7x12 pixels each, side by side.
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
    """f32 [num_classes 84] of +1 (ink) and -1, row by row of the bitmap.

    Beyond the ten digits they are drawn at random, always the same ones: what the paper names as
    another choice (it has bitmaps of all ASCII).
    """
    lines = [line.split() for line in DIGITS.split("\n") if line]
    digits = np.array([[list(row) for row in column] for column in zip(*lines)]) == "#"
    more = np.random.RandomState(1998).randint(2, size=(max(num_classes - 10, 0), 84))
    ink = np.concatenate([digits.reshape(10, 84), more])[:num_classes]
    return np.where(ink, 1, -1).astype(np.float32)


def squash(x: Array) -> Array:
    """Appendix A: the sigmoid that is 1 at 1 and -1 at -1."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


class Squashed(nn.Module):
    """A layer of weighted sums, squashed."""

    sums: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return squash(self.sums(name="sums")(x))


class Subsampling(nn.Module):
    """The sum of each 2x2, times a coefficient, plus a bias, squashed: [N H W C] -> [N H/2 W/2 C].

    A coefficient and a bias for each map.
    """

    coefficient_init: Callable
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one_a_map = (x.shape[-1:], self.param_dtype)
        coefficient = self.param("coefficient", self.coefficient_init, *one_a_map)
        bias = self.param("bias", nn.initializers.zeros, *one_a_map)
        x, coefficient, bias = nn.dtypes.promote_dtype(x, coefficient, bias, dtype=self.dtype)
        return squash(4 * layers.avg_pool(x, 2, 2) * coefficient + bias)


class SparseC3(nn.Module):
    """The connections of table I, squashed: [N H W 6] -> [N H-4 W-4 16].

    Maps that see equally many are one grouped convolution, on a copy of what they see.
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
    """Minus the squared distance to each class's code, which nothing trains: [N 84] -> [N K]."""

    num_classes: int

    def __call__(self, x: Array) -> Array:
        return -jnp.sum(jnp.square(x[:, None] - make_rbf_codes(self.num_classes)), axis=-1)


class OriginalLeNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; features f32 [N 84] if it is None.

    Logits are minus the squared distances of F6 to the codes of `make_rbf_codes`, so that softmax
    cross entropy is the paper's equation 9 without its constant j, the "rubbish" class. At most ten
    classes are digits; further ones have random codes. `kernel_init="paper"` is appendix A, for
    the coefficients of S2 and S4 too (four inputs; else they start as a mean's); it does not speak
    of biases, which start at 0. Sizes and errors as in `LeNet`.
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
        given = dict(kernel_init=kernel_init, **dtypes)
        conv = partial(layers.Conv, kernel_size=(5, 5), padding="VALID", **given)
        of_mean = nn.initializers.constant(1 / 4)
        coefficient_init = paper_coefficient_init if self.kernel_init == "paper" else of_mean
        subsampling = partial(Subsampling, coefficient_init, **dtypes)
        # In comments the shapes for 32x32.
        x = Squashed(partial(conv, 6), name="c1")(images)  # [N 28 28 6]
        x = subsampling(name="s2")(x)  # [N 14 14 6]
        x = SparseC3(conv, name="c3")(x)  # [N 10 10 16]
        x = subsampling(name="s4")(x)  # [N 5 5 16]
        x = Squashed(partial(conv, 120), name="c5")(x)  # [N 1 1 120]
        x = jnp.mean(x, axis=(1, 2))  # [N 120]
        x = Squashed(partial(nn.Dense, 84, **given), name="f6")(x)  # [N 84]
        return layers.classify(self, x, head=RBF)


VARIANTS = {"lenet5": partial(LeNet), "lenet5_original": partial(OriginalLeNet)}
