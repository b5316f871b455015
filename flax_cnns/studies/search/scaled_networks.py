"""EfficientNet's scaling applied to MobileNet v1, v2 and ResNet, as table 3 of its paper does.

Factors as `flax_cnns.models.efficientnet.compound_scale` gives them; widths are rounded to
multiples of 8 and depths up, as EfficientNet's are. The paper does not say how it rounds, nor
which ResNet-50 it takes. With v1.5, four times the depth make 14.6 GMACs here and 16.2 in table 3,
twice the width 16.1 and 14.7: it seems that the table has these two the wrong way round. MobileNet
v1 at d 1.4, w 1.2 and r 1.3 (291 pixels) makes 2.47, in the table 2.3, since 1.4 blocks are two.
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
    """MobileNet v1, its stages that much deeper, for images of `resolution` pixels a side."""
    depths = tuple(round_depth(depth * depth_mult) for depth in MobileNetV1.depths)
    size = (resolution, resolution, 3)
    return MobileNetV1(**dict(width_mult=width_mult, depths=depths, input_size=size) | fields)


def mobilenet_v2(
    *, width_mult: float, depth_mult: float, resolution: int, **fields: Any
) -> MobileNetV2:
    """MobileNet v2, likewise: the depths of all stages."""
    table = tuple(row._replace(depth=round_depth(row.depth * depth_mult)) for row in TABLE_2)
    size = (resolution, resolution, 3)
    return MobileNetV2(**dict(width_mult=width_mult, table=table, input_size=size) | fields)


def resnet(
    *,
    width_mult: float,
    depth_mult: float,
    resolution: int,
    depths: Sequence[int] = DEPTHS[50],
    **fields: Any,
) -> ResNet:
    """The ResNet of `depths` (by default ResNet-50), deeper and wider, for that many pixels."""
    depths = tuple(round_depth(depth * depth_mult) for depth in depths)
    width = round_width(ResNet.width * width_mult)
    size = (resolution, resolution, 3)
    return ResNet(**dict(depths=depths, width=width, input_size=size) | fields)
