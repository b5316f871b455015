"""timm's Xception, one block in the middle; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, identity, torchvision

GAIN = 1.0  # since blocks are added up: see `redraw`

TIMM = {"xception": "legacy_xception"}
KERAS = {"keras_xception": "Xception"}
KERAS_SHAPES = ("keras_xception",)


def _xception() -> Any:
    """Builds one block in the middle flow, with narrow layers after the stem."""
    torchvision()
    from timm.models.xception import Block, SeparableConv2d, Xception
    from torch import nn

    model = Xception(num_classes=10)
    model.block1 = Block(64, 24, 2, 2, start_with_relu=False)
    model.block2, model.block3 = Block(24, 32, 2, 2), Block(32, 48, 2, 2)
    model.block4 = Block(48, 48, 3, 1)
    model.block5 = Block(48, 64, 2, 2, grow_first=False)
    model.conv3, model.bn3 = SeparableConv2d(64, 72, 3, 1, 1), nn.BatchNorm2d(72)
    model.conv4, model.bn4 = SeparableConv2d(72, 80, 3, 1, 1), nn.BatchNorm2d(80)
    model.fc = nn.Linear(80, 10)
    return identity(model, *(f"block{i}" for i in range(6, 13)))


CASE = Case(
    "xception",
    "timm",
    80,
    dict(entry=(24, 32, 48), depth=1, exit=(48, 64), top=(72, 80)),
    _xception,
    train=True,
)
