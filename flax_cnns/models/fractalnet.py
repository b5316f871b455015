"""FractalNet for CIFAR and ImageNet: f_1(z) = conv(z), f_C+1(z) = join(f_C(f_C(z)), conv(z)).

A block is f_C. It has C columns: the first has one convolution, the last 2^(C-1). Joins that
directly follow one another are one join, the mean over all columns that end there (figure 1,
right). As in the paper's experiments and in the authors' generator for Caffe
(github.com/gustavla/fractalnet), columns are pooled before the last join of a block (figure 1 pools
after it), dropout comes between a convolution and its norm, and poolings round sizes up.

Where we differ: the generator's convolutions have biases, and its norms neither scale nor shift.
Our norms are those of the BatchNorm paper that the FractalNet paper cites: they scale and shift, so
our convolutions have no biases. Running statistics move by a thousandth per step in Caffe, by a
tenth here.

Parameters. With the paper's widths (64, 128, 256, 512, 512) and three columns, every block has
three convolutions from the previous width and four of its own width. With ten classes that is
33,724,618 parameters, where table 1 says 38.6 M. Biases, 100 classes, four columns (76.1 M) or a
last block of 1024 maps (69.1 M) do not give that number. The widths (16, 32, 64, 128, 128) of the
ultra-deep networks give the paper's counts, 2.1, 4.8, 10.2 and 21.1 M for three to six columns:
`fractalnet_narrow*`. Table 1's network of 40 layers (22.9 M) is not here. Its columns are 128, 64,
32 and 16 channels wide at the start and are joined by projections, with "a mix" of 1x1 and 3x3 that
the paper does not specify. No mix that we tried (half of each layer's filters, or alternate layers)
has 22.9 M.

`fractalnet_34` has four blocks of four columns between ResNet-34's first and last layers. Its
fourth block does not pool, so that the last layer is ResNet-34's mean over 7x7. This is our
reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import AtLeast, Classes, Count, Counts, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="FractalNet: Ultra-Deep Neural Networks without Residuals",
    authors="Larsson, Maire, Shakhnarovich",
    year=2017,
    url="https://arxiv.org/abs/1605.07648",
)


class Unit(nn.Module):
    """3x3 convolution, dropout, norm, ReLU: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    drop: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (3, 3), padding=1, name="conv")(x)
        return nn.relu(self.norm(name="norm")(self.drop(name="dropout")(x)))


class Block(nn.Module):
    """f_C: [N H W C'] -> [N H/2 W/2 width], rounded up; without `pool`, [N H W width].

    Unit i of column c, both counted from 1, is `column<c>_unit<i>`. If drop-path draws one sample
    for the whole batch, a unit without a kept path to the last join is not computed, and its
    statistics do not change. If drop-path draws a sample per image, all units are computed, and
    their statistics are those of all images.
    """

    columns: int
    column: int | None  # only this column: a plain network
    pool: bool
    unit: ModuleDef  # without its name

    @nn.compact
    def __call__(self, x: Array, drop: layers.ColumnDrop | None, number: int) -> Array:
        pool = partial(layers.max_pool, window=2, stride=2, ceil=True) if self.pool else lambda y: y

        def unit(column: int, i: int, x: Array, needed: Array | None = None) -> Array:
            module = self.unit(name=f"column{column}_unit{i}")
            if needed is None:
                return module(x)
            nothing = jnp.zeros((*x.shape[:-1], module.width), x.dtype)

            def compute(module: nn.Module, x: Array) -> Array:
                with layers.inside_control_flow():
                    return module(x)

            return nn.cond(needed, compute, lambda module, x: nothing, module, x)

        def keep(column: int, i: int) -> Array | None:
            return None if drop is None else drop.keep(column, self.columns, number, column, i)

        def paths(column: int, i: int, x: Array, needed: Array | None) -> list[Array]:
            """Returns the inputs of the join after unit i of `column`, computed where `needed`."""
            first = unit(column, i, x, None if needed is None else needed[0])
            if column == self.columns:
                return [first]
            kept = keep(column + 1, 2 * i - 1)
            first_half = second_half = None
            if needed is not None:
                assert kept is not None  # `needed` comes from a drop
                second_half = needed[1:]
                first_half = kept & second_half.any()
            x = layers.fractal_join(paths(column + 1, 2 * i - 1, x, first_half), kept)
            return [first, *paths(column + 1, 2 * i, x, second_half)]

        if self.column is not None:
            for i in range(1, 2 ** (self.column - 1) + 1):
                x = unit(self.column, i, x)
            return pool(x)
        kept = keep(1, 1)
        per_batch = drop is not None and drop.column.ndim == 0
        return layers.fractal_join(
            [pool(y) for y in paths(1, 1, x, kept if per_batch else None)], kept
        )


