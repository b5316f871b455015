"""PNASNet-5: a single cell, found by searching from simple to complex cells, stacked as in NASNet.

The cell of figure 1 serves as normal cell and, with stride 2, as reduction; `layers/cell.py`
computes it. We take what the paper leaves open from its authors' release, TensorFlow's slim
network: NASNet's stem with two such cells; "N = 4, F = 216" (table 5) as three stages of four
cells, where the first cells of the second and third stages have stride 2; and an output of all five
rows.

`pnasnet5large` is timm's network. `pnasnet5_large` adds what slim trains with: drop-path up to 0.4
(as in NASNet, without the growth over the steps), dropout 0.5, the auxiliary head, whose loss slim
weights by 0.4 (`config.train.aux_weight`), and slower running statistics.
"""

from __future__ import annotations

from functools import partial

from flax_cnns.layers import CellRecipe
from flax_cnns.models.nasnet import NASNet
from flax_cnns.types import Paper

PAPER = Paper(
    title="Progressive Neural Architecture Search",
    authors="Liu, Zoph, Neumann, Shlens, Hua, Li, Fei-Fei, Yuille, Huang, Murphy",
    year=2017,
    url="https://arxiv.org/abs/1712.00559",
)

CELL = CellRecipe(
    rows=(
        ("separable5", "p", "max3", "p"),
        ("separable7", "x", "max3", "x"),
        ("separable5", "x", "separable3", "x"),
        ("separable3", "3", "max3", "x"),
        ("separable3", "p", "identity", "x"),
    ),
    output=("1", "2", "3", "4", "5"),
)

_LARGE = partial(
    NASNet,
    width=216,
    stem_width=96,
    depths=(4, 3, 3),  # without the cells that have stride 2
    normal=CELL,
    reduction=CELL,
    input_size=(331, 331, 3),
)
VARIANTS = {
    "pnasnet5large": partial(_LARGE, momentum=0.9),
    "pnasnet5_large": partial(_LARGE, aux=6, dropout=0.5, drop_path=0.4),
}
SOURCES = {"pnasnet5large": ("timm",)}
