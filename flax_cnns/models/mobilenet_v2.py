"""MobileNet v2: inverted residuals, wide inside and narrow where they are added.

Table 2 of the paper. The rule for `width_mult` is the released code's, which everybody follows:
widths are rounded to multiples of 8 and never by more than 10 % down (`layers.round_width`), and
the last convolution keeps its 1280 channels below 1 (the paper, section 4). Of parameters the paper
has 3.4 million, and 6.9 million at 1.4; the authors' own table of the released networks 3.47 and
6.06, as many as there are here without the scales and shifts of the norms, 3.50 and 6.11 with them.
GluonCV's networks, some tables' source, differ: they expand in the first block too, cut widths off,
and have no bias in the classes, 3,504,960 in place of 3,504,872 parameters.

`mobilenet_v2` is torchvision's; timm's `mobilenetv2_100` computes the same without its dropout.
The other widths are timm's, under its names and under torchvision's. `keras_mobilenetv2` has
TensorFlow's padding, epsilon 1e-3 and momentum 0.999. The head starts with LeCun's variance
whatever `kernel_init` is; the paper names no first values.
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
    """A stage of table 2, under the paper's letters t, c, n, s."""

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
STEM_WIDTH, TOP_WIDTH = 32, 1280  # widths in front of the stages and behind them


class MobileNetV2(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N C] if it is None.

    Any H and W; sizes round up at each of the five halvings. Raises `UserError` where C is not that
    of `input_size`.
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
    drop_path: Rate = 0.0  # the last block's rate of dropping, nearly: layers.make_drop_paths
    drop_path_mode: str = "sample"
    drop_path_schedule: str = "efficientnet"
    # numerics
    momentum: Rate = 0.9  # of the running statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"
    zero_init: bool = False  # the last scale of each branch with a shortcut starts at 0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronised BatchNorm
    # compilation
    scan: bool = False  # the repeats of a stage as one block under nn.scan: layers.Stage
    remat: bool = False  # compute the inside of each block again in the backward pass

    # Layers of optimizer.layer_decay, as in timm: see train.optimizers.layer_exponents.
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
# Names of ours -> timm's.
ALIASES = {f"mobilenet_v2_{n}": f"mobilenetv2_{n}" for n in _WIDTHS if n != "025"}
SOURCES = (
    {"mobilenet_v2": ("torchvision",), "mobilenetv2_100": ("timm",)}
    | {name: ("timm",) for pair in ALIASES.items() for name in pair}
    | {"keras_mobilenetv2": ("keras",)}
)
