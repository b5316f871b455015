"""Depthwise convolutions and what is built of them; and how widths and depths are rounded.

A network's field `padding` selects TensorFlow's or PyTorch's padding: `resolve_padding`.
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
    """What `Conv` takes as `padding`, of a kernel of odd size; sizes round up either way.

    `"torch"`: as much on both sides, (kernel_size - 1) / 2. `"same"`: TensorFlow's, no more than is
    needed, which at stride 2 and an even size is one row less in front. Raises `UserError` for
    another name.
    """
    if padding not in PADDINGS:
        raise UserError(f"unknown padding {padding!r}{did_you_mean(padding, PADDINGS)}")
    return (kernel_size - 1) // 2 if padding == "torch" else "SAME"


def round_width(width: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` (half of it goes up), or the next where that would be
    less than 90 % of `width`: 42.0 -> 40, 10.0 -> 16.

    So in the released code of MobileNetV2, https://arxiv.org/abs/1801.04381, and since. Raises
    `UserError` where the width is not above 0.
    """
    _check_above_zero("width", width)
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def round_depth(depth: float) -> int:
    """Blocks of a stage, rounded up (EfficientNet's released code): 2.2 -> 3. Raises `UserError`
    where the depth is not above 0."""
    _check_above_zero("depth", depth)
    return math.ceil(depth)


def _check_above_zero(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(
            f"expected a {what} above 0, got {value:g}; is {what}_mult, a factor above 0, right?"
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
    """Called inside a block: each channel on its own, kernel [k k 1 C * depth_multiplier]."""
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
    """A convolution per channel, then a 1x1 over them: [N H W C] -> [N H/stride W/stride width].

    Each channel gives `depth_multiplier` of its own, numbers c * depth_multiplier and following,
    which `pointwise` mixes. Without a norm and an activation between them, both together are one
    convolution whose kernel is [k k C width], of low rank (Chollet 2016,
    https://arxiv.org/abs/1610.02357, section 1.2); MobileNet has both between.
    """

    width: int
    conv: ModuleDef
    kernel_size: int = 3
    stride: int = 1
    depth_multiplier: int = 1
    norm: ModuleDef = NoNorm  # behind the depthwise one
    activation: Callable | None = None  # behind that
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
    """The inverted residual: 1x1 widens, depthwise k x k, 1x1 narrows, and nothing behind it.

    [N H W C] -> [N H/stride W/stride width], rounded up. Sandler et al. 2018,
    https://arxiv.org/abs/1801.04381, section 3.3. Where the stride is 1 and C is `width`, the
    input is added. No `expand` where it would not widen (expansion 1).
    """

    width: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1
    expansion: float = 6  # inner channels / C
    inner: int | None = None  # that many inner channels, whatever the expansion
    kernel_size: int = 3
    activation: Callable = nn.relu6
    # A SqueezeExcite that lacks its `inner`, which is `squeeze`; None: a fourth of C, the channels
    # that enter the block (EfficientNet).
    se: ModuleDef | None = None
    squeeze: int | None = None
    padding: str = "torch"  # or "same": `resolve_padding`
    zero_init: bool = False  # the last scale starts at 0, where there is a shortcut

    @nn.compact
    def __call__(self, x: Array, drop: DropPath | None = None) -> Array:
        channels = x.shape[-1]
        inner = self.inner or round(channels * self.expansion)
        shortcut = self.stride == 1 and channels == self.width
        zero = self.zero_init and shortcut
        last = nn.initializers.zeros if zero else nn.initializers.ones

        def branch(self, x: Array) -> Array:
            if inner != channels:
                x = self.conv(inner, (1, 1), padding=0, name="expand")(x)
                x = self.activation(self.norm(name="expand_norm")(x))
            x = _depthwise(
                self.conv, x, kernel_size=self.kernel_size, stride=self.stride, padding=self.padding
            )
            x = self.activation(self.norm(name="depthwise_norm")(x))
            if self.se is not None:
                squeeze = self.squeeze or max(1, channels // 4)
                x = self.se(inner=squeeze, name="se")(x)
            x = self.conv(self.width, (1, 1), padding=0, name="project")(x)
            return self.norm(name="project_norm", scale_init=last)(x)

        return residual(x, branch, self, x, drop) if shortcut else branch(self, x)
