"""torchvision's MobileNet v2 with few, narrow stages; timm's and Keras's names."""

from __future__ import annotations

from typing import Any

from flax_cnns.models import mobilenet_v2
from tests.models.foreign.builders import Case, torchvision

GAIN = 1.3

TIMM = mobilenet_v2.ALIASES
KERAS = {"keras_mobilenetv2": "MobileNetV2"}
KERAS_SHAPES = ("keras_mobilenetv2",)
_V2 = (mobilenet_v2.Row(1, 16, 1, 1), mobilenet_v2.Row(6, 24, 2, 2), mobilenet_v2.Row(6, 96, 2, 2))


def _mobilenet_v2() -> Any:
    return torchvision().models.MobileNetV2(
        num_classes=10, width_mult=0.5, inverted_residual_setting=[list(row) for row in _V2]
    )


CASE = Case(
    "mobilenet_v2",
    "torchvision",
    48,
    dict(width_mult=0.5, table=_V2),
    _mobilenet_v2,
    train=True,
)
