"""SparseNet of Liu & Zeng, a DenseNet whose layers take only the farthest and the nearest maps.

Of the maps before it a layer takes the first n/2 and the last n/2 of the block, n being the `path`
(section 3.2; 7 and 7 of path 14 in section 5.1). Basic, with the bottlenecks and the compression of
DenseNet-BC ("bc"), and with attention on what each layer gives besides ("abc").

What could be established: the wiring, that blocks are deeper and deeper (V1 to V4 have 8, 12, 16;
12, 18, 24; 16, 24, 32; 20, 30, 40 layers), and path 14 for V1. The growth rates and the other paths
are in a table that we could not read, and the paper prints no count that settles them ("x2.6
smaller" than DenseNet's 25.6 M, for one). So the rows are the defaults of the programs that the
authors published: 10, 15 and 20 layers, k = 16, path 10. Where those programs part from the paper
we follow the paper: no biases, ReLU before a bottleneck's 1x1 too, none in the stem, with bc half
of the channels behind a transition, and `path` maps with the block's input among them (the programs
keep one more).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns.models.densenet import DenseNet, FirstConv
from flax_cnns.types import Array, ModuleDef, Paper

PAPER = Paper(
    title="SparseNet: A Sparse DenseNet for Image Classification",
    authors="Liu, Zeng",
    year=2018,
    url="https://arxiv.org/abs/1804.05340",
)


def farthest_and_nearest(maps: Sequence[Array], path: int) -> Sequence[Array]:
    """Of more than `path` maps the first half and the last half of so many, in their order."""
    if len(maps) <= path:
        return maps
    return [*maps[: path // 2], *maps[len(maps) - (path - path // 2) :]]


class ChannelAttention(nn.Module):
    """x + x * F(x): [N H W C] -> [N H W C], section 3.3.

    F pools x over H and W, and sends that and its 1x1 through another 1x1, norm and ReLU before
    each, a sigmoid behind the last (which the authors' program has and the paper does not name).
    """

    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True)  # [N 1 1 C]
        y = nn.relu(self.norm(name="norm1")(pooled))
        y = self.conv(width, (1, 1), padding=0, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(jnp.concatenate([y, pooled], axis=-1)))
        y = self.conv(width, (1, 1), padding=0, name="conv2")(y)
        return x + x * nn.sigmoid(y)


_bc = partial(
    DenseNet,
    depths=(10, 15, 20),
    growth_rate=16,
    links=partial(farthest_and_nearest, path=10),
    stem=FirstConv,
    stem_width=32,
    num_classes=10,
    input_size=(32, 32, 3),
)
VARIANTS = {
    "sparse_densenet": partial(_bc, bottleneck=False, compression=1.0),
    "sparse_densenet_bc": _bc,
    "sparse_densenet_abc": partial(_bc, attention=ChannelAttention),
}
