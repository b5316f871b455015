"""GoogLeNet (Inception v1), table 1 and figures 2 and 3: the paper's network and torchvision's.

`googlenet_2014` is the paper's network: biases, no BatchNorm, local response normalization, 40 %
dropout. It has 6,998,552 parameters. `googlenet_2014_aux` adds the heads of section 5, whose losses
the paper weights by 0.3 (`config.train.aux_weight`), and has 13,378,280. The columns of table 1 add
up to about 6.8 M, with the errors that the tests name. The paper gives neither the constants of the
response normalization, nor biases, nor the padding of its poolings, nor initial weights. All four
are those of Caffe's release (BVLC GoogLeNet): windows of 5 channels, alpha 1e-4, which Caffe
divides by 5, beta 0.75 and k 1; poolings that round up; Xavier's uniform weights; biases of 0.2.
The release says that the paper's authors used Gaussian weights, without giving the deviation.

`googlenet` is torchvision's. It has BatchNorm instead of biases and response normalization, 3x3
where the paper has 5x5 (https://github.com/pytorch/vision/issues/906: 0.38 M fewer parameters), 2x2
windows in the last max pooling, 20 % dropout, and heads on a 4x4 adaptive mean. `googlenet_bn_5x5`
is the same network with the paper's 5x5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import constant

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Going Deeper with Convolutions",
    authors="Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich",
    year=2014,
    url="https://arxiv.org/abs/1409.4842",
)


class NaiveInception(nn.Module):
    """Figure 2a: [N H W C] -> [N H W width1 + width3 + width5 + C]."""

    width1: int
    width3: int
    width5: int
    unit: ModuleDef  # a layers.ConvUnit

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch1 = self.unit(self.width1, (1, 1), name="conv1x1")(x)
        branch3 = self.unit(self.width3, (3, 3), name="conv3x3")(x)
        branch5 = self.unit(self.width5, (5, 5), name="conv5x5")(x)
        pool = layers.max_pool(x, 3, 1, padding=1)
        return jnp.concatenate([branch1, branch3, branch5, pool], axis=-1)


class Inception(nn.Module):
    """Figure 2b, with reductions: [N H W C] -> [N H W width1 + width3 + width5 + pool_proj]."""

    # The columns of table 1.
    width1: int
    reduce3: int
    width3: int
    reduce5: int
    width5: int
    pool_proj: int
    unit: ModuleDef
    window5: int = 5  # torchvision has 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch1 = self.unit(self.width1, (1, 1), name="conv1x1")(x)
        branch3 = self.unit(self.reduce3, (1, 1), name="reduce3x3")(x)
        branch3 = self.unit(self.width3, (3, 3), name="conv3x3")(branch3)
        branch5 = self.unit(self.reduce5, (1, 1), name="reduce5x5")(x)
        branch5 = self.unit(self.width5, (self.window5,) * 2, name="conv5x5")(branch5)
        pool = layers.max_pool(x, 3, 1, padding=1)
        pool = self.unit(self.pool_proj, (1, 1), name="pool_proj")(pool)
        return jnp.concatenate([branch1, branch3, branch5, pool], axis=-1)


class Aux(nn.Module):
    """Section 5's auxiliary head: [N H W C] -> logits f32 [N num_classes], sown in training.

    The paper's 5x5 means with stride 3 turn 14x14 maps into 4x4. Maps of another size, and all maps
    in torchvision's network, are averaged to 4x4 adaptively.
    """

    num_classes: int
    unit: ModuleDef
    dense: ModuleDef
    head: ModuleDef
    adaptive: bool
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> None:
        if not self.adaptive and x.shape[1:3] == (14, 14):
            x = layers.avg_pool(x, 5, 3)
        x = layers.adaptive_avg_pool(x, 4)  # [N 4 4 C]
        x = self.unit(128, (1, 1), name="conv")(x)
        x = x.reshape(len(x), -1)  # [N 2048]
        x = nn.relu(self.dense(1024, name="fc")(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        x = self.head(self.num_classes, name="head")(x)
        if train:
            self.sow("aux_logits", "logits", x)


# Table 1 from row 3a on: its columns #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5 and pool proj.
TABLE = (
    ("mixed3a", (64, 96, 128, 16, 32, 32)),
    ("mixed3b", (128, 128, 192, 32, 96, 64)),
    ("pool3", None),  # max pooling
    ("mixed4a", (192, 96, 208, 16, 48, 64)),
    ("mixed4b", (160, 112, 224, 24, 64, 64)),
    ("mixed4c", (128, 128, 256, 24, 64, 64)),
    ("mixed4d", (112, 144, 288, 32, 64, 64)),
    ("mixed4e", (256, 160, 320, 32, 128, 128)),
    ("pool4", None),
    ("mixed5a", (256, 160, 320, 32, 128, 128)),
    ("mixed5b", (384, 192, 384, 48, 128, 128)),
)
AUX = {"mixed4a": "aux1", "mixed4d": "aux2"}  # modules whose outputs the heads take


class GoogLeNet(nn.Module):
    """GoogLeNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N 1024] if `num_classes` is None. H and W are at least 31 in the
    paper's network, 15 in torchvision's. In training, the auxiliary heads, if there are any, sow
    `aux_logits` aux1/logits (at 4a) and aux2/logits (at 4d). Raises `UserError` if the images are
    too small or have other channels than `input_size`, and for group normalization, because its
    groups of 16 channels do not divide the paper's widths of 24.
    """

    # architecture
    input_size: ImageSize = (224, 224, 3)
    table: Sequence[tuple[str, Sequence[Count] | None]] = TABLE
    norm: str = "batch"  # with "none", convolutions have biases
    response_norm: bool = False
    window5: Count = 5  # kernel size in the 5x5 branch
    pool4: Count = 3  # window of the max pooling between 4e and 5a
    # head
    num_classes: Classes | None = 1000
    aux: bool = False  # whether there are auxiliary heads
    adaptive: bool = False  # whether the auxiliary heads average adaptively
    # regularization
    dropout: Rate = 0.4
    aux_dropout: Rate = 0.7
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        # At these sizes each 3x3 max pooling sees at least two pixels.
        layers.check_images(images, self.input_size, 31 if self.pool4 == 3 else 15)
        xavier = layers.caffe_xavier
        conv, norm = layers.building_blocks(
            self, train, paper=xavier, use_bias=self.norm == "none", epsilon=1e-3
        )
        bias_init = constant(0.2 if self.kernel_init == "paper" else 0.0)
        conv = partial(conv, bias_init=bias_init)
        dense = partial(
            nn.Dense,
            kernel_init=layers.get_initializer(self.kernel_init, paper=xavier),
            bias_init=bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        head = layers.make_head(self, xavier)
        unit = partial(layers.ConvUnit, conv=conv, norm=norm)
        aux_head: ModuleDef = partial(
            Aux,
            unit=unit,
            dense=dense,
            head=head,
            adaptive=self.adaptive,
            dropout=self.aux_dropout,
        )
        inception: ModuleDef = partial(Inception, unit=unit, window5=self.window5)
        pool = partial(layers.MaxPool, window=3, stride=2, ceil=True)

        def response_norm(x: Array) -> Array:
            if not self.response_norm:
                return x
            return layers.local_response_norm(x, size=5, alpha=1e-4 / 5, beta=0.75, k=1)

        x = unit(64, (7, 7), stride=2, padding=3, name="conv1")(images)  # H/2
        x = response_norm(pool(name="pool1")(x))  # H/4
        x = unit(64, (1, 1), name="conv2_reduce")(x)
        x = unit(192, (3, 3), name="conv2")(x)
        x = pool(name="pool2")(response_norm(x))  # H/8
        for name, widths in self.table:  # H/8, H/16, H/32
            if widths is None:
                x = pool(window=self.pool4 if name == "pool4" else 3, name=name)(x)
                continue
            x = inception(*widths, name=name)(x)
            has_head = self.aux and self.num_classes is not None and name in AUX
            if has_head and (train or self.is_initializing()):
                aux_head(self.num_classes, name=AUX[name])(x, train)
        dropout = nn.Dropout(self.dropout, deterministic=not train, name="dropout")
        return layers.classify(self, x, dropout=dropout, head=head)


_2014 = partial(GoogLeNet, norm="none", response_norm=True)
_TORCHVISION = partial(GoogLeNet, pool4=2, adaptive=True, dropout=0.2)

VARIANTS = {
    "googlenet": partial(_TORCHVISION, window5=3),
    "googlenet_tv_aux": partial(_TORCHVISION, window5=3, aux=True),
    "googlenet_2014": partial(_2014),
    "googlenet_2014_aux": partial(_2014, aux=True),
    "googlenet_bn_5x5": partial(_TORCHVISION),
    "googlenet_bn_5x5_aux": partial(_TORCHVISION, aux=True),
}

SOURCES = {"googlenet": ("torchvision",), "googlenet_tv_aux": ("torchvision",)}
