"""Inception-v4, figures 3 to 9, as Google released it.

The release is that of TensorFlow's slim models, which timm took over. It differs from the paper in
the order of the 7x1 and 1x7, or 3x1 and 1x3, in three branches, at equal cost. Its auxiliary head,
for training only, is not in the paper and not here. Its BatchNorm has no scale; timm's and ours
have one.
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

MIN_IMAGE_SIZE = 75  # what leaves one pixel after the stem's three halvings and the two reductions

# A convolution is (width, kernel), which keeps the size, or (width, kernel, stride), which does not
# pad: "V" in the figures. A kernel is k or (height, width). A branch is convolutions in a row.
Convs = Sequence[tuple]


def concat(*xs: Array) -> Array:
    """The figures' "filter concat": [N H W C1], [N H W C2], ... -> [N H W C1 + C2 + ...]."""
    return jnp.concatenate(xs, axis=-1)


class Branch(nn.Module):
    """Convolutions in a row, each normalized, ReLU: [N H W C] -> [N H' W' last width]."""

    convs: Convs
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, (width, kernel, *stride) in enumerate(self.convs, 1):
            how = dict(strides=stride[0], padding="VALID") if stride else dict(padding="SAME")
            kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
            x = self.conv(width, kernel, **how, name=f"conv{i}")(x)
            x = nn.relu(self.norm(name=f"norm{i}")(x))
        return x


class Mixed(nn.Module):
    """Branches beside each other, the last a pooling one: [N H W C] -> [N H W sum of widths].

    At stride 1 this one is a 3x3 mean and the convolutions `pooled`; at stride 2, a reduction, a
    3x3 maximum, unpadded like the branches' last convolutions: sides of (n - 1) // 2.
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
    """Figure 3: [N 299 299 3] -> [N 35 35 384]; the parts' names are the release's."""

    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch = partial(Branch, conv=self.conv, norm=self.norm)
        x = branch(((32, 3, 2), (32, 3, 1), (64, 3)), name="entry")(x)  # [N 147 147 64]
        x = concat(layers.max_pool(x, 3, 2), branch(((96, 3, 2),), name="mixed_3a")(x))  # 73
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
    """Figure 6, two of whose branches fork into a row and a column: [N H W C] -> [N H W 1536]."""

    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1  # `layers.Stage` says so

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
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N 1536] if it is None.

    H and W are at least 75. Raises `UserError` where they are smaller, or where C is not that of
    `input_size`. The paper gives no first values: `kernel_init="paper"` is the release's, a normal
    of variance 2 / fan_in, cut at two deviations, and Xavier's in the head.
    """

    # architecture
    depths: tuple[Count, Count, Count] = (4, 7, 3)  # blocks A, B and C
    input_size: ImageSize = (299, 299, 3)
    norm: str = "batch"  # "none" comes with biases
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.2  # figure 9 writes what it keeps: 0.8
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm
    # compilation
    scan: bool = False  # the repeats of a stage as one block under nn.scan: layers.Stage
    remat: bool = False  # compute the inside of each block again in the backward pass

    # Layers of optimizer.layer_decay, as in timm: see train.optimizers.layer_exponents.
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