class FractalNet(nn.Module):
    """FractalNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W. `column` selects
    one column of every block: the plain network that the paper extracts. This plain network takes
    the variables of the whole network, or only its own.

    Raises `UserError` if the images have other channels than `input_size`, if `column` does not
    exist, and for invalid rates.
    """

    # architecture
    widths: Counts  # of the blocks
    columns: Annotated[int, AtLeast(1, 12)]
    column: Count | None = None  # from 1, the shallowest, to `columns`
    input_size: ImageSize = (32, 32, 3)
    stem: ModuleDef | None = None  # before the first block
    last_pool: bool = True  # whether the last block pools
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
    # regularization
    dropout: Sequence[Rate] = ()  # for the units of each block
    drop_path: Rate = 0.0  # of a join's inputs in local samples: layers.draw_columns
    drop_path_global: float = 0.0  # the fraction of samples that are global
    drop_path_mode: str = "batch"  # one sample per step; "sample": one per image
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's running statistics, which move when the unit is computed
    kernel_init: str | Callable = "he"  # "paper": Caffe's xavier
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        if self.column is not None and not 1 <= self.column <= self.columns:
            raise UserError(f"expected a column from 1 to {self.columns}, got {self.column}")
        rates = self.dropout or (0.0,) * len(self.widths)
        if len(rates) != len(self.widths):
            raise UserError(
                f"expected a rate of dropout for each of {len(self.widths)} blocks, or no rates, "
                f"got {tuple(rates)}"
            )
        train_all = train and self.column is None
        drop = layers.draw_columns(self, self.columns, len(images), train_all)
        conv, norm = layers.building_blocks(self, train, paper=layers.caffe_xavier)
        x = images.astype(self.dtype)
        if self.stem is not None:
            x = self.stem(conv=conv, norm=norm, name="stem")(x)
        for i, (width, rate) in enumerate(zip(self.widths, rates), 1):
            unit = partial(
                Unit,
                width,
                conv=conv,
                norm=norm,
                drop=partial(nn.Dropout, rate, deterministic=not train),
            )
            pool = self.last_pool or i < len(self.widths)
            block = Block(self.columns, self.column, pool, unit, name=f"block{i}")
            x = block(x, drop, i)
        return layers.classify(self, x, paper=layers.caffe_xavier)


_CIFAR = partial(FractalNet, widths=(64, 128, 256, 512, 512), columns=3)
_NARROW = partial(FractalNet, widths=(16, 32, 64, 128, 128), num_classes=100)
_REGULARIZED = dict(  # section 4.1
    drop_path=0.15, drop_path_global=0.5, dropout=(0.0, 0.1, 0.2, 0.3, 0.4)
)

VARIANTS = {  # layers of the deepest column
    "fractalnet_20": _CIFAR,
    "fractalnet_20_droppath": partial(_CIFAR, **_REGULARIZED),
    **{f"fractalnet_narrow{5 * 2 ** (c - 1)}": partial(_NARROW, columns=c) for c in (3, 4, 5, 6)},
    "fractalnet_34": partial(
        FractalNet,
        widths=(128, 256, 512, 1024),
        columns=4,
        num_classes=1000,
        input_size=(224, 224, 3),
        stem=partial(layers.ImageNetStem, 64),
        last_pool=False,
    ),
}
