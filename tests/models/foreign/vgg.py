"""torchvision's VGG, narrow; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, narrow, torchvision

KERAS = {"vgg16": "VGG16", "vgg19": "VGG19"}
KERAS_SHAPES = ("vgg16",)


def _vgg11_bn() -> Any:
    vgg = torchvision().models.vgg
    layers = [8, "M", 16, "M", 24, 24, "M", 32, 32, "M", 32, 32, "M"]
    features = vgg.make_layers(layers, batch_norm=True)
    return narrow(vgg.VGG(features, init_weights=False), 32 * 7 * 7)


CASE = Case(
    "vgg11_bn",
    "torchvision",
    64,
    dict(widths=(8, 16, 24, 32, 32), hidden=(64, 64)),
    _vgg11_bn,
    train=True,
)
