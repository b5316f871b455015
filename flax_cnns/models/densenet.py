"""DenseNet: every layer takes the maps of all layers before it in its block, side by side.

Table 1 for ImageNet, table 2 for CIFAR: L layers and growth rate k, three blocks of equal depth,
with B (bottlenecks), C (compression), both or neither. `densenet161` is no row of the paper's table
but the k = 48 network that its authors released; `densenet264d` is timm's: k = 48 and three 3x3 in
the place of the 7x7. `keras_densenet121` and its like have another epsilon and momentum in their
norms, 1.001e-5 and 0.99, and are the same networks else. The head starts with LeCun's variance
whatever `kernel_init` is; the paper uses He's for all layers.
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
    """Equation 2: of the maps in a block, its input first, a layer takes all."""
    return maps


class DenseLayer(nn.Module):
    """Norm, ReLU, 3x3; a bottleneck has norm, ReLU, 1x1 to 4 `width` before it.

    The maps that it takes, each [N H W C] with its own C, -> [N H W width].
    """

    width: int  # the growth rate k
    conv: ModuleDef
    norm: ModuleDef
    drop: ModuleDef
    bottleneck: bool = True
    attention: ModuleDef | None = None  # for what the layer gives, [N H W k] -> [N H W k]
    remat: bool = False

    @nn.compact
    def __call__(self, *maps: Array) -> Array:
        def entry(layer: DenseLayer, maps: Sequence[Array]) -> Array:
            x = jnp.concatenate(maps, axis=-1)
            x = nn.relu(layer.norm(name="norm1")(x))
            if layer.bottleneck:
                return layer.conv(4 * layer.width, (1, 1), padding=0, name="conv1")(x)
            return layer.conv(layer.width, (3, 3), padding=1, name="conv1")(x)

        # The convolution is inside, or its input would be kept for its kernel's gradient. It is
        # not computed again: nothing in here needs what it gives.
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
    """`depth` layers: [N H W C] -> [N H W C + depth * k] where each takes all before it."""

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
    """Norm, ReLU, 1x1, 2x2 average: [N H W C] -> [N H/2 W/2 width], rounded down."""

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
    """CIFAR's stem, a 3x3 and nothing else: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.conv(self.width, (3, 3), padding=1, name="conv")(x)


class DenseNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    Any H and W from 29 (three transitions behind the ImageNet stem), from 4 on CIFAR. Raises
    `UserError` for smaller images, where C is not that of `input_size`, and for a `depth` that
    makes no three equal blocks.

    `remat` is the memory-saving DenseNet (Pleiss et al. 2017, https://arxiv.org/abs/1707.06990):
    the backward pass joins and normalizes the maps again, which every layer would keep otherwise,
    memory that grows with the square of a block's depth. By the shapes of what `jax.vjp` keeps,
    densenet_40_12 on eight images: 48 in place of 310 MB. On a CPU the compiler undoes it inside
    one program.
    """

    # architecture
    depths: Counts | None = None  # layers (bottlenecks count once) of each block
    depth: Count | None = None  # in their place: CIFAR's L, three blocks of equal depth
    growth_rate: Count | Counts = 32  # k; of each block, where there are several
    bottleneck: bool = True  # B
    compression: float = 0.5  # C's theta, the part of the maps that a transition leaves
    stem: ModuleDef = layers.ImageNetStem
    stem_width: Count | None = None  # None: 2k for the networks that are both B and C, else 16
    links: Callable[[Sequence[Array]], Sequence[Array]] = all_before
    attention: ModuleDef | None = None
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # behind every convolution but the first; 0.2 without augmentation
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm
    # compilation
    remat: bool = False

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        depths = self._depths()
        smallest = 2 ** (len(depths) - 1)  # where the first block is
        if self.stem is not FirstConv:
            smallest = 4 * smallest - 3
        layers.check_images(images, self.input_size, smallest)
        if not 0 < self.compression <= 1:
            raise UserError(f"compression is above 0 and at most 1, got {self.compression}")
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
        """Layers of each block; L counts the stem, two transitions, the head, bottlenecks twice."""
        if (self.depth is None) == (self.depths is None):
            raise UserError(f"expected depth or depths, got {self.depth} and {self.depths}")
        if self.depth is None:
            return self.depths
        each = 6 if self.bottleneck else 3
        n, rest = divmod(self.depth - 4, each)
        if rest or n < 1:
            low = max(n, 1) * each + 4
            kind = "with" if self.bottleneck else "without"
            raise UserError(
                f"expected a depth of {each}n + 4 {kind} bottlenecks, as {low} or {low + each}, "
                f"got {self.depth}"
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
