"""NASNet-A: two searched cells, stacked by hand as "N @ P".

N is the number of cells in each of three stages, P the number of channels of the last maps. This
file holds the cells as data and stacks them; `layers/cell.py` computes a cell. The paper draws the
cells (figure 4) and leaves the rest to its authors' release, TensorFlow's slim network. We follow
the release.

- `nasnet_a_*` are slim's networks. They have an auxiliary head after the second to last stage. Slim
  weights its loss by 0.4 (`config.train.aux_weight`). The paper's parameter counts leave it out.
- `nasnetalarge` is timm's network, and `keras_*` are Keras's. They have no auxiliary head. In their
  pooling with stride 2 the padding counts as zeros: `zero_pools`.
- ScheduledDropPath drops each operation of a cell, for each image, at a rate that grows with the
  depth of the cell, up to `drop_path` in the last cell. In the paper the rate also grows over the
  training steps, from 0. We leave this out: from the first step the rate is slim's final one, 0.4
  on CIFAR, 0.3 for the large network, 0 for the mobile network.

Without the auxiliary head, 7 @ 2304 has 32,590,954 parameters; table 1 says 27.6 M, and 6 @ 2304
would have 28.2 M. The same calculation gives the table's 3.3 M for 6 @ 768, and both ImageNet
counts to the last digit. Cells B and C are not implemented.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.layers import Cell, CellRecipe, PaddingRules
from flax_cnns.models.fields import Classes, Count, CountOrZero, ImageSize, Positive, Rate
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="Learning Transferable Architectures for Scalable Image Recognition",
    authors="Zoph, Vasudevan, Shlens, Le",
    year=2017,
    url="https://arxiv.org/abs/1707.07012",
)

_TRUNCATED: Literal["truncated_normal"] = "truncated_normal"  # at two standard deviations
slim_initializer = layers.tensorflow_fan_out(_TRUNCATED)  # `kernel_init="paper"`

# Figure 4. The normal cell's output includes "p", although its rows use "p" as well.
NORMAL = CellRecipe(
    rows=(
        ("separable5", "x", "separable3", "p"),
        ("separable5", "p", "separable3", "p"),
        ("mean3", "x", "identity", "p"),
        ("mean3", "p", "mean3", "p"),
        ("separable3", "x", "identity", "x"),
    ),
    output=("p", "1", "2", "3", "4", "5"),
)
REDUCTION = CellRecipe(
    rows=(
        ("separable5", "x", "separable7", "p"),
        ("max3", "x", "separable7", "p"),
        ("mean3", "x", "separable5", "p"),
        ("identity", "2", "mean3", "1"),
        ("separable3", "1", "max3", "x"),
    ),
    output=("2", "3", "4", "5"),
)


class Stem(nn.Module):
    """A 3x3 convolution, and on ImageNet reduction cells: [N H W C] -> the last two outputs.

    Without cells the output is [N H W width]. With n cells it has the size H/2^(n + 1).
    """

    width: int  # of the convolution
    widths: Sequence[int]  # of the cells
    conv: ModuleDef
    norm: ModuleDef
    cell: ModuleDef

    @nn.compact
    def __call__(self, x: Array, drop: layers.DropPath | None) -> tuple[Array, Array | None]:
        first = dict(strides=2, padding="VALID") if self.widths else dict(padding=1)
        x, p = self.conv(self.width, (3, 3), **first, name="conv")(x), None
        x = self.norm(name="norm")(x)
        for i, width in enumerate(self.widths):
            cell = self.cell(width, name=f"reduction{i + 1}")
            x, p = cell(x, p, layers.for_block(drop, i)), x
        return x, p


class CellStage(nn.Module):
    """A reduction cell, except in the first stage, and `depth` normal cells.

    Takes and returns the outputs of the last two cells: x [N H W C] and the older output p. A
    reduction halves H and W of x.
    """

    depth: int
    width: int
    normal: ModuleDef
    reduction: ModuleDef | None
    skip_reduction: bool

    @nn.compact
    def __call__(
        self, x: Array, p: Array | None, drop: layers.DropPath | None
    ) -> tuple[Array, Array | None]:
        before = 0
        if self.reduction is not None:
            y = self.reduction(self.width, name="reduction")(x, p, layers.for_block(drop, 0))
            x, p, before = y, p if self.skip_reduction else x, 1
        for i in range(self.depth):
            cell = self.normal(self.width, name=f"normal{i + 1}")
            x, p = cell(x, p, layers.for_block(drop, before + i)), x
        return x, p


class Aux(nn.Module):
    """slim's auxiliary head: [N H W C] -> logits f32 [N num_classes], sown in training.

    At the published image sizes a 5x5/3 mean leaves maps of `side` x `side`, and the second
    convolution spans the whole map. Maps of other sizes get an adaptive mean of `side` x `side`.
    """

    side: int
    conv: ModuleDef
    norm: ModuleDef
    head: ModuleDef  # the dense layer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> None:
        x = nn.relu(x)
        published = all((n - 5) // 3 + 1 == self.side for n in x.shape[1:3])
        x = layers.avg_pool(x, 5, 3) if published else layers.adaptive_avg_pool(x, self.side)
        x = self.conv(128, (1, 1), padding=0, name="conv1")(x)
        x = nn.relu(self.norm(name="norm1")(x))
        x = self.conv(768, (self.side, self.side), padding=0, name="conv2")(x)
        x = nn.relu(self.norm(name="norm2")(x))
        x = self.head(name="head")(layers.global_avg_pool(x))  # x is one pixel
        if train:
            self.sow("aux_logits", "logits", x)


class NASNet(nn.Module):
    """NASNet: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N P] if `num_classes` is None. H and W are at least 19 with cells
    in the stem, else 3. In training a network with an auxiliary head sows its logits into
    `aux_logits` as aux1/logits. Raises `UserError` if the images are too small or have other
    channels than `input_size`, and for unknown operations or invalid fields.
    """

    # architecture
    width: Count  # of the cells in the first stage; each stage doubles it. NASNet-A: P / 24
    stem_width: Count  # of the first convolution
    depths: Sequence[CountOrZero]  # normal cells in each stage
    normal: CellRecipe = NORMAL
    reduction: CellRecipe = REDUCTION
    stem_cells: CountOrZero = 2  # reductions in the stem, the last of width / 2; CIFAR: 0
    # The first normal cell after a reduction takes the reduction's p as its p, not its x.
    skip_reduction: bool = False
    padding: str = "same"  # TensorFlow's; "torch": symmetric
    zero_pools: Sequence[str] = ()  # "max", "mean": with stride 2 their padding is zeros
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    aux: Count | None = None  # `side` of the auxiliary head; None: no such head
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # of the pooled features
    drop_path: Rate = 0.0  # rate of dropping an operation of the last cell
    drop_path_mode: str = "sample"
    drop_path_schedule: str = "linear"
    # numerics
    momentum: Rate = 0.9997  # of the running statistics
    epsilon: Positive = 1e-3
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    remat: bool = False  # recompute the inside of each cell in the backward pass

    @property
    def layer_groups(self) -> tuple:
        """Groups for optimizer.layer_decay, as timm's; PNASNet's reductions are ordinary cells."""
        is_one_cell = self.normal == self.reduction
        return () if is_one_cell else ((r"stage\d+/reduction", "above"),)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        if wrong := set(self.zero_pools) - {"max", "mean"}:
            raise UserError(f"zero_pools may hold 'max' and 'mean', got {sorted(wrong)}")
        # After a reduction p must be larger than x, since a cell recognizes the reduction by this.
        # With smaller images p would not be larger.
        layers.check_images(images, self.input_size, 19 if self.stem_cells else 3)
        conv, norm = layers.building_blocks(self, train, paper=slim_initializer)
        cells = [n + (i > 0) for i, n in enumerate(self.depths)]
        drops = layers.make_drop_paths(self, (self.stem_cells, *cells), train)
        cell = partial(
            nn.remat(Cell) if self.remat else Cell,
            conv=conv,
            norm=norm,
            padding_rules=PaddingRules(self.padding, self.zero_pools),
        )
        normal = partial(cell, recipe=self.normal)
        reduction = partial(cell, recipe=self.reduction, stride=2)
        # Comments give the sizes of maps for images of 331x331 and 224x224.
        widths = [self.width // 2**i for i in range(self.stem_cells, 0, -1)]
        first_init = variance_scaling(2.0, "fan_out", _TRUNCATED)
        first_init = layers.get_initializer(self.kernel_init, paper=first_init)
        first = partial(conv, kernel_init=first_init)
        stem = Stem(self.stem_width, widths, first, norm, reduction, name="stem")
        x, p = stem(images, drops[0])  # 42, 28
        for i, depth in enumerate(self.depths):  # 42, 21, 11 or 28, 14, 7
            stage = CellStage(
                depth,
                self.width * 2**i,
                normal,
                reduction if i else None,
                self.skip_reduction,
                name=f"stage{i + 1}",
            )
            x, p = stage(x, p, drops[i + 1])
            is_before_aux = self.num_classes and i == len(self.depths) - 2
            if self.aux and is_before_aux and (train or self.is_initializing()):
                head = partial(layers.make_head(self, slim_initializer), self.num_classes)
                Aux(self.aux, conv, norm, head, name="aux1")(x, train)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, nn.relu(x), dropout=dropout, paper=slim_initializer)


def _n_at_p(n: int, p: int, **fields: Any) -> partial:
    return partial(NASNet, depths=(n, n, n), width=p // 24, **fields)


def _cifar(n: int, p: int) -> partial:  # slim's stem is three times as wide as the first cells
    fields: Any = dict(momentum=0.9, epsilon=1e-5, input_size=(32, 32, 3), num_classes=10)
    return _n_at_p(n, p, stem_width=p // 8, stem_cells=0, aux=4, drop_path=0.4, **fields)


_MOBILE = _n_at_p(4, 1056, stem_width=32)
_LARGE = _n_at_p(6, 4032, stem_width=96, skip_reduction=True, input_size=(331, 331, 3))
_KERAS: Any = dict(zero_pools=("max", "mean"))
VARIANTS = {
    "nasnet_a_mobile": partial(_MOBILE, aux=4, dropout=0.5),
    "nasnet_a_large": partial(_LARGE, aux=6, dropout=0.5, drop_path=0.3),
    "nasnetalarge": partial(_LARGE, zero_pools=("mean",), momentum=0.9),
    "keras_nasnetmobile": partial(_MOBILE, **_KERAS),
    "keras_nasnetlarge": partial(_LARGE, **_KERAS),
    "nasnet_a_6_768": _cifar(6, 768),
    "nasnet_a_7_2304": _cifar(7, 2304),
}
SOURCES = {
    "nasnetalarge": ("timm",),
    "keras_nasnetmobile": ("keras",),
    "keras_nasnetlarge": ("keras",),
}
