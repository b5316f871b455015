"""MobileNet v2: inverted residuals, which are wide inside and narrow where they are added.

Table 2 of the paper. The rule for `width_mult` is that of the released code, which torchvision,
timm and Keras follow: widths are rounded to multiples of 8, and down by at most 10 %
(`layers.round_width`), and the last convolution keeps its 1280 channels if `width_mult` is below 1
(the paper, section 4). The paper states 3.4 million parameters, and 6.9 million at 1.4. The
authors' own table of the released networks has 3.47 and 6.06. That is our count without the scales
and shifts of the norms; with them it is 3.50 and 6.11. GluonCV's networks, the source of some
tables, differ: they expand in the first block too, truncate widths, and have no bias in the
classifier. They have 3,504,960 instead of 3,504,872 parameters.

`mobilenet_v2` is torchvision's; timm's `mobilenetv2_100` computes the same without its dropout. The
other widths are timm's, under timm's names and under names in torchvision's style.
`keras_mobilenetv2` has TensorFlow's padding, epsilon 1e-3 and momentum 0.999. The head starts with
LeCun's variance whatever `kernel_init` is; the paper gives no initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.models.fields import Classes, Count, Factor, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, Paper

PAPER = Paper(
    title="MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    authors="Sandler, Howard, Zhu, Zhmoginov, Chen",
    year=2018,
    url="https://arxiv.org/abs/1801.04381",
)


class Row(NamedTuple):
    """A stage of table 2: the paper's t, c, n and s."""

    expansion: Count
    width: Count
    depth: Count
    stride: Count  # of the first block


TABLE_2 = (
    Row(1, 16, 1, 1),
    Row(6, 24, 2, 2),
    Row(6, 32, 3, 2),
    Row(6, 64, 4, 2),
    Row(6, 96, 3, 1),
    Row(6, 160, 3, 2),
    Row(6, 320, 1, 1),
)
STEM_WIDTH, TOP_WIDTH = 32, 1280  # widths before and after the stages


class MobileNetV2(nn.Module):
    """MobileNet v2: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W; sizes round up at
    each of the five halvings. Raises `UserError` if the images have other channels than
    `input_size`.
    """

    # architecture
    width_mult: Factor = 1.0
    table: Sequence[Row] = TABLE_2
    activation: Callable = nn.relu6
    padding: str = "torch"  # or "same", TensorFlow's: layers.resolve_padding
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.2  # of the pooled features
    drop_path: Rate = 0.0  # the last block's rate is slightly lower: layers.make_drop_paths
    drop_path_mode: str = "sample"
    drop_path_schedule: str = "efficientnet"
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's running statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # branches with a shortcut end in a norm whose scale starts at 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    scan: bool = False  # run a stage's identical blocks under nn.scan: layers.Stage
    remat: bool = False  # recompute the inside of each block in the backward pass

    # Layer groups for optimizer.layer_decay, as in timm: train.optimizers.layer_exponents.
    layer_groups = (("top", "below"),)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        layers.check_images(images, self.input_size)
        rows = [Row(*row) for row in self.table]
        conv, norm = layers.building_blocks(self, train)
        unit = partial(layers.ConvUnit, conv=conv, norm=norm, activation=self.activation)
        width = layers.round_width(STEM_WIDTH * self.width_mult)
        sides = layers.resolve_padding(self.padding, 3)
        x = unit(width, (3, 3), stride=2, padding=sides, name="stem")(images)
        drops = layers.make_drop_paths(self, [row.depth for row in rows], train)
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, row in enumerate(rows):  # H/2, H/4, H/8, H/16, H/16, H/32, H/32
            block = partial(
                layers.MBConv,
                layers.round_width(row.width * self.width_mult),
                norm=norm,
                expansion=row.expansion,
                activation=self.activation,
                padding=self.padding,
                zero_init=self.zero_init,
            )
            x = stage(block, conv, row.depth, row.stride, name=f"stage{i + 1}")(x, drops[i])
        x = unit(layers.round_width(TOP_WIDTH * max(1.0, self.width_mult)), (1, 1), name="top")(x)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, x, dropout=dropout)


_WIDTHS = {"025": 0.25, "035": 0.35, "050": 0.5, "075": 0.75, "140": 1.4}
_TIMM = {n: partial(MobileNetV2, width_mult=width, dropout=0.0) for n, width in _WIDTHS.items()}
VARIANTS = {
    "mobilenet_v2": partial(MobileNetV2),
    "mobilenetv2_100": partial(MobileNetV2, dropout=0.0),
    **{f"mobilenet_v2_{n}": variant for n, variant in _TIMM.items()},
    **{f"mobilenetv2_{n}": variant for n, variant in _TIMM.items() if n != "025"},
    "keras_mobilenetv2": partial(
        MobileNetV2, padding="same", momentum=0.999, epsilon=1e-3, dropout=0.0
    ),
}
# Our names -> timm's.
ALIASES = {f"mobilenet_v2_{n}": f"mobilenetv2_{n}" for n in _WIDTHS if n != "025"}
SOURCES = (
    {"mobilenet_v2": ("torchvision",), "mobilenetv2_100": ("timm",)}
    | {name: ("timm",) for pair in ALIASES.items() for name in pair}
    | {"keras_mobilenetv2": ("keras",)}
)
