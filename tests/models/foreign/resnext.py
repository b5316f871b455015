"""torchvision's ResNeXt, up to its second stage."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision, two_stages

GAIN = 1.0  # since blocks are added up: see `redraw`


def _resnext() -> Any:
    resnet = torchvision().models.resnet
    groups = dict(groups=32, width_per_group=4)
    return two_stages(resnet.ResNet(resnet.Bottleneck, (2, 2, 1, 1), **groups), "fc")


CASE = Case("resnext50_32x4d", "torchvision", 48, dict(depths=(2, 2)), _resnext, train=True)
