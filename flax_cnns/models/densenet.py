"""DenseNet: each layer takes the concatenated maps of all layers before it in its block.

The ImageNet networks come from table 1. The CIFAR networks come from table 2: L layers and growth
rate k, three blocks of equal depth, with B (bottlenecks), C (compression), both or neither.
`densenet161` is not in the paper's table; it is the k = 48 network that the authors released.
`densenet264d` is timm's: k = 48, and three 3x3 convolutions instead of the 7x7. The
`keras_densenet*` networks differ only in the epsilon and momentum of their norms, 1.001e-5 and
0.99. The head starts with LeCun's variance whatever `kernel_init` is; the paper uses He's for all
layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Densely Connected Convolutional Networks",
    authors="Huang, Liu, van der Maaten, Weinberger",
    year=2017,
    url="https://arxiv.org/abs/1608.06993",
)


def all_before(maps: Sequence[Array]) -> Sequence[Array]:
    """Returns all maps of a block, its input first: a layer's inputs in equation 2."""
    return maps


class DenseLayer(nn.Module):
    """Norm, ReLU, 3x3; a bottleneck has norm, ReLU and a 1x1 to 4 * `width` channels before them.

    Takes any number of maps, each [N H W C] with its own C, and returns [N H W width].
    """

    width: int  # the growth rate k
    conv: ModuleDef
    norm: ModuleDef
    drop: ModuleDef
    bottleneck: bool = True
    attention: ModuleDef | None = None  # on the layer's output: [N H W k] -> [N H W k]
    remat: bool = False

    @nn.compact
    def __call__(self, *maps: Array) -> Array:
        def entry(layer: DenseLayer, maps: Sequence[Array]) -> Array:
            x = jnp.concatenate(maps, axis=-1)
            x = nn.relu(layer.norm(name="norm1")(x))
            if layer.bottleneck:
                return layer.conv(4 * layer.width, (1, 1), padding=0, name="conv1")(x)
            return layer.conv(layer.width, (3, 3), padding=1, name="conv1")(x)

        # `entry` includes the convolution, whose input would otherwise be kept for the kernel's
        # gradient. `remat` does not recompute the convolution: nothing in `entry` needs its output.
        x = (nn.remat(entry) if self.remat else entry)(self, maps)
        x = self.drop(name="dropout1")(x)
        if self.bottleneck:
            x = nn.relu(self.norm(name="norm2")(x))
            x = self.conv(self.width, (3, 3), padding=1, name="conv2")(x)
            x = self.drop(name="dropout2")(x)
        if self.attention is not None:
            x = self.attention(self.conv, self.norm, name="attention")(x)
        return x


