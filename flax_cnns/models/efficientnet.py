"""EfficientNet B0 to B8, L2 and Lite0 to Lite4: one searched network, scaled in three ways at once.

Two factors turn `B0`, table 1 of the paper, into every network of this file. `make_efficientnet`
takes any factors. `compound_scale` computes those of the paper's formula, equation 3, with alpha
1.2 (depth), beta 1.1 (width) and gamma 1.15 (resolution), the result of the paper's grid search at
phi = 1. The released networks do not follow the formula: they come from a handmade table (`POINTS`;
Tan & Le's code), which deepens less than the formula as networks grow. The table below compares
both, at the phi whose resolution is nearest:

    network   phi   formula: width, depth, resolution   table: width, depth, resolution
    B1        0.5   1.05    1.10    240                 1.0     1.1     240
    B2        1     1.10    1.20    258                 1.1     1.2     260
    B3        2     1.21    1.44    296                 1.2     1.4     300
    B4        3.8   1.44    2.00    381                 1.4     1.8     380
    B5        5     1.61    2.49    451                 1.6     2.2     456
    B6        6     1.77    2.99    518                 1.8     2.6     528
    B7        7     1.95    3.58    596                 2.0     3.1     600

B8 (https://arxiv.org/abs/1911.09665) and L2 (https://arxiv.org/abs/1911.04252) come from later
papers. Lite is the same authors' family for integer arithmetic: ReLU6, no squeeze-and-excitation,
fixed widths of stem and top, fixed depths of the first and last stage.

Plain names are torchvision's networks (B2 for 288 pixels, where the table has 260) and timm's. They
have symmetric padding, and PyTorch's default BatchNorm except in torchvision's B5 to B7. `tf_` and
`keras_` networks compute as released: TensorFlow's padding, epsilon 1e-3, momentum 0.99.
`tf_efficientnet_lite3` and `tf_efficientnet_lite4` are for 280 and 300 pixels, as released; timm
has 300 and 380. Keras's networks begin with layers that take images from 0 to 255 and, with its
ImageNet weights, turn them into (x / 255 - mean) / std. Our networks begin after these layers and
expect images that are scaled in this way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.fields import Classes, Count, Factor, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
    authors="Tan, Le",
    year=2019,
    url="https://arxiv.org/abs/1905.11946",
)


class Row(NamedTuple):
    """A stage of table 1."""

    expansion: int
    kernel_size: int  # of the depthwise convolution
    stride: int  # of the first block
    width: int
    depth: int


B0 = (
    Row(1, 3, 1, 16, 1),
    Row(6, 3, 2, 24, 2),
    Row(6, 5, 2, 40, 2),
    Row(6, 3, 2, 80, 3),
    Row(6, 5, 1, 112, 3),
    Row(6, 5, 2, 192, 4),
    Row(6, 3, 1, 320, 1),
)
STEM_WIDTH, TOP_WIDTH = 32, 1280  # widths before and after the stages


class Scale(NamedTuple):
    """Factors on B0's widths, depths and resolution."""

    width_mult: float
    depth_mult: float
    resolution_mult: float


