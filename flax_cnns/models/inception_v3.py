"""Inception v3 as released: TensorFlow's network, which torchvision, timm and Keras also have.

The release differs from table 1 in the stem: it has a 1x1 of 80, a 3x3 of 192 and a max pooling
where the table has a 3x3 of 80, a 3x3/2 of 192 and a 3x3 of 288. It differs from figure 5 in the
35x35 blocks: it has a 5x5 where one branch of the figure has a 3x3. The map sizes are those of the
table.

The network in the last line of table 3, which the paper calls Inception-v3, has the auxiliary head
with BatchNorm (section 4) and label smoothing 0.1 (`config.mix`). The paper gives no weight for the
head's loss; TensorFlow's training took 0.4. The paper mentions neither dropout nor initial weights.
Our dropout is torchvision's 50 % (TensorFlow has 20 %). `kernel_init="paper"` is TensorFlow's
normal of deviation 0.1, truncated at two deviations, with deviations 0.01 and 0.001 in the last two
layers of the auxiliary head.

`keras_inception_v3` has BatchNorm without scale (17,216 parameters fewer) and with momentum 0.99,
3x3 means that exclude the padding, and no dropout.
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
    """35x35 block, figure 5: [N H W C] -> [N H W 224 + pool_proj]."""

    pool_proj: int
    unit: ModuleDef  # a layers.ConvUnit
    mean: Callable  # 3x3 pooling that keeps the size

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch1 = self.unit(64, (1, 1), name="branch1x1")(x)
        branch5 = self.unit(48, (1, 1), name="branch5x5_1")(x)
        branch5 = self.unit(64, (5, 5), name="branch5x5_2")(branch5)
        double3 = self.unit(64, (1, 1), name="branch3x3dbl_1")(x)
        double3 = self.unit(96, (3, 3), name="branch3x3dbl_2")(double3)
        double3 = self.unit(96, (3, 3), name="branch3x3dbl_3")(double3)
        pool = self.unit(self.pool_proj, (1, 1), name="branch_pool")(self.mean(x))
        return jnp.concatenate([branch1, branch5, double3, pool], axis=-1)


class BlockB(nn.Module):
    """Reduction from 35x35 to 17x17, figure 10: [N H W C] -> [N (H - 1)/2 (W - 1)/2 480 + C]."""

    unit: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        down = partial(self.unit, kernel_size=(3, 3), stride=2, padding="VALID")
        branch3 = down(384, name="branch3x3")(x)
        double3 = self.unit(64, (1, 1), name="branch3x3dbl_1")(x)
        double3 = self.unit(96, (3, 3), name="branch3x3dbl_2")(double3)
        double3 = down(96, name="branch3x3dbl_3")(double3)
        return jnp.concatenate([branch3, double3, layers.max_pool(x, 3, 2)], axis=-1)


class BlockC(nn.Module):
    """17x17 block, figure 6, with 7x7 as 1x7 and 7x1: [N H W C] -> [N H W 768]."""

    width: int  # inside the factorized 7x7
    unit: ModuleDef
    mean: Callable

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch1 = self.unit(192, (1, 1), name="branch1x1")(x)
        branch7 = self.unit(self.width, (1, 1), name="branch7x7_1")(x)
        branch7 = self.unit(self.width, (1, 7), name="branch7x7_2")(branch7)
        branch7 = self.unit(192, (7, 1), name="branch7x7_3")(branch7)
        double7 = self.unit(self.width, (1, 1), name="branch7x7dbl_1")(x)
        double7 = self.unit(self.width, (7, 1), name="branch7x7dbl_2")(double7)
        double7 = self.unit(self.width, (1, 7), name="branch7x7dbl_3")(double7)
        double7 = self.unit(self.width, (7, 1), name="branch7x7dbl_4")(double7)
        double7 = self.unit(192, (1, 7), name="branch7x7dbl_5")(double7)
        pool = self.unit(192, (1, 1), name="branch_pool")(self.mean(x))
        return jnp.concatenate([branch1, branch7, double7, pool], axis=-1)


class BlockD(nn.Module):
    """Reduction from 17x17 to 8x8: [N H W C] -> [N (H - 1)/2 (W - 1)/2 512 + C]."""

    unit: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        down = partial(self.unit, kernel_size=(3, 3), stride=2, padding="VALID")
        branch3 = self.unit(192, (1, 1), name="branch3x3_1")(x)
        branch3 = down(320, name="branch3x3_2")(branch3)
        branch7 = self.unit(192, (1, 1), name="branch7x7x3_1")(x)
        branch7 = self.unit(192, (1, 7), name="branch7x7x3_2")(branch7)
        branch7 = self.unit(192, (7, 1), name="branch7x7x3_3")(branch7)
        branch7 = down(192, name="branch7x7x3_4")(branch7)
        return jnp.concatenate([branch3, branch7, layers.max_pool(x, 3, 2)], axis=-1)


class BlockE(nn.Module):
    """8x8 block, figure 7, with parallel 1x3 and 3x1: [N H W C] -> [N H W 2048]."""

    unit: ModuleDef
    mean: Callable

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branch1 = self.unit(320, (1, 1), name="branch1x1")(x)
        branch3 = self.unit(384, (1, 1), name="branch3x3_1")(x)
        branch3a = self.unit(384, (1, 3), name="branch3x3_2a")(branch3)
        branch3b = self.unit(384, (3, 1), name="branch3x3_2b")(branch3)
        double3 = self.unit(448, (1, 1), name="branch3x3dbl_1")(x)
        double3 = self.unit(384, (3, 3), name="branch3x3dbl_2")(double3)
        double3a = self.unit(384, (1, 3), name="branch3x3dbl_3a")(double3)
        double3b = self.unit(384, (3, 1), name="branch3x3dbl_3b")(double3)
        pool = self.unit(192, (1, 1), name="branch_pool")(self.mean(x))
        return jnp.concatenate([branch1, branch3a, branch3b, double3a, double3b, pool], axis=-1)


class Aux(nn.Module):
    """Figure 8's auxiliary head: [N H W C] -> logits f32 [N num_classes], sown in training.

    5x5 means with stride 3 turn 17x17 maps into 5x5. Smaller maps are averaged to 5x5 adaptively,
    because such means would leave too little of them (in training, PyTorch's network takes only
    images of 299x299 or more).
    """

    unit: ModuleDef
    last: ModuleDef  # a unit whose kernels start smaller with `kernel_init="paper"`
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
    """Inception v3: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N 2048] if `num_classes` is None. H and W are at least 75. In
    training, the auxiliary head, if there is one, sows `aux_logits` aux1/logits. Raises `UserError`
    if the images are too small or have other channels than `input_size`.
    """

    # architecture
    input_size: ImageSize = (299, 299, 3)
    pool_projs: Sequence[Count] = (32, 64, 64)  # `pool_proj` of each 35x35 block
    widths: Counts = (128, 160, 160, 192)  # `width` of each 17x17 block
    norm: str = "batch"  # with "none", convolutions have biases
    scale: bool = True  # whether BatchNorm has a gamma
    count_padding: bool = True  # whether the blocks' 3x3 means include the padding
    # head
    num_classes: Classes | None = 1000
    aux: bool = False  # whether there is an auxiliary head
    # regularization
    dropout: Rate = 0.5
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's running statistics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    # Layer groups for optimizer.layer_decay, as in timm: train.optimizers.layer_exponents.
    layer_groups = (("conv[12].", "stem"), ("conv[34].", "conv3"))

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size, MIN_IMAGE_SIZE)

        def make_unit(std: float) -> ModuleDef:
            conv, norm = layers.building_blocks(
                self,
                train,
                paper=truncated_normal(std),
                use_bias=self.norm == "none",
                epsilon=1e-3,
            )
            return partial(layers.ConvUnit, conv=conv, norm=norm)

        unit = make_unit(0.1)
        mean = partial(
            layers.avg_pool, window=3, stride=1, padding=1, count_padding=self.count_padding
        )
        # Comments show the shapes for 299x299 images.
        x = unit(32, (3, 3), stride=2, padding="VALID", name="conv1a")(images)  # [N 149 149 32]
        x = unit(32, (3, 3), padding="VALID", name="conv2a")(x)  # [N 147 147 32]
        x = unit(64, (3, 3), name="conv2b")(x)  # [N 147 147 64]
        x = layers.MaxPool(3, 2, name="pool1")(x)  # [N 73 73 64]
        x = unit(80, (1, 1), name="conv3b")(x)
        x = unit(192, (3, 3), padding="VALID", name="conv4a")(x)  # [N 71 71 192]
        x = layers.MaxPool(3, 2, name="pool2")(x)  # [N 35 35 192]
        for letter, width in zip(ascii_lowercase[1:], self.pool_projs):
            x = BlockA(width, unit, mean, name=f"mixed5{letter}")(x)  # finally [N 35 35 288]
        x = BlockB(unit, name="mixed6a")(x)  # [N 17 17 768]
        for letter, width in zip(ascii_lowercase[1:], self.widths):
            x = BlockC(width, unit, mean, name=f"mixed6{letter}")(x)
        if self.aux and self.num_classes is not None and (train or self.is_initializing()):
            head = partial(layers.make_head(self, truncated_normal(0.001)), self.num_classes)
            Aux(unit, make_unit(0.01), head, name="aux1")(x, train)
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
