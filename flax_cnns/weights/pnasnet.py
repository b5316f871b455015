"""PNASNet-5: timm counts all cells behind the stem from 0, those that stride too."""

from __future__ import annotations

from flax_cnns.models.nasnet import NASNet
from flax_cnns.weights import name_maps
from flax_cnns.weights.nasnet import LEAVES, cells, torch_cell


def _timm(model: NASNet) -> name_maps.Rules:
    ours = [f"stage{stage}/{name}" for stage, name in cells(model)]
    return [
        (r"conv_0\.(conv|bn)", lambda m: f"stem/{LEAVES[m[1]]}"),
        *torch_cell(r"cell_stem_(?P<cell>\d)", lambda m: f"stem/reduction{int(m['cell']) + 1}"),
        *torch_cell(r"cell_(?P<cell>\d+)", lambda m: ours[int(m["cell"])]),
        ("last_linear", "head"),
    ]


TABLES = {"timm": _timm}
