"""PNASNet-5. timm numbers all cells after the stem from 0, including those with stride 2."""

from __future__ import annotations

from flax_cnns.models.nasnet import NASNet
from flax_cnns.weights import name_maps
from flax_cnns.weights.nasnet import LEAVES, list_cells, timm_cell_rules


def _timm_rules(model: NASNet) -> name_maps.Rules:
    ours = [f"stage{stage}/{name}" for stage, name in list_cells(model)]
    return [
        (r"conv_0\.(conv|bn)", lambda m: f"stem/{LEAVES[m[1]]}"),
        *timm_cell_rules(
            r"cell_stem_(?P<cell>\d)", lambda m: f"stem/reduction{int(m['cell']) + 1}"
        ),
        *timm_cell_rules(r"cell_(?P<cell>\d+)", lambda m: ours[int(m["cell"])]),
        ("last_linear", "head"),
    ]


TABLES = {"timm": _timm_rules}
