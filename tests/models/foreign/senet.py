"""timm's SENet, up to its second stage; its names."""

from __future__ import annotations

from typing import Any

from flax_cnns.models import senet
from tests.models.foreign.builders import Case, torchvision, two_stages

GAIN = 1.0  # since blocks are added up: see `redraw`

TIMM = senet.ALIASES


def _senet() -> Any:
    torchvision()
    from timm.models import senet

    projection = dict(downsample_kernel_size=3, downsample_padding=1)
    stem = dict(inplanes=128, input_3x3=True)
    model = senet.SENet(senet.SEBottleneck, (1, 2, 1, 1), 64, 16, drop_rate=0, **projection, **stem)
    return two_stages(model, "last_linear")


CASE = Case("legacy_senet154", "timm", 48, dict(depths=(1, 2)), _senet, train=True)
