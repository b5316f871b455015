"""SparseNet of Zhu et al.: a layer takes the maps of the layers 1, 2, 4, 8 ... before it.

As DenseNet does by `densenet.all_before`, side by side (`sparsenet_40_24`: 40 layers, growth rate
24; `_bc_` as there; three growth rates where each block has its own), or added up as in a ResNet
(`sparsenet_sum_164`). A block gives what its next layer would take. For ImageNet `sparsenet121` and
its like are DenseNet's rows with these links: we found no list of the paper's for them; pytorchcv
has the same, to the parameter.

The counts that the paper's authors publish for CIFAR are those of 100 classes and stems of 2k
channels, with and without BC, their DenseNets' included: 0.76, 2.52, 5.65, 7.22; 1.46 and 4.38 M.
Not so sparsenet_bc_100_32_64_128: 16.72 M, where this list of layers gives 17.34 M (and without
bottlenecks, or with the stem, the compression or the depth of another row, something further from
it). For 16, 32, 64 with BC we are at 4.37 M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
    """Of the maps so far those 1, 2, 4, 8 ... from the end, in their order."""
    last = len(maps)
    return [maps[last - 2**i] for i in reversed(range(last.bit_length()))]


class Branch(nn.Module):
    """Norm and ReLU before a 1x1, a 3x3, a 1x1: [N H W C] -> [N H/stride W/stride 4*width]."""

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
    """`depth` branches, each of the sum of those before it that `links` names; their sum likewise.

    [N H W C] -> [N H/stride W/stride 4*width]. Before the first branch's output stands the 1x1
    projection of what the stage takes, bare, as a ResNet's shortcut: with `densenet.all_before` the
    stage is a ResNet's. The paper's sums are not released; the 3x3 has the stride (where the units
    of cifar_preact.py, as released, project what is normalized and stride in the first 1x1).
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
        branch = nn.remat(Branch) if self.remat else Branch
        branch = partial(branch, self.width, self.conv, self.norm)
        project = self.conv(
            4 * self.width, (1, 1), strides=self.stride, padding=0, name="projection"
        )
        maps = [project(x), branch(self.stride, name="block1")(x)]
        for i in range(1, self.depth):
            maps.append(branch(name=f"block{i + 1}")(sum(self.links(maps))))
        return sum(self.links(maps))


class SparseSumNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    The CIFAR ResNet of bottlenecks with pre-activation (He et al. 2016) whose sums are sparse. The
    paper does not say what happens where maps shrink: here sums begin anew, with a projection of
    the last. Any H and W. Raises `UserError` where C is not that of `input_size`, and for a `depth`
    that makes no three equal stages.
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
            raise UserError(f"expected a depth of 9n + 2, as {low} or {low + 9}, got {self.depth}")
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
