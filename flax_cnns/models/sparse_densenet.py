"""SparseNet (Liu and Zeng): a DenseNet whose layers take only the farthest and the nearest maps.

Of the maps before it in its block, a layer takes the first n/2 and the last n/2, where n is the
`path` (section 3.2; 7 and 7 for path 14 in section 5.1). There is a basic network, "bc" with the
bottlenecks and the compression of DenseNet-BC, and "abc", which adds attention on each layer's
output.

We could establish the connections, the growing depth of the blocks (V1 to V4 have 8, 12, 16; 12,
18, 24; 16, 24, 32; 20, 30, 40 layers), and path 14 for V1. The growth rates and the other paths are
in a table that we could not read, and the parameter counts in the paper's text do not determine
them (one count is "x2.6 smaller" than DenseNet's 25.6 M). So the variants have the defaults of the
programs that the authors published: 10, 15 and 20 layers, k = 16, path 10. Where those programs
differ from the paper, we follow the paper: no biases, ReLU also before a bottleneck's 1x1, no ReLU
in the stem, half of the channels after a transition in "bc", and `path` maps including the block's
input (the programs keep one map more).
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
    """Returns the first and last `path` / 2 of more than `path` maps, in order, else all maps."""
    if len(maps) <= path:
        return maps
    return [*maps[: path // 2], *maps[len(maps) - (path - path // 2) :]]


class ChannelAttention(nn.Module):
    """Channel attention x + x * F(x) of section 3.3: [N H W C] -> [N H W C].

    F averages x over H and W. A first 1x1 convolution takes the means; a second one takes the
    output of the first and the means. Norm and ReLU precede each, and a sigmoid follows the second
    (in the authors' program but not in the paper).
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