class DenseBlock(nn.Module):
    """`depth` layers with inputs selected by `links`: [N H W C] -> [N H W C + depth * k]."""

    depth: int
    layer: ModuleDef
    links: Callable[[Sequence[Array]], Sequence[Array]] = all_before

    @nn.compact
    def __call__(self, x: Array) -> Array:
        maps = [x]
        for i in range(self.depth):
            maps.append(self.layer(name=f"layer{i + 1}")(*self.links(maps)))
        return jnp.concatenate(self.links(maps), axis=-1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution, 2x2 mean: [N H W C] -> [N H/2 W/2 width], rounded down."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    drop: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(self.norm(name="norm")(x))
        x = self.drop(name="dropout")(self.conv(self.width, (1, 1), padding=0, name="conv")(x))
        return layers.avg_pool(x, 2, 2)


class FirstConv(nn.Module):
    """CIFAR's stem, a single 3x3 convolution: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.conv(self.width, (3, 3), padding=1, name="conv")(x)


class DenseNet(nn.Module):
    """DenseNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. H and W are at least 29 with
    ImageNet's stem and three transitions, at least 4 in CIFAR's networks. Raises `UserError` if the
    images are too small or have other channels than `input_size`, and for a `depth` that does not
    give three equal blocks.

    `remat=True` gives the memory-efficient DenseNet (Pleiss et al. 2017,
    https://arxiv.org/abs/1707.06990): the backward pass concatenates and normalizes the maps again.
    Otherwise every layer keeps them, in memory that grows with the square of a block's depth. By
    the shapes of the arrays that `jax.vjp` keeps, densenet_40_12 needs 48 instead of 310 MB for
    eight images. On a CPU the compiler undoes `remat` inside a single program.
    """

    # architecture
    depths: Counts | None = None  # layers of each block; a bottleneck counts as one
    depth: Count | None = None  # instead of `depths`: CIFAR's L, three equal blocks
    growth_rate: Count | Counts = 32  # k, one for all blocks or one for each
    bottleneck: bool = True  # B
    compression: float = 0.5  # C's theta, the fraction of maps that a transition keeps
    stem: ModuleDef = layers.ImageNetStem
    stem_width: Count | None = None  # None: 2k with both B and C, otherwise 16
    links: Callable[[Sequence[Array]], Sequence[Array]] = all_before
    attention: ModuleDef | None = None
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # after all convolutions but the first; paper: 0.2 without augmentation
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's running statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    remat: bool = False

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        depths = self._depths()
        smallest = 2 ** (len(depths) - 1)  # at the first block
        if self.stem is not FirstConv:
            smallest = 4 * smallest - 3
        layers.check_images(images, self.input_size, smallest)
        if not 0 < self.compression <= 1:
            raise UserError(f"compression must be above 0 and at most 1, got {self.compression}")
        conv, norm = layers.building_blocks(self, train)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        rates = self.growth_rate
        rates = (rates,) * len(depths) if isinstance(rates, int) else tuple(rates)
        if len(rates) != len(depths):
            raise UserError(
                f"expected a growth rate for each of the {len(depths)} blocks, got {rates}"
            )
        width = self.stem_width
        if width is None:
            width = 2 * rates[0] if self.bottleneck and self.compression < 1 else 16
        x = self.stem(width, conv, norm, name="stem")(images)  # H/4; on CIFAR H
        for i, (depth, rate) in enumerate(zip(depths, rates), 1):
            layer = partial(
                DenseLayer,
                rate,
                conv,
                norm,
                drop,
                bottleneck=self.bottleneck,
                attention=self.attention,
                remat=self.remat,
            )
            x = DenseBlock(depth, layer, self.links, name=f"block{i}")(x)
            if i < len(depths):  # halves H and W
                width = math.floor(self.compression * x.shape[-1])
                x = Transition(width, conv, norm, drop, name=f"transition{i}")(x)
        x = nn.relu(norm(name="norm")(x))
        return layers.classify(self, x)

    def _depths(self) -> Sequence[int]:
        """Returns the number of layers of each block.

        `depth` counts the stem, both transitions, the head, and each bottleneck as two layers.
        """
        if (self.depth is None) == (self.depths is None):
            raise UserError(f"expected either depth or depths, got {self.depth} and {self.depths}")
        if self.depths is not None:
            return self.depths
        assert self.depth is not None  # one of the two is given
        each = 6 if self.bottleneck else 3
        n, rest = divmod(self.depth - 4, each)
        if rest or n < 1:
            low = max(n, 1) * each + 4
            kind = "with" if self.bottleneck else "without"
            raise UserError(
                f"expected a depth of {each}n + 4 {kind} bottlenecks, such as {low} or "
                f"{low + each}, got {self.depth}"
            )
        return (n, n, n)


_cifar = partial(DenseNet, stem=FirstConv, num_classes=10, input_size=(32, 32, 3))
_plain = partial(_cifar, bottleneck=False, compression=1.0)
_keras = partial(DenseNet, epsilon=1.001e-5, momentum=0.99)
_264 = (6, 12, 64, 48)
VARIANTS = {
    "densenet121": partial(DenseNet, depths=(6, 12, 24, 16)),  # table 1
    "densenet169": partial(DenseNet, depths=(6, 12, 32, 32)),
    "densenet201": partial(DenseNet, depths=(6, 12, 48, 32)),
    "densenet264": partial(DenseNet, depths=_264),
    "densenet161": partial(DenseNet, depths=(6, 12, 36, 24), growth_rate=48),
    "densenet264d": partial(DenseNet, depths=_264, growth_rate=48, stem=layers.DeepStem),
    "keras_densenet121": partial(_keras, depths=(6, 12, 24, 16)),
    "keras_densenet169": partial(_keras, depths=(6, 12, 32, 32)),
    "keras_densenet201": partial(_keras, depths=(6, 12, 48, 32)),
    "densenet_40_12": partial(_plain, depth=40, growth_rate=12),  # table 2
    "densenet_100_12": partial(_plain, depth=100, growth_rate=12),
    "densenet_100_24": partial(_plain, depth=100, growth_rate=24),
    "densenet_bc_100_12": partial(_cifar, depth=100, growth_rate=12),
    "densenet_bc_250_24": partial(_cifar, depth=250, growth_rate=24),
    "densenet_bc_190_40": partial(_cifar, depth=190, growth_rate=40),
}
SOURCES = {
    **{f"densenet{n}": ("torchvision", "timm") for n in (121, 161, 169, 201)},
    "densenet264d": ("timm",),
    **{f"keras_densenet{n}": ("keras",) for n in (121, 169, 201)},
}
