"""torchvision's ConvNeXt with two narrow stages; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision

GAIN = 1.0  # since blocks are added up: see `redraw`

KERAS = {
    f"convnext_{size}": f"ConvNeXt{keras_size}"
    for size, keras_size in (
        ("tiny", "Tiny"),
        ("small", "Small"),
        ("base", "Base"),
        ("large", "Large"),
        ("xlarge", "XLarge"),
    )
}
KERAS_FIELDS = {"include_preprocessing": False}
KERAS_SHAPES = ("convnext_tiny",)


def _convnext() -> Any:
    """Two narrow stages."""
    convnext = torchvision().models.convnext
    stages = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 1)]
    return convnext.ConvNeXt(stages, num_classes=10)


CASE = Case(
    "convnext_tiny", "torchvision", 36, dict(depths=(2, 1), width=16), _convnext, train=True
)
