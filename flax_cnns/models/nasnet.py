"""NASNet-A: two searched cells, stacked by hand as "N @ P".

The cells are data, and `layers/cell.py` computes them; here is how they are stacked. N cells are in
each of three stages, P channels in the last maps. The paper draws the cells (figure 4) and leaves
the rest to its authors' release, TensorFlow's slim network, which is followed here.

- `nasnet_a_*` are slim's networks, with the auxiliary head behind the last stage but one, whose
  loss slim weighs by 0.4 (`config.train.aux_weight`). The paper's counts are without it.
- `nasnetalarge` is timm's and `keras_*` are Keras's, without it. They pad their poolings of stride
  2 with zeros that count: `zero_pools`.
- ScheduledDropPath drops each operation of a cell, image by image, at a rate that grows with the
  cell's place, up to `drop_path` in the last cell, and over the training steps from 0. The growth
  over the steps is left out: from the first step on the rate is what slim ends with, 0.4 on CIFAR,
  0.3 for the large network, 0 for the mobile one.

7 @ 2304 has 32,590,954 parameters so, where table 1 says 27.6 M; 6 @ 2304 would have 28.2 M. The
same sum gives the table's 3.3 M for 6 @ 768, and both counts for ImageNet to the last digit. Cells
B and C are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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

_TRUNCATED = "truncated_normal"  # at two deviations
slim_initializer = layers.tensorflow_fan_out(_TRUNCATED)  # `kernel_init="paper"`

# Figure 4. The output of the normal cell has "p" although rows use it.
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
    """A 3x3, and on ImageNet reduction cells: [N H W C] -> the outputs of the last two.

    Without cells the 3x3 keeps the size; with n of them it comes to H/2^(n + 1).
    """

    width: int  # of the 3x3
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
    """A reduction cell in all stages but the first, and `depth` normal ones.

    Takes and gives the outputs of the last two cells, [N H W C] and the older one; the newer comes
    to H/2 where there is a reduction.
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

    Its second convolution spans all that a 5x5/3 mean leaves of the maps, `side` by `side` for the
    published images; maps of other sizes have an adaptive mean of that size.
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
        x = self.head(name="head")(layers.global_avg_pool(x))  # of one pixel
        if train:
            self.sow("aux_logits", "logits", x)


class NASNet(nn.Module):
    """Images f32 [N H W C] -> logits f32 [N num_classes]; pooled features [N P] if it is None.

    H and W are at least 19 with cells in the stem, else 3. In training the auxiliary head, if there
    is one, sows `aux_logits` aux1/logits. Raises `UserError` where the images are too small or have
    other channels than `input_size`, for unknown operations, and for fields that are none.
    """

    # architecture
    width: Count  # of the first stage's cells, doubled from stage to stage: P / 24 for NASNet-A
    stem_width: Count  # of the first convolution
    depths: Sequence[CountOrZero]  # normal cells in each stage
    normal: CellRecipe = NORMAL
    reduction: CellRecipe = REDUCTION
    stem_cells: CountOrZero = 2  # reductions in the stem, of 1/2 the width, 1/4 ...; CIFAR: 0
    # The normal cell behind a reduction has the reduction's p for its own, in place of its x.
    skip_reduction: bool = False
    padding: str = "same"  # TensorFlow's; "torch": the same on both sides
    zero_pools: Sequence[str] = ()  # of "max" and "mean": those of stride 2 take padding for zeros
    input_size: ImageSize = (224, 224, 3)
    norm: str = "batch"
    # head
    aux: Count | None = None  # an auxiliary head of this `side`
    num_classes: Classes | None = 1000
    # regularization
    dropout: Rate = 0.0  # of the pooled features
    drop_path: Rate = 0.0  # of operations in the last cell: layers.make_drop_paths
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
    remat: bool = False  # compute the inside of each cell again in the backward pass

    @property
    def layer_groups(self) -> tuple:
        """For optimizer.layer_decay, as timm: PNASNet's reductions are cells like the others."""
        own = self.normal == self.reduction
        return () if own else ((r"stage\d+/reduction", "above"),)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        if wrong := set(self.zero_pools) - {"max", "mean"}:
            raise UserError(f"zero_pools are among 'max' and 'mean', got {sorted(wrong)}")
        # So that p is larger than x behind each reduction, by which a cell knows it.
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
        # In comments the sizes for 331x331 and 224x224.
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
            wanted = self.aux and self.num_classes and i == len(self.depths) - 2
            if wanted and (train or self.is_initializing()):
                head = partial(layers.make_head(self, slim_initializer), self.num_classes)
                Aux(self.aux, conv, norm, head, name="aux1")(x, train)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return layers.classify(self, nn.relu(x), dropout=dropout, paper=slim_initializer)


def _n_at_p(n: int, p: int, **fields: object) -> partial:
    return partial(NASNet, depths=(n, n, n), width=p // 24, **fields)


def _cifar(n: int, p: int) -> partial:  # slim's stem is three times as wide as the first cells
    fields = dict(momentum=0.9, epsilon=1e-5, input_size=(32, 32, 3), num_classes=10)
    return _n_at_p(n, p, stem_width=p // 8, stem_cells=0, aux=4, drop_path=0.4, **fields)


_MOBILE = _n_at_p(4, 1056, stem_width=32)
_LARGE = _n_at_p(6, 4032, stem_width=96, skip_reduction=True, input_size=(331, 331, 3))
_KERAS = dict(zero_pools=("max", "mean"))
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
