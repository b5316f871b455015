"""torchvision's DenseNet with few, narrow layers; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision

KERAS = {f"keras_densenet{n}": f"DenseNet{n}" for n in (121, 169, 201)}
KERAS_SHAPES = ("keras_densenet121",)


def _densenet() -> Any:
    return torchvision().models.DenseNet(
        growth_rate=8, block_config=(2, 3, 2, 2), num_init_features=16, num_classes=10
    )


CASE = Case(
    "densenet121",
    "torchvision",
    64,
    dict(depths=(2, 3, 2, 2), growth_rate=8),
    _densenet,
    train=True,
)
