"""MobileNet v3, large and small: searched inverted residuals, some with squeeze-and-excitation.

Tables 1 and 2 of the paper. Squeeze-and-excitation always reduces to a fourth of the inner
channels, rounded to a multiple of 8, and has ReLU and a hard sigmoid. Table 2 also marks a
squeeze-and-excitation after the small network's last convolution. No code has it, and the paper's
2.5 million parameters do not include it. A dense layer stands between the pooling and the
classifier.

`mobilenet_v3_*` are torchvision's, with the paper's momentum 0.99 and epsilon 1e-3.
`mobilenetv3_*_100` are timm's, with PyTorch's 0.9 and 1e-5, and without dropout. `keras_*` have
TensorFlow's padding, momentum 0.999 and epsilon 1e-3. Keras's own first layer scales pixels from
0..255 to -1..1; our networks expect pixels that are already scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Factor, ImageSize, NotEmpty, Positive, Rate
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="Searching for MobileNetV3",
    authors="Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, Vasudevan, Le, Adam",
    year=2019,
    url="https://arxiv.org/abs/1905.02244",
)


class Row(NamedTuple):
    """A block of table 1 or 2."""

    kernel_size: Count  # of the depthwise convolution
    inner: Count  # "exp size": channels between the two 1x1
    width: Count
    se: bool
    activation: Callable
    stride: Count


RE, HS = nn.relu, nn.hard_swish
LARGE = (  # table 1
    Row(3, 16, 16, False, RE, 1),
    Row(3, 64, 24, False, RE, 2),
    Row(3, 72, 24, False, RE, 1),
    Row(5, 72, 40, True, RE, 2),
    Row(5, 120, 40, True, RE, 1),
    Row(5, 120, 40, True, RE, 1),
    Row(3, 240, 80, False, HS, 2),
    Row(3, 200, 80, False, HS, 1),
    Row(3, 184, 80, False, HS, 1),
    Row(3, 184, 80, False, HS, 1),
    Row(3, 480, 112, True, HS, 1),
    Row(3, 672, 112, True, HS, 1),
    Row(5, 672, 160, True, HS, 2),
    Row(5, 960, 160, True, HS, 1),
    Row(5, 960, 160, True, HS, 1),
)
SMALL = (  # table 2
    Row(3, 16, 16, True, RE, 2),
    Row(3, 72, 24, False, RE, 2),
    Row(3, 88, 24, False, RE, 1),
    Row(5, 96, 40, True, HS, 2),
    Row(5, 240, 40, True, HS, 1),
    Row(5, 240, 40, True, HS, 1),
    Row(5, 120, 48, True, HS, 1),
    Row(5, 144, 48, True, HS, 1),
    Row(5, 288, 96, True, HS, 2),
    Row(5, 576, 96, True, HS, 1),
    Row(5, 576, 96, True, HS, 1),
)
STEM_WIDTH = 16  # width before the blocks


class MobileNetV3(nn.Module):
    """MobileNet v3: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns the head's input f32 [N hidden] if `num_classes` is None, in training after dropout.
    Takes any H and W; sizes round up at each of the five halvings. Raises `UserError` if the images
    have other channels than `input_size`.
    """

    # architecture
    table: Annotated[Sequence[Row], NotEmpty()]
    hidden: Count  # units of the layer after the pooling
    width_mult: Factor = 1.0  # on all widths; layers.round_width rounds them
    padding: str = "torch"  # or "same", TensorFlow's: layers.resolve_padding
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.2  # before the classifier
    drop_path: Rate = 0.0  # the last block's rate is slightly lower: layers.make_drop_paths
    drop_path_mode: str = "sample"
    drop_path_schedule: str = "efficientnet"
    # numerics
    momentum: Rate = 0.99  # of BatchNorm's running statistics
    epsilon: Positive = 1e-3
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # branches with a shortcut end in a norm whose scale starts at 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    remat: bool = False  # recompute the inside of each block in the backward pass

    # Layer groups for optimizer.layer_decay, as in timm: train.optimizers.layer_exponents.
    layer_groups = (("hidden_layer", "head"),)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        conv, norm = layers.building_blocks(self, train)

        def scale(width: int) -> int:
            return layers.round_width(width * self.width_mult)

        unit = partial(layers.ConvUnit, conv=conv, norm=norm, activation=HS)
        padding = layers.resolve_padding(self.padding, 3)
        x = unit(scale(STEM_WIDTH), (3, 3), stride=2, padding=padding, name="stem")(images)  # H/2

        def run(block: nn.Module, x: Array, drop: layers.DropPath | None) -> Array:
            return block(x, drop)

        run = nn.remat(run) if self.remat else run
        drops = layers.make_drop_paths(self, [len(self.table)], train)[0]
        kernel_init = layers.get_initializer(self.kernel_init, paper=layers.he)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        se = partial(layers.SqueezeExcite, gate=nn.hard_sigmoid, kernel_init=kernel_init, **types)
        inner = 0
        for i, row in enumerate(self.table):
            row, inner = Row(*row), scale(row[1])
            block = layers.MBConv(
                scale(row.width),
                conv,
                norm,
                stride=row.stride,
                inner=inner,
                kernel_size=row.kernel_size,
                activation=row.activation,
                se=se if row.se else None,
                squeeze=layers.round_width(inner / 4),
                padding=self.padding,
                zero_init=self.zero_init,
                name=f"block{i + 1}",
            )
            x = run(block, x, layers.for_block(drops, i))
        x = unit(inner, (1, 1), name="top")(x)  # as wide as the inside of the last block
        x = layers.global_avg_pool(x)  # [N H W C] -> [N C]
        dense = partial(layers.make_head(self), kernel_init=kernel_init)
        x = HS(dense(scale(self.hidden), name="hidden_layer")(x))
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, x, dropout=dropout)


_LARGE = partial(MobileNetV3, table=LARGE, hidden=1280)
_SMALL = partial(MobileNetV3, table=SMALL, hidden=1024)
_TIMM: dict[str, Any] = dict(momentum=0.9, epsilon=1e-5, dropout=0.0)
_KERAS: dict[str, Any] = dict(padding="same", momentum=0.999)
VARIANTS = {
    "mobilenet_v3_large": _LARGE,
    "mobilenet_v3_small": _SMALL,
    "mobilenetv3_large_100": partial(_LARGE, **_TIMM),
    "mobilenetv3_small_100": partial(_SMALL, **_TIMM),
    "keras_mobilenetv3large": partial(_LARGE, **_KERAS),
    "keras_mobilenetv3small": partial(_SMALL, **_KERAS),
}
SOURCES = {
    "mobilenet_v3_large": ("torchvision",),
    "mobilenet_v3_small": ("torchvision",),
    "mobilenetv3_large_100": ("timm",),
    "mobilenetv3_small_100": ("timm",),
    "keras_mobilenetv3large": ("keras",),
    "keras_mobilenetv3small": ("keras",),
}
