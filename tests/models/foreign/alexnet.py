"""torchvision's AlexNet with narrow dense layers."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, narrow, torchvision


def _alexnet() -> Any:
    return narrow(torchvision().models.alexnet(), 256 * 6 * 6)


CASE = Case("alexnet", "torchvision", 127, dict(hidden=64), _alexnet)
