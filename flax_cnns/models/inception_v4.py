"""Inception-v4, figures 3 to 9, as Google released it.

The release belongs to TensorFlow's slim models; timm adopted it. It differs from the paper in three
branches, where 7x1 and 1x7, or 3x1 and 1x3, have the other order, at equal cost. The release's
auxiliary head, for training only, is neither in the paper nor here. The release's BatchNorm has no
scale; timm's and ours have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import he_normal

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    authors="Szegedy, Ioffe, Vanhoucke, Alemi",
    year=2016,
    url="https://arxiv.org/abs/1602.07261",
)

MIN_IMAGE_SIZE = 75  # leaves one pixel after the stem's three halvings and the two reductions

# The convolutions of a branch. (width, kernel) is padded so that it keeps the size. (width, kernel,
# stride) has no padding: "V" in the figures. A kernel is (height, width), or k for k x k.
Convs = Sequence[tuple]


def concat(*xs: Array) -> Array:
    """Concatenates channels, the figures' "filter concat": [N H W C1], ... -> [N H W C1 + ...]."""
    return jnp.concatenate(xs, axis=-1)


class Branch(nn.Module):
    """A sequence of convolutions, each with norm and ReLU: [N H W C] -> [N H' W' last width]."""

    convs: Convs
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, (width, kernel, *stride) in enumerate(self.convs, 1):
            kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
            strides, padding = (stride[0], "VALID") if stride else (1, "SAME")
            conv = self.conv(width, kernel, strides=strides, padding=padding, name=f"conv{i}")
            x = conv(x)
            x = nn.relu(self.norm(name=f"norm{i}")(x))
        return x


class Mixed(nn.Module):
    """Concatenates parallel branches and a pooling branch: [N H W C] -> [N H' W' sum of widths].

    At stride 1 the pooling branch is a 3x3 mean followed by the convolutions `pooled`. At stride 2,
    in a reduction, it is a 3x3 maximum without padding, like the last convolutions of the other
    branches: H' is (H - 1) // 2.
    """

    branches: Sequence[Convs]
    conv: ModuleDef
    norm: ModuleDef
    pooled: Convs = ()
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch = partial(Branch, conv=self.conv, norm=self.norm)
        ys = [branch(convs, name=f"branch{i}")(x) for i, convs in enumerate(self.branches, 1)]
        if self.stride == 2:
            return concat(*ys, layers.max_pool(x, 3, 2))
        mean = layers.avg_pool(x, 3, 1, padding=1, count_padding=False)
        return concat(*ys, branch(self.pooled, name="pool")(mean))


class Stem(nn.Module):
    """Figure 3, with the release's names of its parts: [N 299 299 3] -> [N 35 35 384]."""

    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch = partial(Branch, conv=self.conv, norm=self.norm)
        x = branch(((32, 3, 2), (32, 3, 1), (64, 3)), name="entry")(x)  # [N 147 147 64]
        x = concat(layers.max_pool(x, 3, 2), branch(((96, 3, 2),), name="mixed_3a")(x))  # H = 73
        long = ((64, 1), (64, (1, 7)), (64, (7, 1)), (96, 3, 1))
        x = concat(  # [N 73 73 160] -> [N 71 71 192]
            branch(((64, 1), (96, 3, 1)), name="mixed_4a_branch1")(x),
            branch(long, name="mixed_4a_branch2")(x),
        )
        return concat(branch(((192, 3, 2),), name="mixed_5a")(x), layers.max_pool(x, 3, 2))


InceptionA = partial(  # figure 4: [N 35 35 384]
    Mixed,
    (((96, 1),), ((64, 1), (96, 3)), ((64, 1), (96, 3), (96, 3))),
    pooled=((96, 1),),
)
ReductionA = partial(  # figure 7 and table 1: [N 35 35 384] -> [N 17 17 1024]
    Mixed, (((384, 3, 2),), ((192, 1), (224, 3), (256, 3, 2))), stride=2
)
InceptionB = partial(  # figure 5: [N 17 17 1024]
    Mixed,
    (
        ((384, 1),),
        ((192, 1), (224, (1, 7)), (256, (7, 1))),
        ((192, 1), (192, (7, 1)), (224, (1, 7)), (224, (7, 1)), (256, (1, 7))),
    ),
    pooled=((128, 1),),
)
ReductionB = partial(  # figure 8: [N 17 17 1024] -> [N 8 8 1536]
    Mixed,
    (((192, 1), (192, 3, 2)), ((256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2))),
    stride=2,
)


class InceptionC(nn.Module):
    """Figure 6, two of whose branches split into 1x3 and 3x1: [N H W C] -> [N H W 1536]."""

    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1  # set by `layers.Stage`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch = partial(Branch, conv=self.conv, norm=self.norm)
        row, column = ((256, (1, 3)),), ((256, (3, 1)),)
        y = branch(((384, 1),), name="branch2")(x)
        z = branch(((384, 1), (448, (3, 1)), (512, (1, 3))), name="branch3")(x)
        mean = layers.avg_pool(x, 3, 1, padding=1, count_padding=False)
        return concat(
            branch(((256, 1),), name="branch1")(x),
            branch(row, name="branch2_row")(y),
            branch(column, name="branch2_column")(y),
            branch(row, name="branch3_row")(z),
            branch(column, name="branch3_column")(z),
            branch(((256, 1),), name="pool")(mean),
        )


class InceptionV4(nn.Module):
    """Inception-v4: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N 1536] if `num_classes` is None. H and W are at least 75. The
    paper gives no initial weights: `kernel_init="paper"` is the release's, a normal of variance
    2 / fan_in that is truncated at two deviations, and Xavier's in the head. Raises `UserError` if
    the images are too small or have other channels than `input_size`.
    """

    # architecture
    depths: tuple[Count, Count, Count] = (4, 7, 3)  # blocks A, B and C
    input_size: ImageSize = (299, 299, 3)
    norm: str = "batch"  # with "none", convolutions have biases
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.2  # figure 9 gives the rate of keeping, 0.8
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    # Layer groups for optimizer.layer_decay, as in timm: train.optimizers.layer_exponents.
    layer_groups = (("stem/entry", "stem"), (r"stem/(mixed_\d)\w*", r"\1"))

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        conv, norm = layers.building_blocks(
            self, train, paper=he_normal(), use_bias=self.norm == "none", epsilon=1e-3
        )
        stage = partial(layers.Stage, conv=conv, scan=self.scan, remat=self.remat)
        a, b, c = (partial(block, norm=norm) for block in (InceptionA, InceptionB, InceptionC))
        x = Stem(conv, norm, name="stem")(images)  # [N 35 35 384]
        x = stage(a, depth=self.depths[0], name="inception_a")(x)
        x = ReductionA(conv=conv, norm=norm, name="reduction_a")(x)  # [N 17 17 1024]
        x = stage(b, depth=self.depths[1], name="inception_b")(x)
        x = ReductionB(conv=conv, norm=norm, name="reduction_b")(x)  # [N 8 8 1536]
        x = stage(c, depth=self.depths[2], name="inception_c")(x)
        dropout = nn.Dropout(self.dropout, deterministic=not train, name="dropout")
        return layers.classify(self, x, paper=layers.get_initializer("xavier"), dropout=dropout)


VARIANTS = {"inception_v4": partial(InceptionV4)}
SOURCES = {"inception_v4": ("timm",)}
