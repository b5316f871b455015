"""The 15-layer network (v1) for CIFAR-10 that the first neural architecture search found.

Figure 7 of the paper's appendix shows this network, which has neither strides nor pooling: each
layer's filter height and width, its number of filters, and the layers whose maps it concatenates.
The figure prints the sizes. The connections are read off the drawing, as others have read them. The
network has 4,201,630 parameters; the paper says 4.2 M. `nas_v1_dense` (every layer takes all layers
before it) and `nas_v1_no_skips` are the perturbations of section 4.1.

There are two public transcriptions of the figure, and ours agrees with one. In the other, layer 15
takes layer 2 instead of layer 6, which does not change the number of parameters. Section 4.1
mentions ReLU and BatchNorm but not their order; ours is ResNet's. The section does not say what
precedes the softmax. Here it is the mean of the maps and a dense layer, since a dense layer on all
pixels would alone have half a million parameters.

`table` and `strides` describe any network of the paper's space (section 3.3): layers that no other
layer takes are concatenated for the head, and smaller maps are padded with zeros. The paper does
not say where; here it is below and to the right. `flax_cnns.studies.search.nas` searches tables.

The paper prints no layers of v2 (with predicted strides, 20 layers, 2.5 M), v3 (with max pooling,
39 layers, 7.1 M) and the wider v3 (37.4 M), so this file does not have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import Classes, Count, CountOrZero, ImageSize, NotEmpty
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="Neural Architecture Search with Reinforcement Learning",
    authors="Zoph, Le",
    year=2016,
    url="https://arxiv.org/abs/1611.01578",
)


class Layer(NamedTuple):
    """A convolution of the network, a row of figure 7."""

    kernel_size: tuple[Count, Count]  # height, width
    width: Count
    sources: Sequence[CountOrZero]  # numbers of the layers it takes, from 1; 0: the images


FIGURE_7 = (
    Layer((3, 3), 36, (0,)),
    Layer((3, 3), 48, (1,)),
    Layer((3, 3), 36, (1, 2)),
    Layer((5, 5), 36, (1, 2, 3)),
    Layer((3, 7), 48, (3, 4)),
    Layer((7, 7), 48, (2, 3, 4, 5)),
    Layer((7, 7), 48, (2, 3, 4, 5, 6)),
    Layer((7, 3), 36, (1, 6, 7)),
    Layer((7, 1), 36, (1, 5, 6, 8)),
    Layer((7, 7), 36, (1, 3, 4, 5, 6, 7, 8, 9)),
    Layer((5, 7), 36, (1, 2, 5, 6, 7, 8, 9, 10)),
    Layer((7, 7), 48, (1, 2, 3, 4, 6, 11)),
    Layer((7, 5), 48, (1, 3, 6, 7, 8, 9, 10, 11, 12)),
    Layer((7, 5), 48, (3, 7, 12, 13)),
    Layer((7, 5), 48, (6, 7, 11, 12, 13, 14)),
)


def find_unread(table: Sequence[Layer]) -> list[int]:
    """Returns the numbers of the layers that no other layer takes, from 1. The head takes them."""
    taken = {source for row in table for source in row.sources}
    return [i for i in range(1, len(table) + 1) if i not in taken]


def concatenate_padded(maps: Sequence[Array]) -> Array:
    """Concatenates maps [N H W C] in depth, with zeros below and to the right of smaller ones."""
    height, width = (max(x.shape[axis] for x in maps) for axis in (1, 2))
    padded = [
        jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))
        for x in maps
    ]
    return jnp.concatenate(padded, axis=-1)


class NAS(nn.Module):
    """Searched network, by default v1: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features if `num_classes` is None: f32 [N 48], or as many as the unread layers
    have filters. Takes any H and W. Raises `UserError` if the images have other channels than
    `input_size`, if a layer takes itself, a later layer or nothing, and if there are not as many
    `strides` as layers.
    """

    # architecture
    table: Annotated[Sequence[Layer], NotEmpty()] = FIGURE_7
    strides: Sequence[tuple[Count, Count]] = ()  # height, width for each layer; (): all are 1
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"  # with "none" the convolutions have biases
    # head
    num_classes: Classes | None = 10
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        conv, norm = layers.building_blocks(self, train, paper=None, use_bias=self.norm == "none")
        unit = partial(layers.ConvUnit, conv=conv, norm=norm)
        strides = self.strides or ((1, 1),) * len(self.table)
        if len(strides) != len(self.table):
            raise UserError(f"strides: expected {len(self.table)} pairs, got {len(strides)}")
        maps = [images]  # each [N H W C] with its own C
        for i, ((kernel_size, width, sources), stride) in enumerate(zip(self.table, strides), 1):
            if not sources or max(sources) >= i:
                raise UserError(
                    f"table: layer {i} must take earlier layers, or 0 for the images; got"
                    f" {tuple(sources)}"
                )
            x = concatenate_padded([maps[j] for j in sources])
            maps.append(unit(width, kernel_size, stride=stride, name=f"conv{i}")(x))
        return layers.classify(self, concatenate_padded([maps[i] for i in find_unread(self.table)]))


def _rewired(sources: Callable[[int], Sequence[int]]) -> tuple[Layer, ...]:
    return tuple(row._replace(sources=tuple(sources(i))) for i, row in enumerate(FIGURE_7, 1))


VARIANTS = {
    "nas_v1": partial(NAS),
    "nas_v1_dense": partial(NAS, table=_rewired(lambda i: range(min(i - 1, 1), i))),
    "nas_v1_no_skips": partial(NAS, table=_rewired(lambda i: [i - 1])),
}
