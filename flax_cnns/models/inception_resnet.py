"""Inception-ResNet-v2, figures 15 to 20 of the Inception-v4 paper, as Google released it.

The release is TensorFlow's slim network, which timm and Keras adopted. It differs from the paper in
four ways: another stem (Inception-v3's, followed by `mixed_5b`: 320 maps instead of 384); twice as
many blocks (10, 20, 10 instead of 5, 10, 5); a last block that is neither scaled nor activated; and
a 1x1 convolution to 1536 maps before the pooling. The widths drawn in the paper cannot be built:
figure 7 gives 1152 maps but figure 17 adds 1154, and figure 18 turns 1152 maps into 2144 but figure
19 adds 2048. The release has 320, 1088 and 2080. The release's auxiliary head, for training only,
is neither in the paper nor here. The release's BatchNorm has no scale; timm's and ours have one.
`keras_inception_resnet_v2` is Keras's: no scale, momentum 0.99, no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models import inception_v4
from flax_cnns.models.fields import Classes, Count, ImageSize, Rate
from flax_cnns.models.inception_v4 import MIN_IMAGE_SIZE, Branch, Convs, Mixed, concat
from flax_cnns.types import Array, Dtype, ModuleDef

PAPER = inception_v4.PAPER


class Stem(nn.Module):
    """Inception-v3's stem, which replaces figure 3: [N 299 299 3] -> [N 35 35 192]."""

    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch = partial(Branch, conv=self.conv, norm=self.norm)
        x = branch(((32, 3, 2), (32, 3, 1), (64, 3)), name="entry")(x)  # [N 147 147 64]
        x = layers.max_pool(x, 3, 2)  # [N 73 73 64]
        x = branch(((80, 1), (192, 3, 1)), name="middle")(x)  # [N 71 71 192]
        return layers.max_pool(x, 3, 2)


class ResidualBlock(nn.Module):
    """relu(x + scale * linear(concatenated branches)): [N H W C] -> [N H W C].

    Figure 20 and section 3.3: without the scaling, wide networks died early in training. `linear`
    is a 1x1 convolution with a bias and without a norm.
    """

    branches: Sequence[Convs]
    scale: float
    conv: ModuleDef
    norm: ModuleDef
    relu: bool = True
    stride: int = 1  # set by `layers.Stage`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch = partial(Branch, conv=self.conv, norm=self.norm)
        ys = [branch(convs, name=f"branch{i}")(x) for i, convs in enumerate(self.branches, 1)]
        linear = self.conv(x.shape[-1], (1, 1), padding="VALID", use_bias=True, name="linear")
        x = x + self.scale * linear(concat(*ys))
        return nn.relu(x) if self.relu else x


Mixed5b = partial(  # [N 35 35 192] -> [N 35 35 320]
    Mixed,
    (((96, 1),), ((48, 1), (64, 5)), ((64, 1), (96, 3), (96, 3))),
    pooled=((64, 1),),
)
ResidualA = partial(  # figure 16: [N 35 35 320]
    ResidualBlock, (((32, 1),), ((32, 1), (32, 3)), ((32, 1), (48, 3), (64, 3))), scale=0.17
)
ReductionA = partial(  # figure 7 and table 1: [N 35 35 320] -> [N 17 17 1088]
    Mixed, (((384, 3, 2),), ((256, 1), (256, 3), (384, 3, 2))), stride=2
)
ResidualB = partial(  # figure 17: [N 17 17 1088]
    ResidualBlock, (((192, 1),), ((128, 1), (160, (1, 7)), (192, (7, 1)))), scale=0.1
)
ReductionB = partial(  # figure 18: [N 17 17 1088] -> [N 8 8 2080]
    Mixed,
    (((256, 1), (384, 3, 2)), ((256, 1), (288, 3, 2)), ((256, 1), (288, 3), (320, 3, 2))),
    stride=2,
)
ResidualC = partial(  # figure 19: [N 8 8 2080]
    ResidualBlock, (((192, 1),), ((192, 1), (224, (1, 3)), (256, (3, 1)))), scale=0.2
)


class InceptionResNetV2(nn.Module):
    """Inception-ResNet-v2: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N 1536] if `num_classes` is None. H and W are at least 75. The
    paper gives no initial weights: `kernel_init="paper"` is the release's, Xavier's. Raises
    `UserError` if the images are too small or have other channels than `input_size`.
    """

    # architecture
    depths: tuple[Count, Count, Count] = (10, 20, 9)  # blocks A, B and C, not counting the last C
    input_size: ImageSize = (299, 299, 3)
    norm: str = "batch"  # with "none", convolutions have biases
    scale: bool = True  # whether BatchNorm has a gamma
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.2  # figure 15 gives the rate of keeping, 0.8
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's running statistics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    # Layer groups for optimizer.layer_decay, as in timm: train.optimizers.layer_exponents.
    layer_groups = (
        ("stem/entry", "stem"),
        ("stem/middle", "middle"),
        ("conv_7b", "below"),
    )

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)
        xavier = layers.get_initializer("xavier")
        conv, norm = layers.building_blocks(
            self, train, paper=xavier, use_bias=self.norm == "none", epsilon=1e-3
        )
        stage = partial(layers.Stage, conv=conv, scan=self.scan, remat=self.remat)
        a, b, c = (partial(block, norm=norm) for block in (ResidualA, ResidualB, ResidualC))
        x = Stem(conv, norm, name="stem")(images)  # [N 35 35 192]
        x = Mixed5b(conv=conv, norm=norm, name="mixed_5b")(x)  # [N 35 35 320]
        x = stage(a, depth=self.depths[0], name="inception_resnet_a")(x)
        x = ReductionA(conv=conv, norm=norm, name="reduction_a")(x)  # [N 17 17 1088]
        x = stage(b, depth=self.depths[1], name="inception_resnet_b")(x)
        x = ReductionB(conv=conv, norm=norm, name="reduction_b")(x)  # [N 8 8 2080]
        x = stage(c, depth=self.depths[2], name="inception_resnet_c")(x)
        x = c(conv=conv, scale=1.0, relu=False, name="last_c")(x)
        x = Branch(((1536, 1),), conv, norm, name="conv_7b")(x)  # [N 8 8 1536]
        dropout = nn.Dropout(self.dropout, deterministic=not train, name="dropout")
        return layers.classify(self, x, paper=xavier, dropout=dropout)


VARIANTS = {
    "inception_resnet_v2": partial(InceptionResNetV2),
    "keras_inception_resnet_v2": partial(
        InceptionResNetV2, scale=False, momentum=0.99, dropout=0.0
    ),
}
SOURCES = {
    "inception_resnet_v2": ("timm",),
    "keras_inception_resnet_v2": ("keras",),
}
