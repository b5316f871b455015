"""SparseNet (Zhu et al.): a layer takes the maps of the layers 1, 2, 4, 8 ... before it.

The maps are concatenated as in a DenseNet (`sparsenet_40_24` has 40 layers and growth rate 24;
`_bc_` means bottlenecks and compression; three growth rates are those of the three blocks), or
summed up as in a ResNet (`sparsenet_sum_164`). A block returns what its next layer would take. For
ImageNet we found no list of layers in the paper: `sparsenet121` and others are DenseNet's rows with
these connections. pytorchcv's networks have exactly as many parameters.

For CIFAR the paper's authors publish parameter counts with 100 classes and stems of 2k channels.
Ours match the counts of sparsenet_40_24 (0.76 M), 100_24 (2.52), 100_36 (5.65), 100_16_32_64
(7.22), bc_100_24 (1.46) and nearly bc_100_16_32_64 (4.38; ours has 4.37). They do not match that of
sparsenet_bc_100_32_64_128: the authors publish 16.72 M, and this list of layers gives 17.34 M.
Without bottlenecks, or with the stem, compression or depth of another row, the difference is
larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.densenet import DenseNet, FirstConv
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Sparsely Aggregated Convolutional Networks",
    authors="Zhu, Deng, Maire, Deng, Mori, Tan",
    year=2018,
    url="https://arxiv.org/abs/1801.05895",
)


def powers_of_two(maps: Sequence[Array]) -> Sequence[Array]:
    """Selects the maps 1, 2, 4, 8 ... from the end, in their order."""
    last = len(maps)
    return [maps[last - 2**i] for i in reversed(range(last.bit_length()))]


class Branch(nn.Module):
    """1x1, 3x3, 1x1, each after norm and ReLU: [N H W C] -> [N H/stride W/stride 4*width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(self.norm(name="norm1")(x))
        x = self.conv(self.width, (1, 1), padding=0, name="conv1")(x)
        x = nn.relu(self.norm(name="norm2")(x))
        x = self.conv(self.width, (3, 3), strides=self.stride, padding=1, name="conv2")(x)
        x = nn.relu(self.norm(name="norm3")(x))
        return self.conv(4 * self.width, (1, 1), padding=0, name="conv3")(x)


class SumStage(nn.Module):
    """`depth` branches whose inputs are sparse sums: [N H W C] -> [N H/stride W/stride 4*width].

    A branch takes the sum of the earlier outputs that `links` selects, and the stage returns the
    sum that a next branch would take. The first of these outputs is a 1x1 projection of the stage's
    input, without norm. With `links=densenet.all_before` the stage is that of a ResNet, and this
    projection is its first shortcut. The authors did not release the code of their sums. Here the
    3x3 has the stride. The units of cifar_preact.py, which follow He et al.'s released code,
    differ: they project the normalized input, and their first 1x1 has the stride.
    """

    depth: int
    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    links: Callable[[Sequence[Array]], Sequence[Array]] = powers_of_two
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch_class: Any = nn.remat(Branch) if self.remat else Branch
        branch = partial(branch_class, self.width, self.conv, self.norm)
        project = self.conv(
            4 * self.width, (1, 1), strides=self.stride, padding=0, name="projection"
        )
        maps = [project(x), branch(self.stride, name="block1")(x)]
        for i in range(1, self.depth):
            maps.append(branch(name=f"block{i + 1}")(_add_up(self.links(maps))))
        return _add_up(self.links(maps))


def _add_up(maps: Sequence[Array]) -> Array:
    total: Any = sum(maps)  # the type of `sum` includes 0, for no maps
    return total


class SparseSumNet(nn.Module):
    """SparseNet with sums: images f32 [N H W C] -> logits f32 [N num_classes].

    This is the pre-activation CIFAR ResNet with bottlenecks (He et al. 2016), with sparse sums. The
    paper does not say what happens where maps shrink; here the sums of a stage start from a
    projection of the last output. Returns pooled features f32 [N C] if `num_classes` is None. Takes
    any H and W. Raises `UserError` if the images have other channels than `input_size`, and if
    `depth` does not give three equal stages.
    """

    # architecture
    depth: Count  # 9n + 2: three stages of n bottlenecks
    widths: Counts = (16, 32, 64)
    links: Callable[[Sequence[Array]], Sequence[Array]] = powers_of_two
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    remat: bool = False  # recompute the inside of each block in the backward pass

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        n, rest = divmod(self.depth - 2, 9)
        if rest or n < 1:
            low = 9 * max(n, 1) + 2
            raise UserError(
                f"expected a depth of 9n + 2, such as {low} or {low + 9}, got {self.depth}"
            )
        conv, norm = layers.building_blocks(self, train)
        x = FirstConv(self.widths[0], conv, norm, name="stem")(images)
        for i, width in enumerate(self.widths):
            stage = partial(SumStage, links=self.links, remat=self.remat, name=f"stage{i + 1}")
            x = stage(n, width, conv, norm, 1 if i == 0 else 2)(x)
        x = nn.relu(norm(name="norm")(x))
        return layers.classify(self, x)


_ImageNet = partial(DenseNet, links=powers_of_two)
_cifar = partial(_ImageNet, stem=FirstConv, num_classes=10, input_size=(32, 32, 3))


def _bc(k: int | Sequence[int], depth: int = 100) -> partial:
    return partial(_cifar, depth=depth, growth_rate=k)


def _plain(k: int | Sequence[int], depth: int = 100) -> partial:
    width = 2 * (k if isinstance(k, int) else k[0])
    return partial(_bc(k, depth), bottleneck=False, compression=1.0, stem_width=width)


VARIANTS = {
    "sparsenet_40_24": _plain(24, depth=40),
    "sparsenet_100_24": _plain(24),
    "sparsenet_100_36": _plain(36),
    "sparsenet_100_16_32_64": _plain((16, 32, 64)),
    "sparsenet_bc_100_24": _bc(24),
    "sparsenet_bc_100_16_32_64": _bc((16, 32, 64)),
    "sparsenet_bc_100_32_64_128": _bc((32, 64, 128)),
    "sparsenet_sum_164": partial(SparseSumNet, depth=164),
    "sparsenet121": partial(_ImageNet, depths=(6, 12, 24, 16)),  # DenseNet's for ImageNet
    "sparsenet161": partial(_ImageNet, depths=(6, 12, 36, 24), growth_rate=48),
    "sparsenet169": partial(_ImageNet, depths=(6, 12, 32, 32)),
    "sparsenet201": partial(_ImageNet, depths=(6, 12, 48, 32)),
}
