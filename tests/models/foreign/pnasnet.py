"""timm's PNASNet-5, the stem and two cells."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, of_timm

GAIN = 1.0  # since blocks are added up: see `redraw`


def _pnasnet() -> Any:
    """Builds the stem and two cells."""
    from torch import nn
    from torch.nn import functional

    model = of_timm("pnasnet5large")()
    for i in range(2, 12):
        delattr(model, f"cell_{i}")
    model.last_linear = nn.Linear(1080, 10)

    def features(x):
        first = model.conv_0(x)
        second = model.cell_stem_0(first)
        third = model.cell_stem_1(first, second)
        last = model.cell_0(second, third)
        return functional.relu(model.cell_1(third, last))

    model.forward_features = features
    return model


CASE = Case("pnasnet5large", "timm", 64, dict(depths=(2,)), _pnasnet)
