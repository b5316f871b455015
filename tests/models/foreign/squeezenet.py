"""torchvision's SqueezeNet."""

from __future__ import annotations

from tests.models.foreign.builders import Case, of_torchvision

CASE = Case("squeezenet1_1", "torchvision", 33, build=of_torchvision("squeezenet1_1"))
