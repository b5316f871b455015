"""timm's NASNet-A, two stages of two narrow cells; Keras's names."""

from __future__ import annotations

from typing import Any

from tests.models.foreign.builders import Case, torchvision

GAIN = 1.0  # since blocks are added up: see `redraw`

KERAS = {"keras_nasnetlarge": "NASNetLarge", "keras_nasnetmobile": "NASNetMobile"}
KERAS_SHAPES = ("keras_nasnetmobile",)


def _nasnet() -> Any:
    """Builds two stages of two narrow cells."""
    torchvision()
    from timm.models.nasnet import NASNetALarge
    from torch import nn
    from torch.nn import functional

    model = NASNetALarge(num_classes=10, stem_size=8, num_features=24 * 8)
    kept = [getattr(model, f"cell_{i}") for i in (0, 1, 6, 7)]
    for i in range(18):
        delattr(model, f"cell_{i}")
    for i, cell in enumerate(kept):
        setattr(model, f"cell_{i}", cell)
    del model.reduction_cell_1
    model.last_linear = nn.Linear(12 * 8, 10)

    def features(x):
        first = model.conv0(x)
        p = model.cell_stem_0(first)
        x = model.cell_stem_1(first, p)
        for i, cell in enumerate(kept):
            if i == 2:
                x = model.reduction_cell_0(x, p)
            x, p = cell(x, p), x
        return functional.relu(x)

    model.forward_features = features
    return model


CASE = Case("nasnetalarge", "timm", 64, dict(depths=(2, 2), width=8, stem_width=8), _nasnet)
