"""Inception v3 as released: TensorFlow's network, which torchvision, timm and Keras have too.

The release differs from table 1 in the stem (1x1 of 80, 3x3 of 192 and a max pooling, where the
table has 3x3 of 80, 3x3/2 of 192 and 3x3 of 288), and from figure 5 in the 35x35 blocks (a 5x5
where one branch has a 3x3); the table's sizes hold. The last line of table 3, which the paper calls
Inception-v3, has the auxiliary head with BatchNorm (section 4) and label smoothing 0.1
(`config.mix`). The paper gives the head no weight; TensorFlow's training took 0.4. Nor does it
speak of dropout (torchvision's 50 %, TensorFlow's 20 %: ours is torchvision's) or of first values:
`init="paper"` is TensorFlow's normal of deviation 0.1, cut at two deviations, with 0.01 and 0.001
in the head's last two layers.

`keras_inception_v3` has BatchNorm without scale (17,216 parameters fewer) and with momentum 0.99,
3x3 means that leave the padding out, and no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from string import ascii_lowercase

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import truncated_normal

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Rethinking the Inception Architecture for Computer Vision",
    authors="Szegedy, Vanhoucke, Ioffe, Shlens, Wojna",
    year=2015,
    url="https://arxiv.org/abs/1512.00567",
)

MIN_IMAGE_SIZE = 75  # the last reduction needs 3x3 maps


class BlockA(nn.Module):
    """Figure 5: [N H W C] -> [N H W 224 + pool_proj]."""

    pool_proj: int
    unit: ModuleDef  # a layers.ConvUnit
    mean: Callable  # 3x3 pooling that keeps the size

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = self.unit(64, (1, 1), name="branch1x1")(x)
        five = self.unit(48, (1, 1), name="branch5x5_1")(x)
        five = self.unit(64, (5, 5), name="branch5x5_2")(five)
        double = self.unit(64, (1, 1), name="branch3x3dbl_1")(x)
        double = self.unit(96, (3, 3), name="branch3x3dbl_2")(double)
        double = self.unit(96, (3, 3), name="branch3x3dbl_3")(double)
        pool = self.unit(self.pool_proj, (1, 1), name="branch_pool")(self.mean(x))
        return jnp.concatenate([one, five, double, pool], axis=-1)


class BlockB(nn.Module):
    """Figure 10, from 35x35 to 17x17: [N H W C] -> [N (H - 1)/2 (W - 1)/2 480 + C]."""

    unit: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        down = partial(self.unit, kernel_size=(3, 3), stride=2, padding="VALID")
        three = down(384, name="branch3x3")(x)
        double = self.unit(64, (1, 1), name="branch3x3dbl_1")(x)
        double = self.unit(96, (3, 3), name="branch3x3dbl_2")(double)
        double = down(96, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, layers.max_pool(x, 3, 2)], axis=-1)


class BlockC(nn.Module):
    """Figure 6, 7x7 as 1x7 and 7x1: [N H W C] -> [N H W 768]."""

    width: int  # inside the factorised 7x7
    unit: ModuleDef
    mean: Callable

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = self.unit(192, (1, 1), name="branch1x1")(x)
        seven = self.unit(self.width, (1, 1), name="branch7x7_1")(x)
        seven = self.unit(self.width, (1, 7), name="branch7x7_2")(seven)
        seven = self.unit(192, (7, 1), name="branch7x7_3")(seven)
        double = self.unit(self.width, (1, 1), name="branch7x7dbl_1")(x)
        double = self.unit(self.width, (7, 1), name="branch7x7dbl_2")(double)
        double = self.unit(self.width, (1, 7), name="branch7x7dbl_3")(double)
        double = self.unit(self.width, (7, 1), name="branch7x7dbl_4")(double)
        double = self.unit(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = self.unit(192, (1, 1), name="branch_pool")(self.mean(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class BlockD(nn.Module):
    """From 17x17 to 8x8: [N H W C] -> [N (H - 1)/2 (W - 1)/2 512 + C]."""

    unit: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        down = partial(self.unit, kernel_size=(3, 3), stride=2, padding="VALID")
        three = self.unit(192, (1, 1), name="branch3x3_1")(x)
        three = down(320, name="branch3x3_2")(three)
        seven = self.unit(192, (1, 1), name="branch7x7x3_1")(x)
        seven = self.unit(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = self.unit(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = down(192, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, layers.max_pool(x, 3, 2)], axis=-1)


class BlockE(nn.Module):
    """Figure 7, whose 3x3 widen into 1x3 beside 3x1: [N H W C] -> [N H W 2048]."""

    unit: ModuleDef
    mean: Callable

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = self.unit(320, (1, 1), name="branch1x1")(x)
        three = self.unit(384, (1, 1), name="branch3x3_1")(x)
        three_a = self.unit(384, (1, 3), name="branch3x3_2a")(three)
        three_b = self.unit(384, (3, 1), name="branch3x3_2b")(three)
        double = self.unit(448, (1, 1), name="branch3x3dbl_1")(x)
        double = self.unit(384, (3, 3), name="branch3x3dbl_2")(double)
        double_a = self.unit(384, (1, 3), name="branch3x3dbl_3a")(double)
        double_b = self.unit(384, (3, 1), name="branch3x3dbl_3b")(double)
        pool = self.unit(192, (1, 1), name="branch_pool")(self.mean(x))
        return jnp.concatenate([one, three_a, three_b, double_a, double_b, pool], axis=-1)


class Aux(nn.Module):
    """Figure 8's auxiliary head: [N H W C] -> logits f32 [N num_classes], sown in training.

    The 5x5/3 mean makes 5x5 of 17x17 maps; smaller maps, from which it would leave too little, have
    an adaptive mean of 5x5 (PyTorch's network takes images of 299x299 or more in training).
    """

    unit: ModuleDef
    last: ModuleDef  # a unit that the paper starts smaller
    head: ModuleDef  # the dense layer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> None:
        large = min(x.shape[1:3]) >= 17
        x = layers.avg_pool(x, 5, 3) if large else layers.adaptive_avg_pool(x, 5)
        x = self.unit(128, (1, 1), name="conv1")(x)
        x = self.last(768, (5, 5), padding="VALID", name="conv2")(x)
        x = layers.global_avg_pool(x)  # [N 768]
        x = self.head(name="head")(x)
        if train:
            self.sow("aux_logits", "logits", x)


class InceptionV3(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N 2048] if it is None.

    H and W are at least 75. In training the head, if there is one, sows `aux_logits` aux1/logits.
    Raises `UserError` where the images are too small or have other channels than `input_size`.
    """

    # architecture
    input_size: ImageSize = (299, 299, 3)
    pool_projs: Sequence[Count] = (32, 64, 64)  # of the 35x35 blocks
    widths: Counts = (128, 160, 160, 192)  # of the 17x17 blocks
    norm: str = "batch"  # "none" comes with biases
    scale: bool = True  # BatchNorm's gamma
    count_padding: bool = True  # whether the padding counts in the blocks' 3x3 means
    # head
    num_classes: Classes | None = 1000
    aux: bool = False
    # regularization
    dropout: Rate = 0.5
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's statistics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    # Layers of optimizer.layer_decay, as in timm: see train.optimizers.layer_exponents.
    layer_groups = (("conv[12].", "stem"), ("conv[34].", "conv3"))

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)

        def unit_of(std: float) -> ModuleDef:
            conv, norm = layers.building_blocks(
                self,
                train,
                paper=truncated_normal(std),
                use_bias=self.norm == "none",
                epsilon=1e-3,
            )
            return partial(layers.ConvUnit, conv=conv, norm=norm)

        unit = unit_of(0.1)
        mean = partial(
            layers.avg_pool, window=3, stride=1, padding=1, count_padding=self.count_padding
        )
        # In comments the shapes for 299x299.
        x = unit(32, (3, 3), stride=2, padding="VALID", name="conv1a")(images)  # [N 149 149 32]
        x = unit(32, (3, 3), padding="VALID", name="conv2a")(x)  # [N 147 147 32]
        x = unit(64, (3, 3), name="conv2b")(x)  # [N 147 147 64]
        x = layers.MaxPool(3, 2, name="pool1")(x)  # [N 73 73 64]
        x = unit(80, (1, 1), name="conv3b")(x)
        x = unit(192, (3, 3), padding="VALID", name="conv4a")(x)  # [N 71 71 192]
        x = layers.MaxPool(3, 2, name="pool2")(x)  # [N 35 35 192]
        for letter, width in zip(ascii_lowercase[1:], self.pool_projs):
            x = BlockA(width, unit, mean, name=f"mixed5{letter}")(x)  # [N 35 35 288] in the end
        x = BlockB(unit, name="mixed6a")(x)  # [N 17 17 768]
        for letter, width in zip(ascii_lowercase[1:], self.widths):
            x = BlockC(width, unit, mean, name=f"mixed6{letter}")(x)
        if self.aux and self.num_classes is not None and (train or self.is_initializing()):
            head = partial(layers.make_head(self, truncated_normal(0.001)), self.num_classes)
            Aux(unit, unit_of(0.01), head, name="aux1")(x, train)
        x = BlockD(unit, name="mixed7a")(x)  # [N 8 8 1280]
        x = BlockE(unit, mean, name="mixed7b")(x)  # [N 8 8 2048]
        x = BlockE(unit, mean, name="mixed7c")(x)
        dropout = nn.Dropout(self.dropout, deterministic=not train, name="dropout")
        return layers.classify(self, x, dropout=dropout, paper=truncated_normal(0.1))


VARIANTS = {
    "inception_v3": partial(InceptionV3, aux=True),
    "inception_v3_noaux": partial(InceptionV3),
    "keras_inception_v3": partial(
        InceptionV3, scale=False, momentum=0.99, count_padding=False, dropout=0.0
    ),
}

SOURCES = {
    "inception_v3": ("torchvision",),
    "inception_v3_noaux": ("torchvision", "timm"),
    "keras_inception_v3": ("keras",),
}
