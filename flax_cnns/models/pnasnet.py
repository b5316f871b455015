"""PNASNet-5: one cell for everything, found from simple to complex; stacked as NASNet is.

Figure 1's cell, computed by `layers/cell.py`; where it strides it is the reduction. What
the paper does not say is as in its authors' release, TensorFlow's slim network: NASNet's stem of
two such cells, "N = 4, F = 216" (table 5) as three times four cells, of which the first of the
second and of the third stage stride, and all five rows in the output.

`pnasnet5large` is timm's network, `pnasnet5_large` slim's training of it: drop-path up to 0.4
(NASNet's, without the growth over the steps), dropout 0.5, the auxiliary head, whose loss slim
weighs by 0.4 (`config.train.aux_weight`), and its slower running statistics.
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
    depths=(4, 3, 3),  # besides the cells that stride
    normal=CELL,
    reduction=CELL,
    input_size=(331, 331, 3),
)
VARIANTS = {
    "pnasnet5large": partial(_LARGE, momentum=0.9),
    "pnasnet5_large": partial(_LARGE, aux=6, dropout=0.5, drop_path=0.4),
}
SOURCES = {"pnasnet5large": ("timm",)}