def compound_scale(phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> Scale:
    """Returns equation 3's factors: depth alpha^phi, width beta^phi, resolution gamma^phi.

    The paper's constraint is alpha * beta^2 * gamma^2 ~ 2 (here 1.92). Operations grow with depth,
    width^2 and resolution^2, so under this constraint they grow about 2^phi times. `phi` may be any
    number, such as 0.5 or -1. Raises `UserError` if alpha, beta or gamma is below 1.
    """
    if min(alpha, beta, gamma) < 1:
        raise UserError(
            f"alpha, beta and gamma must be at least 1, got {alpha}, {beta} and {gamma}; "
            f"for a smaller network use a negative phi"
        )
    return Scale(width_mult=beta**phi, depth_mult=alpha**phi, resolution_mult=gamma**phi)


# The released code's initializers, for `kernel_init="paper"`.
paper_init = layers.tensorflow_fan_out("normal")
paper_head_init = variance_scaling(1 / 3, "fan_out", "uniform")  # within +- 1 / sqrt(classes)


class EfficientNet(nn.Module):
    """EfficientNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W; sizes round up at
    each of the five halvings. Widths are rounded to multiples of 8 (`layers.round_width`), depths
    are rounded up. Raises `UserError` if the images have other channels than `input_size`, or if
    `strides` does not have one entry for the stem and one for each stage.
    """

    # architecture
    width_mult: Factor = 1.0
    depth_mult: Factor = 1.0
    strides: tuple[Count, ...] = (2, *(row.stride for row in B0))  # of the stem and the stages
    fixed_ends: bool = False  # Lite: stem and top keep their widths, end stages their depths
    activation: Callable = nn.silu
    # Reduces to a fourth of a block's input channels; None in Lite.
    se: ModuleDef | None = layers.SqueezeExcite
    padding: str = "torch"  # or "same": layers.resolve_padding
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"  # or another of layers.make_norm's, but "group" does not fit the widths
    # head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.2  # of the pooled features
    drop_path: Rate = 0.2  # the last block's rate is slightly lower: layers.make_drop_paths
    drop_path_mode: str = "sample"
    drop_path_schedule: str = "efficientnet"
    # numerics
    momentum: Rate = 0.9  # of BatchNorm's running statistics
    epsilon: Positive = 1e-5
    kernel_init: str | Callable = "he"  # "paper": `paper_init`
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
        depths, widths, (stem_width, top_width) = self.compute_sizes()
        if len(self.strides) != len(B0) + 1:
            raise UserError(
                f"expected {len(B0) + 1} strides, of the stem and the stages, got {self.strides}"
            )
        stem_stride, *strides = self.strides
        conv, norm = layers.building_blocks(self, train, paper=paper_init)
        unit = partial(layers.ConvUnit, conv=conv, norm=norm, activation=self.activation)
        padding = layers.resolve_padding(self.padding, 3)
        stem_init = layers.get_initializer(self.kernel_init, paper=layers.he)
        stem = partial(unit, conv=partial(conv, kernel_init=stem_init))
        x = stem(stem_width, (3, 3), stride=stem_stride, padding=padding, name="stem")(images)
        drops = layers.make_drop_paths(self, depths, train)
        se = self.se and partial(
            self.se,
            activation=self.activation,
            kernel_init=layers.get_initializer(self.kernel_init, paper=paper_init),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        stage = partial(layers.Stage, scan=self.scan, remat=self.remat)
        for i, row in enumerate(B0):  # from H/2: H/2, H/4, H/8, H/16, H/16, H/32, H/32
            block = partial(
                layers.MBConv,
                widths[i],
                norm=norm,
                expansion=row.expansion,
                kernel_size=row.kernel_size,
                activation=self.activation,
                se=se,
                padding=self.padding,
                zero_init=self.zero_init,
            )
            x = stage(block, conv, depths[i], strides[i], name=f"stage{i + 1}")(x, drops[i])
        x = unit(top_width, (1, 1), name="top")(x)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, x, dropout=dropout, paper=paper_head_init)

    def compute_sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Returns B0's sizes after scaling: stage depths, stage widths, [stem width, top width]."""
        at_ends = 1.0 if self.fixed_ends else self.width_mult
        last = len(B0) - 1
        depths = [
            row.depth
            if self.fixed_ends and i in (0, last)
            else layers.round_depth(row.depth * self.depth_mult)
            for i, row in enumerate(B0)
        ]
        widths = [layers.round_width(row.width * self.width_mult) for row in B0]
        return (
            depths,
            widths,
            [layers.round_width(width * at_ends) for width in (STEM_WIDTH, TOP_WIDTH)],
        )


def make_efficientnet(
    *, width_mult: float, depth_mult: float, resolution: int, **fields: Any
) -> EfficientNet:
    """Builds B0, scaled by these factors, for square images of `resolution` pixels.

        scale = compound_scale(3)
        make_efficientnet(width_mult=scale.width_mult, depth_mult=scale.depth_mult,
                          resolution=round(224 * scale.resolution_mult), num_classes=10)

    Raises `UserError` if `resolution` is not a whole number.
    """
    if not isinstance(resolution, Integral):
        raise UserError(f"resolution must be a whole number of pixels, got {resolution}; round it")
    size = (resolution, resolution, 3)
    return EfficientNet(width_mult, depth_mult, **{"input_size": size} | fields)


class Point(NamedTuple):
    """A row of the released code's table: factors, image size and dropout."""

    width_mult: float
    depth_mult: float
    resolution: int
    dropout: float


POINTS = {
    "b0": Point(1.0, 1.0, 224, 0.2),
    "b1": Point(1.0, 1.1, 240, 0.2),
    "b2": Point(1.1, 1.2, 260, 0.3),
    "b3": Point(1.2, 1.4, 300, 0.3),
    "b4": Point(1.4, 1.8, 380, 0.4),
    "b5": Point(1.6, 2.2, 456, 0.4),
    "b6": Point(1.8, 2.6, 528, 0.5),
    "b7": Point(2.0, 3.1, 600, 0.5),
    "b8": Point(2.2, 3.6, 672, 0.5),
    "l2": Point(4.3, 5.3, 800, 0.5),
    "lite0": Point(1.0, 1.0, 224, 0.2),
    "lite1": Point(1.0, 1.1, 240, 0.2),
    "lite2": Point(1.1, 1.2, 260, 0.3),
    "lite3": Point(1.2, 1.4, 280, 0.3),
    "lite4": Point(1.4, 1.8, 300, 0.3),
}
_TF: dict[str, Any] = dict(padding="same", momentum=0.99, epsilon=1e-3, kernel_init="paper")
_TV_LARGE: dict[str, Any] = dict(momentum=0.99, epsilon=1e-3)  # torchvision's, from B5 on


def _variant(name: str, resolution: int | None = None, **fields: Any) -> partial:
    point = POINTS[name]
    size = resolution or point.resolution
    if name.startswith("lite"):
        fields |= dict(fixed_ends=True, activation=nn.relu6, se=None)
    return partial(
        EfficientNet,
        width_mult=point.width_mult,
        depth_mult=point.depth_mult,
        input_size=(size, size, 3),
        dropout=point.dropout,
        **fields,
    )


VARIANTS = {
    "efficientnet_b0": _variant("b0"),
    "efficientnet_b1": _variant("b1"),
    "efficientnet_b2": _variant("b2", 288),
    "efficientnet_b3": _variant("b3"),
    "efficientnet_b4": _variant("b4"),
    "efficientnet_b5": _variant("b5", **_TV_LARGE),
    "efficientnet_b6": _variant("b6", **_TV_LARGE),
    "efficientnet_b7": _variant("b7", **_TV_LARGE),
    "efficientnet_b8": _variant("b8"),
    "efficientnet_l2": _variant("l2"),
    "efficientnet_lite0": _variant("lite0"),
    "efficientnet_lite1": _variant("lite1"),
    "efficientnet_lite2": _variant("lite2"),
    "efficientnet_lite3": _variant("lite3", 300),
    "efficientnet_lite4": _variant("lite4", 380),
    **{f"tf_efficientnet_{name}": _variant(name, **_TF) for name in POINTS},
    **{f"keras_efficientnetb{i}": _variant(f"b{i}", **_TF) for i in range(8)},
}
SOURCES = (
    {f"efficientnet_b{i}": ("torchvision",) for i in range(8)}
    | {f"efficientnet_{size}": ("timm",) for size in ("b8", "l2")}
    | {f"{tf}efficientnet_lite{i}": ("timm",) for tf in ("", "tf_") for i in range(5)}
    | {f"tf_efficientnet_lite{i}": ("timm", "efficientnet_lite") for i in range(3)}
    | {f"tf_efficientnet_{size}": ("timm",) for size in (*(f"b{i}" for i in range(9)), "l2")}
    | {f"keras_efficientnetb{i}": ("keras",) for i in range(8)}
)
