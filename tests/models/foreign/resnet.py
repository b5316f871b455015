"""torchvision's ResNet-18; Keras's names."""

from __future__ import annotations

from tests.models.foreign.builders import Case, of_torchvision

GAIN = 1.0  # since blocks are added up: see `redraw`

KERAS = {f"keras_resnet{n}": f"ResNet{n}" for n in (50, 101, 152)}
KERAS_SHAPES = ("keras_resnet50",)


CASE = Case("resnet18", "torchvision", 64, build=of_torchvision("resnet18"), train=True)
