"""The All Convolutional Net: models A, B and C of table 1, and the forms of table 2.

`form` says how a stage ends, under the paper's names:

    "base"      3x3 max pooling with stride 2 (table 1)
    "strided"   no pooling: the stage's last convolution has stride 2 (Strided-CNN)
    "convpool"  one more 3x3 convolution, then the pooling (ConvPool-CNN)
    "all"       a 3x3 convolution with stride 2 instead of the pooling (All-CNN); the default

So `create_model("all_cnn_c", form="base")`, compared with `form="all"`, tests max pooling against a
strided convolution, with the same shapes everywhere.

The paper does not say what is padded. Its table averages over 6x6 maps. We pad everything (maps of
32, 16 and 8 pixels) except the 3x3 convolution after the second stage (6). Another reading that
ends at 6x6 also leaves the first convolution unpadded (30, 15, 8, 6; Nervana's neon). Many
implementations pad everything, as `last_padding=1` does, and average over 8x8, which costs 281.2
instead of 270.8 MMACs in C. The parameter count is the same in all of them.

Table 3 gives parameter counts that do not follow from tables 1 and 2: about 1.28, 1.35 and 1.4 M
for All-CNN-A, B and C. The networks of tables 1 and 2 have 1,254,250, 1,300,618 and 1,369,738 (2.0,
3.7 and 2.2 % less). No reading explains this: the two 3x3 convolutions that table 2 adds have
415,008 parameters in each model, but in table 3 they add 0.38, 0.35 and 0.1 M. The counts of A, B
and C are therefore unverified.

A ReLU follows the last convolution, as in the table. The means of its maps are the logits.

Dropout is the paper's: 0.2 on the images, 0.5 after each pooling or the layer that replaces it. The
paper does not say how weights are initialized: `kernel_init="paper"` is the uniform "xavier" with
zero biases, which neon's reimplementation of C uses.
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
    """Convolutions with ReLU, and a halving of the size at the end.

    [N H W C] -> [N H/2 W/2 width], rounded up. `form` selects how the size is halved.
    """

    width: int
    windows: Sequence[int]  # kernel sizes of table 1's convolutions
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
            x = layers.max_pool(x, 3, 2, padding=1)  # padded like the strided convolution
        return x


class LastStage(nn.Module):
    """3x3 and 1x1 convolutions with ReLU: [N H W C] -> [N H-2 W-2 width] without padding."""

    width: int
    padding: int
    conv: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(self.conv(self.width, (3, 3), padding=self.padding, name="conv1")(x))
        return nn.relu(self.conv(self.width, (1, 1), name="conv2")(x))


class AllCNN(nn.Module):
    """All Convolutional Net: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N 192] if `num_classes` is None. H and W are at least 9, or 1 with
    `last_padding=1`. The network normalizes nothing, so `axis_name` has no effect. Raises
    `UserError` for an unknown `form`, and if the images are too small or have other channels than
    `input_size`.
    """

    # architecture
    windows: Counts  # kernel sizes of the convolutions in each of the two stages
    form: str = "all"
    widths: Counts = (96, 192, 192)  # of the two stages and of the last stage
    last_padding: CountOrZero = 0  # of the last stage's 3x3 convolution
    input_size: ImageSize = (32, 32, 3)
    # head
    num_classes: Classes | None = 10
    # regularization
    input_dropout: Rate = 0.2  # on the images
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
        # The two stages reduce 9 pixels to 5 and 3, which the last 3x3 convolution needs.
        layers.check_images(images, self.input_size, 1 if self.last_padding else 9)
        paper = layers.get_initializer("xavier")
        conv, _ = layers.building_blocks(self, train, paper=paper, use_bias=True)
        drop = partial(nn.Dropout, deterministic=not train)
        *widths, last = self.widths
        x = drop(self.input_dropout, name="dropout0")(images)
        for i, width in enumerate(widths, 1):  # 32x32 images: H = 16, 8
            x = Stage(width, self.windows, self.form, conv, name=f"stage{i}")(x)
            x = drop(self.dropout, name=f"dropout{i}")(x)
        x = LastStage(last, self.last_padding, conv, name=f"stage{len(self.widths)}")(x)  # H = 6
        return layers.classify_by_maps(self, x, paper=paper)


VARIANTS = {  # table 1
    "all_cnn_a": partial(AllCNN, windows=(5,)),
    "all_cnn_b": partial(AllCNN, windows=(5, 1)),
    "all_cnn_c": partial(AllCNN, windows=(3, 3)),
    "all_cnn_c_c100": partial(AllCNN, windows=(3, 3), num_classes=100),
}
