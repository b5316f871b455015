"""Depthwise separable convolutions and inverted residuals; rounding of widths and depths.

A network's field `padding` selects TensorFlow's or PyTorch's padding: see `resolve_padding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.drop_path import DropPath, residual
from flax_cnns.layers.norm import NoNorm
from flax_cnns.types import Array, ModuleDef

PADDINGS = ("torch", "same")


def resolve_padding(padding: str, kernel_size: int) -> int | str:
    """Returns the argument `padding` of `Conv` for an odd kernel size.

    "torch" pads both sides by (kernel_size - 1) / 2. "same" is TensorFlow's padding, which is no
    larger than needed: at stride 2 and an even size, one row less at the top. Both round output
    sizes up. Raises `UserError` for another name.
    """
    if padding not in PADDINGS:
        raise UserError(f"unknown padding {padding!r}{did_you_mean(padding, PADDINGS)}")
    return (kernel_size - 1) // 2 if padding == "torch" else "SAME"


def round_width(width: float, divisor: int = 8) -> int:
    """Returns the multiple of `divisor` nearest to `width`: 42.0 -> 40.

    A width halfway between two multiples is rounded up. If the result were below 90 % of `width`,
    the next multiple is returned: 10.0 -> 16. This is the rule of MobileNetV2's released code,
    https://arxiv.org/abs/1801.04381, and of later networks. Raises `UserError` if the width is not
    above 0.
    """
    _check_above_zero("width", width)
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def round_depth(depth: float) -> int:
    """Returns a stage's number of blocks, rounded up as in EfficientNet's released code: 2.2 -> 3.

    Raises `UserError` if the depth is not above 0.
    """
    _check_above_zero("depth", depth)
    return math.ceil(depth)


def _check_above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(
            f"expected a {name} above 0, got {value:g}; {name}_mult must be a factor above 0"
        )


def _depthwise(
    conv: ModuleDef,
    x: Array,
    *,
    kernel_size: int,
    stride: int,
    padding: str,
    depth_multiplier: int = 1,
) -> Array:
    """Applies the layer "depthwise", kernel [k k 1 C * depth_multiplier], of the calling block."""
    channels = x.shape[-1]
    return conv(
        channels * depth_multiplier,
        (kernel_size, kernel_size),
        strides=stride,
        padding=resolve_padding(padding, kernel_size),
        feature_group_count=channels,
        name="depthwise",
    )(x)


class SeparableConv(nn.Module):
    """A depthwise and then a 1x1 convolution: [N H W C] -> [N H/stride W/stride width].

    The depthwise convolution makes `depth_multiplier` channels from each channel c, beginning at
    channel c * depth_multiplier. The 1x1 convolution `pointwise` mixes all channels. Without a norm
    and an activation in between, the two convolutions equal one convolution whose kernel
    [k k C width] has a low rank (Chollet 2016, https://arxiv.org/abs/1610.02357, section 1.2).
    MobileNet has a norm and an activation in between.
    """

    width: int
    conv: ModuleDef
    kernel_size: int = 3
    stride: int = 1
    depth_multiplier: int = 1
    norm: ModuleDef = NoNorm  # after the depthwise convolution
    activation: Callable | None = None  # after `norm`
    padding: str = "torch"  # or "same": `resolve_padding`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _depthwise(
            self.conv,
            x,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            depth_multiplier=self.depth_multiplier,
        )
        x = self.norm(name="depthwise_norm")(x)
        x = x if self.activation is None else self.activation(x)
        return self.conv(self.width, (1, 1), padding=0, name="pointwise")(x)


class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion, k x k depthwise convolution, linear 1x1 projection.

    [N H W C] -> [N H/stride W/stride width], rounded up. Sandler et al. 2018,
    https://arxiv.org/abs/1801.04381, section 3.3. The input is added if the stride is 1 and C is
    `width`. The layer `expand` is left out if it would not change the width (expansion 1).
    """

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    expansion: float = 6  # inner channels / C
    inner: int | None = None  # the number of inner channels; overrides `expansion`
    kernel_size: int = 3
    activation: Callable = nn.relu6
    se: ModuleDef | None = None  # a partial of SqueezeExcite without `inner`
    squeeze: int | None = None  # `inner` of `se`; None: C / 4 (EfficientNet)
    padding: str = "torch"  # or "same": `resolve_padding`
    zero_init: bool = False  # in a block with a shortcut, the last norm's scale starts at 0

    @nn.compact
    def __call__(self, x: Array, drop: DropPath | None = None) -> Array:
        channels = x.shape[-1]
        inner = self.inner or round(channels * self.expansion)
        shortcut = self.stride == 1 and channels == self.width
        zero = self.zero_init and shortcut
        last_scale = nn.initializers.zeros if zero else nn.initializers.ones

        def branch(block: MBConv, x: Array) -> Array:
            if inner != channels:
                x = block.conv(inner, (1, 1), padding=0, name="expand")(x)
                x = block.activation(block.norm(name="expand_norm")(x))
            x = _depthwise(
                block.conv,
                x,
                kernel_size=block.kernel_size,
                stride=block.stride,
                padding=block.padding,
            )
            x = block.activation(block.norm(name="depthwise_norm")(x))
            if block.se is not None:
                squeeze = block.squeeze or max(1, channels // 4)
                x = block.se(inner=squeeze, name="se")(x)
            x = block.conv(block.width, (1, 1), padding=0, name="project")(x)
            return block.norm(name="project_norm", scale_init=last_scale)(x)

        return residual(x, branch, self, x, drop) if shortcut else branch(self, x)
