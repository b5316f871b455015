"""timm's Inception-ResNet-v2 with each block once; Keras's names."""

from __future__ import annotations

from tests.models.foreign.builders import Case, of_timm

KERAS = {"keras_inception_resnet_v2": "InceptionResNetV2"}
KERAS_SHAPES = ("keras_inception_resnet_v2",)


CASE = Case(
    "inception_resnet_v2",
    "timm",
    75,
    dict(depths=(1, 1, 1)),
    of_timm(
        "inception_resnet_v2",
        *(f"repeat.{i}" for i in range(1, 10)),
        *(f"repeat_1.{i}" for i in range(1, 20)),
        *(f"repeat_2.{i}" for i in range(1, 9)),
    ),
)
