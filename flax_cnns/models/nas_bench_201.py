"""Networks of NAS-Bench-201: a fixed skeleton whose stages repeat one small cell.

A cell is a graph of 4 nodes. Node 0 is the input, and a later node is the sum over all earlier
nodes, each through the operation of its edge. 6 edges with 5 operations make 15,625 cells. The text
of a cell is that of the paper's release, node by node: `|nor_conv_3x3~0|+|none~0|skip_connect~1|+`
and so on, where `~0` is the node that the edge comes from.

The skeleton of figure 1: a 3x3 convolution with BatchNorm, three stages of N = 5 cells at 16, 32
and 64 channels, between them a residual block that halves the map, and at the end BatchNorm and
ReLU before the mean. Convolutions of cells and blocks have the order ReLU, convolution, BatchNorm.
The rest is from the authors' release (github.com/D-X-Y/AutoDL-Projects): the shortcut of a residual
block is a 2x2 mean and a 1x1 convolution without BatchNorm, and the mean of avg_pool_3x3 leaves the
padding out. We differ in one point: the 2x2 mean rounds odd sizes up as the strided convolution
does, so that the network takes images of any size; the release fails there.

A convolution behind a node that nothing reaches still adds the shift of its BatchNorm. So these
edges change the network, and they count as parameters, here as in the release.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns import layers
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.cell import ReluConvNorm
from flax_cnns.models.fields import Classes, Count, Counts, ImageSize
from flax_cnns.types import Array, Dtype, ModuleDef, Paper

PAPER = Paper(
    title="NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search",
    authors="Dong, Yang",
    year=2020,
    url="https://arxiv.org/abs/2001.00326",
)

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NODES = 4
# In the order of a cell's text.
EDGES = (
    (0, 1),
    (0, 2),
    (1, 2),
    (0, 3),
    (1, 3),
    (2, 3),
)  # (from, to)
EXAMPLE = "|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|skip_connect~2|"

# ---------------------------------------------------------------------------- cells as text


def parse_cell(text: str) -> tuple[str, ...]:
    """Returns the operations of a cell in the order of `EDGES`.

    Raises `UserError` for an unknown operation, a wrong number of edges, and any other text.
    """
    nodes = text.split("+")
    rows = [re.fullmatch(r"\|((?:[^|~]+~\d+\|)+)", node) for node in nodes]
    if not all(rows):
        wrong = nodes[rows.index(None)]
        raise UserError(
            f"cell {text!r}: cannot read {wrong!r}; expected edges such as |skip_connect~0| in each"
            f" of {NODES - 1} nodes, joined by '+': {EXAMPLE}"
        )
    found = [match[1].rstrip("|").split("|") for match in rows if match]
    counts = [len(row) for row in found]
    wanted = list(range(1, NODES))
    if counts != wanted:
        raise UserError(
            f"cell {text!r}: expected {len(EDGES)} edges, {wanted} into the {NODES - 1} nodes, got"
            f" {sum(counts)}: {counts}; write an edge that is not there as none"
        )
    operations = []
    for (source, _), edge in zip(EDGES, (edge for row in found for edge in row)):
        operation, _, number = edge.partition("~")
        if operation not in OPERATIONS:
            hint = did_you_mean(operation, OPERATIONS)
            raise UserError(f"cell {text!r}: unknown operation {operation!r}{hint}")
        if int(number) != source:
            raise UserError(
                f"cell {text!r}: expected {operation}~{source} in place of {edge}: the edges into a"
                " node come from nodes 0, 1, ... in this order"
            )
        operations.append(operation)
    return tuple(operations)


def write_cell(operations: Sequence[str]) -> str:
    """Returns the text of a cell. Raises `UserError` if `parse_cell` does not read it."""
    rows: list[str] = []
    rest = list(operations)
    for node in range(1, NODES):
        edges, rest = rest[:node], rest[node:]
        rows.append(f"|{'|'.join(f'{name}~{i}' for i, name in enumerate(edges))}|")
    text = "+".join(rows) + "".join(f"{name}~{NODES - 1}|" for name in rest)
    parse_cell(text)
    return text


# ---------------------------------------------------------------------------- network


class SearchCell(nn.Module):
    """A cell: [N H W C] -> [N H W C].

    `operations` are in the order of `EDGES`. The module of a convolution is called edge0_1 on the
    edge from node 0 to node 1.
    """

    operations: Sequence[str]
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        nodes = [x, *(NODES - 1) * [jnp.zeros_like(x)]]
        for (source, target), operation in zip(EDGES, self.operations):
            y = nodes[source]
            if operation == "none":
                continue
            if operation.startswith("nor_conv"):
                size = 1 if operation == "nor_conv_1x1" else 3
                name = f"edge{source}_{target}"
                y = ReluConvNorm(width, size, self.conv, self.norm, name=name)(y)
            elif operation == "avg_pool_3x3":
                y = layers.avg_pool(y, 3, 1, padding=1, count_padding=False)
            nodes[target] = nodes[target] + y
        return nodes[-1]


class Reduction(nn.Module):
    """The residual block between stages: [N H W C] -> [N H/2 W/2 width], rounded up."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        unit = partial(ReluConvNorm, self.width, 3, self.conv, self.norm)
        branch = unit(name="conv2")(unit(stride=2, name="conv1")(x))
        # `ceil` drops the part of a window that lies outside of the image.
        means = layers.avg_pool(x, 2, 2, ceil=True)
        return branch + self.conv(self.width, (1, 1), padding=0, name="projection")(means)


