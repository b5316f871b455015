"""EfficientNet's scaling applied to MobileNet v1, v2 and ResNet, as in table 3 of its paper.

The factors are those of `flax_cnns.models.efficientnet.compound_scale`. Widths are rounded to
multiples of 8, depths are rounded up, as in EfficientNet. The paper states neither its rounding nor
its version of ResNet-50. With v1.5, four times the depth gives 14.6 GMACs here and 16.2 in table 3;
twice the width gives 16.1 here and 14.7 in table 3. The table seems to have these two values
swapped. MobileNet v1 at d 1.4, w 1.2 and r 1.3 (291 pixels) gives 2.47 GMACs here and 2.3 in the
table, because a stage of one block, scaled by 1.4, has two blocks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax_cnns.layers import round_depth, round_width
from flax_cnns.models.mobilenet_v1 import MobileNetV1
from flax_cnns.models.mobilenet_v2 import TABLE_2, MobileNetV2
from flax_cnns.models.resnet import DEPTHS, ResNet


def mobilenet_v1(
    *, width_mult: float, depth_mult: float, resolution: int, **fields: Any
) -> MobileNetV1:
    """MobileNet v1 with scaled widths and depths, for images of `resolution` pixels a side."""
    depths = tuple(round_depth(depth * depth_mult) for depth in MobileNetV1.depths)
    size = (resolution, resolution, 3)
    scaled: dict[str, Any] = dict(width_mult=width_mult, depths=depths, input_size=size)
    return MobileNetV1(**scaled | fields)


def mobilenet_v2(
    *, width_mult: float, depth_mult: float, resolution: int, **fields: Any
) -> MobileNetV2:
    """MobileNet v2 with scaled widths and depths, for images of `resolution` pixels a side."""
    table = tuple(row._replace(depth=round_depth(row.depth * depth_mult)) for row in TABLE_2)
    size = (resolution, resolution, 3)
    scaled: dict[str, Any] = dict(width_mult=width_mult, table=table, input_size=size)
    return MobileNetV2(**scaled | fields)


def resnet(
    *,
    width_mult: float,
    depth_mult: float,
    resolution: int,
    depths: Sequence[int] = DEPTHS[50],
    **fields: Any,
) -> ResNet:
    """ResNet (by default 50) with scaled widths and depths, for `resolution` pixels a side."""
    depths = tuple(round_depth(depth * depth_mult) for depth in depths)
    width = round_width(ResNet.width * width_mult)
    size = (resolution, resolution, 3)
    scaled: dict[str, Any] = dict(depths=depths, width=width, input_size=size)
    return ResNet(**scaled | fields)
