"""torchvision's wide ResNet, up to its second stage."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision, two_stages

GAIN = 1.0  # since blocks are added up: see `redraw`


def _wide_resnet() -> Any:
    resnet = torchvision().models.resnet
    return two_stages(resnet.ResNet(resnet.Bottleneck, (2, 2, 1, 1), width_per_group=128), "fc")


CASE = Case("wide_resnet50_2", "torchvision", 48, dict(depths=(2, 2)), _wide_resnet, train=True)
