"""The All Convolutional Net, models A, B and C of table 1 and what table 2 makes of them.

`form` says how a stage ends, as the paper names it:
    "base"      3x3 max pooling with stride 2, table 1
    "strided"   no pooling: the stage's last convolution has stride 2, Strided-CNN
    "convpool"  one more 3x3 convolution, then the pooling, ConvPool-CNN
    "all"       a 3x3 convolution with stride 2 in place of the pooling, All-CNN: the default
So `create_model("all_cnn_c", form="base")` against `form="all"` is max pooling against a strided
convolution, with the same shapes everywhere.

The paper does not say what is padded. Its table averages over 6x6 maps: we pad everything (32, 16,
8) but the 3x3 convolution after the second stage (6). Another reading with 6x6 leaves the first
convolution unpadded too (30, 15, 8, 6; Nervana's neon); many pad everything, `last_padding=1`, and
average over 8x8, which costs 281.2 in place of 270.8 MMACs in C. The count is the same in all.

Table 3 has other counts than tables 1 and 2 come to: about 1.28, 1.35 and 1.4 M for All-CNN-A, B
and C, which have 1,254,250, 1,300,618 and 1,369,738 (2.0, 3.7 and 2.2 % less). No reading gives
them: the two 3x3 convolutions that table 2 adds are 415,008 parameters in each model, whereas in
table 3 these add 0.38, 0.35 and 0.1 M. The counts of A, B and C are unverified.

The last convolution is followed by ReLU, as in the table, and its maps averaged to the logits.

Dropout is the paper's: 0.2 of the images, 0.5 after each pooling or what stands in its place. The
paper is silent on how weights start: `kernel_init="paper"` is the uniform "xavier" with zero
biases, which neon's reimplementation of C uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models.fields import Classes, CountOrZero, Counts, ImageSize, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Striving for Simplicity: The All Convolutional Net",
    authors="Springenberg, Dosovitskiy, Brox, Riedmiller",
    year=2014,
    url="https://arxiv.org/abs/1412.6806",
)

FORMS = ("base", "strided", "convpool", "all")


class Stage(nn.Module):
    """Convolutions with ReLU, halved at the end: [N H W C] -> [N H/2 W/2 width], rounded up."""

    width: int
    windows: Sequence[int]  # of the convolutions of table 1
    form: str
    conv: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        windows = [*self.windows, *([3] if self.form in ("convpool", "all") else [])]
        strides = [1] * len(windows)
        if self.form in ("strided", "all"):
            strides[-1] = 2
        for i, (window, stride) in enumerate(zip(windows, strides), 1):
            conv = partial(self.conv, strides=stride, padding=window // 2, name=f"conv{i}")
            x = nn.relu(conv(self.width, (window, window))(x))
        if self.form in ("base", "convpool"):
            x = layers.max_pool(x, 3, 2, padding=1)  # padded as the strided convolution is
        return x


class LastStage(nn.Module):
    """3x3 and 1x1 with ReLU: [N H W C] -> [N H-2 W-2 width], without padding."""

    width: int
    padding: int
    conv: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(self.conv(self.width, (3, 3), padding=self.padding, name="conv1")(x))
        return nn.relu(self.conv(self.width, (1, 1), name="conv2")(x))


class AllCNN(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features f32 [N 192] if None.

    H and W are at least 9, or 1 with `last_padding=1`. It normalizes nothing: `axis_name` changes
    nothing. Raises `UserError` for an unknown `form` and where the images are too small or have
    other channels than `input_size`.
    """

    # architecture
    windows: Counts  # of the convolutions of each of the two stages
    form: str = "all"
    widths: Counts = (96, 192, 192)  # of the two stages and of what follows them
    last_padding: CountOrZero = 0  # of the 3x3 convolution after the second stage
    input_size: ImageSize = (32, 32, 3)
    # head
    num_classes: Classes | None = 10
    # regularization
    input_dropout: Rate = 0.2  # of the images
    dropout: Rate = 0.5  # after each of the two stages
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        if self.form not in FORMS:
            raise UserError(f"unknown form {self.form!r}{did_you_mean(self.form, FORMS)}")
        # 9 pixels are 5, then 3 after the stages: as many as the last 3x3 window needs.
        layers.check_images(images, self.input_size, 1 if self.last_padding else 9)
        paper = layers.get_initializer("xavier")
        conv, _ = layers.building_blocks(self, train, paper=paper, use_bias=True)
        drop = partial(nn.Dropout, deterministic=not train)
        *widths, last = self.widths
        x = drop(self.input_dropout, name="dropout0")(images)
        for i, width in enumerate(widths, 1):  # sides of a 32x32 image: 16, 8
            x = Stage(width, self.windows, self.form, conv, name=f"stage{i}")(x)
            x = drop(self.dropout, name=f"dropout{i}")(x)
        x = LastStage(last, self.last_padding, conv, name=f"stage{len(self.widths)}")(x)  # 6
        return layers.classify_by_maps(self, x, paper=paper)


VARIANTS = {  # table 1
    "all_cnn_a": partial(AllCNN, windows=(5,)),
    "all_cnn_b": partial(AllCNN, windows=(5, 1)),
    "all_cnn_c": partial(AllCNN, windows=(3, 3)),
    "all_cnn_c_c100": partial(AllCNN, windows=(3, 3), num_classes=100),
}
