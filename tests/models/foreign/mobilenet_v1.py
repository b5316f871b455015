"""timm's MobileNet v1, narrow and with a short stage 4; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, identity, torchvision

TIMM = {"mobilenet_v1_100": "mobilenetv1_100"}
KERAS = {"keras_mobilenet": "MobileNet"}
KERAS_SHAPES = ("keras_mobilenet",)


def _mobilenet_v1() -> Any:
    """Narrow, and with two blocks in the longest stage."""
    torchvision()
    from timm.models.efficientnet import _gen_mobilenet_v1

    model = _gen_mobilenet_v1("mobilenetv1_100", 0.25, num_classes=10)
    return identity(model, *(f"blocks.3.{i}" for i in range(2, 6)))


CASE = Case(
    "mobilenet_v1_100",
    "timm",
    64,
    dict(width_mult=0.25, depths=(1, 2, 2, 2, 2)),
    _mobilenet_v1,
    train=True,
)
