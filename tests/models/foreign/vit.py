"""torchvision's Vision Transformer, two narrow blocks; timm's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision

GAIN = 1.0  # since blocks are added up: see `redraw`

TIMM = {"vit_tiny16": "vit_tiny_patch16_224", "vit_small16": "vit_small_patch16_224"}


def _vit() -> Any:
    """Builds two narrow blocks."""
    vit = torchvision().models.VisionTransformer
    return vit(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=10)


CASE = Case(
    "vit_b_16",
    "torchvision",
    32,
    dict(patch=8, depth=2, width=48, heads=3, input_size=(32, 32, 3)),
    _vit,
    train=True,
)
