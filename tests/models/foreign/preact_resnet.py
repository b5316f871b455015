"""timm's ResNetV2, narrow and short; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision

GAIN = 1.0  # since blocks are added up: see `redraw`

TIMM = {f"preact_resnet{n}": f"resnetv2_{n}" for n in (50, 101, 152)}
KERAS = {f"keras_resnet{n}v2": f"ResNet{n}V2" for n in (50, 101, 152)}
KERAS_SHAPES = ("keras_resnet50v2",)


def _preact_resnet() -> Any:
    """Builds a narrow and short network."""
    torchvision()
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    layers = dict(conv_layer=create_conv2d, norm_layer=BatchNormAct2d)
    return ResNetV2((1, 2), channels=(64, 128), stem_chs=16, num_classes=10, **layers)


CASE = Case("resnetv2_50", "timm", 64, dict(depths=(1, 2), width=16), _preact_resnet, train=True)