class CellStack(nn.Module):
    """A reduction, except in the first stage, and `depth` cells: [N H W C] -> [N H' W' width]."""

    depth: int
    width: int
    cell: ModuleDef
    reduction: ModuleDef | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.reduction is not None:
            x = self.reduction(self.width, name="reduction")(x)
        for i in range(self.depth):
            x = self.cell(name=f"cell{i + 1}")(x)
        return x


def apply_skeleton(
    network: CellNetwork, images: Array, make_cell: ModuleDef, *, train: bool
) -> Array:
    """Computes the network around its cells: images f32 [N H W C] -> logits f32 [N num_classes].

    `make_cell(conv=, norm=)` returns a module [N H W C] -> [N H W C] as a partial without name.
    """
    layers.check_images(images, network.input_size)
    layers.check_stages(network.depths, network.widths)
    conv, norm = layers.building_blocks(network, train)
    cell = partial(make_cell, conv=conv, norm=norm)
    reduction = partial(Reduction, conv=conv, norm=norm)
    stem = partial(layers.ConvUnit, conv=conv, norm=norm, padding=1, activation=lambda x: x)
    x = stem(network.widths[0], (3, 3), stride=network.stem_stride, name="stem")(images)
    for i, (depth, width) in enumerate(zip(network.depths, network.widths)):
        stage = CellStack(depth, width, cell, reduction if i else None, name=f"stage{i + 1}")
        x = stage(x)
    return layers.classify(network, nn.relu(norm(name="norm")(x)))


class CellNetwork(nn.Module):
    """Network of one repeated cell: images f32 [N H W C] -> logits f32 [N num_classes].

    Returns pooled features f32 [N C] if `num_classes` is None. Takes any H and W. Raises
    `UserError` if `cell` is not a cell's text, or the images have other channels than `input_size`.
    """

    # architecture
    cell: str  # as in NAS-Bench-201: parse_cell
    depths: Counts = (5, 5, 5)  # cells in each stage
    widths: Counts = (16, 32, 64)
    stem_stride: Count = 1
    input_size: ImageSize = (32, 32, 3)
    norm: str = "batch"
    # head
    num_classes: Classes | None = 10
    # numerics
    kernel_init: str | Callable = "he"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None  # "batch": synchronized BatchNorm
    # compilation
    remat: bool = False  # recompute the inside of each cell in the backward pass

    def __post_init__(self) -> None:
        parse_cell(self.cell)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        cell = nn.remat(SearchCell) if self.remat else SearchCell
        make_cell = cast(ModuleDef, partial(cell, operations=parse_cell(self.cell)))
        return apply_skeleton(self, images, make_cell, train=train)


def _name_cell(*operations: str) -> partial:
    return partial(CellNetwork, cell=write_cell(operations))


_NONE, _SKIP, _1X1, _3X3, _POOL = OPERATIONS
VARIANTS = {
    # Cells that the release names.
    "nas_bench_201_resnet": _name_cell(_3X3, _NONE, _3X3, _SKIP, _NONE, _SKIP),
    "nas_bench_201_conv3x3": _name_cell(*[_3X3] * 6),
    "nas_bench_201_conv1x1": _name_cell(*[_1X1] * 6),
    # The best cell of the paper's 15,625 on CIFAR-100: the authors, in
    # github.com/D-X-Y/AutoDL-Projects/issues/103.
    "nas_bench_201_best_cifar100": _name_cell(_3X3, _3X3, _3X3, _SKIP, _3X3, _3X3),
    # The best validation accuracy of 80 searches among 729 cells, on Fashion-MNIST at 14 pixels
    # with two cells of 16 channels: flax-cnns search nas --space=cells, docs/search.md.
    "nas_bench_201_fashion_mnist": _name_cell(_3X3, _3X3, _3X3, _NONE, _SKIP, _3X3),
}
