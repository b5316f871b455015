"""GoogLeNet (Inception v1), table 1 and figures 2 and 3: the paper's, and torchvision's.

`googlenet_2014` is the paper's network: biases, no BatchNorm, local response normalization,
dropout 40 %; `_aux` adds the heads of section 5, whose losses the paper weighs by 0.3
(`config.train.aux_weight`). 6,998,552 and 13,378,280 parameters; the columns of table 1 add up to
about 6.8 M, with the errors that the tests name. The paper is silent on the constants of the
response normalization, on biases, on the padding of its poolings and on the first values of the
weights: all four are those of the network that Caffe released (BVLC GoogLeNet: windows of 5
channels, alpha 1e-4, which Caffe divides by 5, beta 0.75, k 1; poolings that round up; Xavier's
uniform weights, biases of 0.2). That release says its authors' own weights were Gaussian and gives
no deviation.

`googlenet` is torchvision's: BatchNorm in place of biases and response normalization, 3x3 where the
paper has 5x5 (https://github.com/pytorch/vision/issues/906: 0.38 M fewer parameters), 2x2 windows
in the last max pooling, dropout 20 %, and heads that see a 4x4 adaptive mean. `googlenet_bn_5x5` is
it with the paper's 5x5.
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
    """Figure 2a: [N H W C] -> [N H W width1 + width3 + width5 + C], by `unit` a layers.ConvUnit."""

    width1: int
    width3: int
    width5: int
    unit: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = self.unit(self.width1, (1, 1), name="conv1x1")(x)
        three = self.unit(self.width3, (3, 3), name="conv3x3")(x)
        five = self.unit(self.width5, (5, 5), name="conv5x5")(x)
        return jnp.concatenate([one, three, five, layers.max_pool(x, 3, 1, padding=1)], axis=-1)


class Inception(nn.Module):
    """Figure 2b, with reduction: [N H W C] -> [N H W width1 + width3 + width5 + pool_proj]."""

    width1: int  # the columns of table 1
    reduce3: int
    width3: int
    reduce5: int
    width5: int
    pool_proj: int
    unit: ModuleDef
    window5: int = 5  # torchvision: 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = self.unit(self.width1, (1, 1), name="conv1x1")(x)
        three = self.unit(self.reduce3, (1, 1), name="reduce3x3")(x)
        three = self.unit(self.width3, (3, 3), name="conv3x3")(three)
        five = self.unit(self.reduce5, (1, 1), name="reduce5x5")(x)
        five = self.unit(self.width5, (self.window5,) * 2, name="conv5x5")(five)
        pool = layers.max_pool(x, 3, 1, padding=1)
        pool = self.unit(self.pool_proj, (1, 1), name="pool_proj")(pool)
        return jnp.concatenate([one, three, five, pool], axis=-1)


class Aux(nn.Module):
    """Section 5's auxiliary head: [N H W C] -> logits f32 [N num_classes], sown in training.

    The paper's 5x5/3 mean makes 4x4 of 14x14 maps; maps of another size, and all of torchvision's,
    have an adaptive mean of 4x4.
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


# From 3a on, table 1's columns: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj.
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
AUX = {"mixed4a": "aux1", "mixed4d": "aux2"}  # the heads, and what they see


class GoogLeNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N 1024] if it is None.

    H and W are at least 31 in the paper's network, 15 in torchvision's. In training the heads, if
    there are any, sow `aux_logits` aux1/logits (at 4a) and aux2/logits (at 4d). Raises `UserError`
    where the images are too small or have other channels than `input_size`, and for group
    normalization, whose 16 channels do not divide the paper's widths of 24.
    """

    # architecture
    input_size: ImageSize = (224, 224, 3)
    table: Sequence[tuple[str, Sequence[Count] | None]] = TABLE
    norm: str = "batch"  # "none" comes with biases
    response_norm: bool = False
    window5: Count = 5  # of the 5x5 branch
    pool4: Count = 3  # window of the max pooling between 4e and 5a
    # head
    num_classes: Classes | None = 1000
    aux: bool = False
    adaptive: bool = False  # what the heads see
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
        # Where each max pooling of 3x3 sees two pixels at least.
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
        aux = partial(Aux, self.num_classes, unit, dense, head, self.adaptive, self.aux_dropout)
        response_norm = partial(layers.local_response_norm, size=5, alpha=1e-4 / 5, beta=0.75, k=1)
        if not self.response_norm:
            response_norm = lambda x: x  # noqa: E731
        pool = partial(layers.MaxPool, window=3, stride=2, ceil=True)

        x = unit(64, (7, 7), stride=2, padding=3, name="conv1")(images)  # H/2
        x = response_norm(pool(name="pool1")(x))  # H/4
        x = unit(64, (1, 1), name="conv2_reduce")(x)
        x = unit(192, (3, 3), name="conv2")(x)
        x = pool(name="pool2")(response_norm(x))  # H/8
        for name, widths in self.table:  # H/8, H/16, H/32
            if widths is None:
                x = pool(window=self.pool4 if name == "pool4" else 3, name=name)(x)
                continue
            x = Inception(*widths, unit, self.window5, name=name)(x)
            has_head = self.aux and self.num_classes is not None and name in AUX
            if has_head and (train or self.is_initializing()):
                aux(name=AUX[name])(x, train)
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
