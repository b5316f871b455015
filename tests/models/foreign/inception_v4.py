"""timm's Inception-v4 with each block once."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, of_timm


def _inception_v4() -> Any:
    """The stem and each block once."""
    from torch import nn

    model = of_timm("inception_v4")()
    once = (0, 1, 2, 3, 4, 5, 6, 10, 11, 18, 19)
    model.features = nn.Sequential(*(model.features[i] for i in once))
    return model


CASE = Case(
    "inception_v4",
    "timm",
    75,
    dict(depths=(1, 1, 1)),
    _inception_v4,
)
