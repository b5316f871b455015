"""torchvision's MobileNet v3 with its first blocks only; Keras's names."""

from __future__ import annotations

from typing import Any

from flax_cnns.models import mobilenet_v3
from tests.models.foreign.builders import Case, torchvision

GAIN = 1.65

KERAS = {"keras_mobilenetv3large": "MobileNetV3Large", "keras_mobilenetv3small": "MobileNetV3Small"}
KERAS_FIELDS = {"include_preprocessing": False}
KERAS_SHAPES = ("keras_mobilenetv3small",)
_V3 = mobilenet_v3.SMALL[:5]


def _mobilenet_v3() -> Any:
    theirs = torchvision().models.mobilenetv3
    entering = [mobilenet_v3.STEM_WIDTH, *(row.width for row in _V3)]
    rows = []
    for row, width in zip(_V3, entering):
        name = "HS" if row.activation is mobilenet_v3.HS else "RE"
        given = (width, row.kernel_size, row.inner, row.width, row.se, name, row.stride, 1, 1.0)
        rows.append(theirs.InvertedResidualConfig(*given))
    return theirs.MobileNetV3(rows, last_channel=64, num_classes=10)


CASE = Case(
    "mobilenet_v3_small",
    "torchvision",
    48,
    dict(table=_V3, hidden=64),
    _mobilenet_v3,
    train=True,
)
