"""One program that trains any cell of {none, skip_connect, nor_conv_3x3}: the cell is an input.

Compiling takes longer than training a small network, and there are 729 cells. So the program holds
a 3x3 convolution on each of the six edges, and a cell is two masks: where its convolutions count,
and where its input passes unchanged. With the same variables, logits and gradients are those of the
cell's own network (tests/studies/search/nas/test_shared.py). Convolutions that the cell lacks get
no gradient.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.layers.cell import ReluConvNorm
from flax_cnns.models.nas_bench_201 import (
    EDGES,
    NODES,
    CellNetwork,
    apply_skeleton,
    parse_cell,
    write_cell,
)
from flax_cnns.studies.search.nas.cells.space import SMALL_SPACE
from flax_cnns.types import Array, ModuleDef


def make_masks(cell: str) -> np.ndarray:
    """Returns f32 [2 6]: for each edge, 1 if it is a 3x3 convolution, and 1 if it is a skip.

    Raises `UserError` for an operation that is not in `SMALL_SPACE`.
    """
    operations = parse_cell(cell)
    if other := set(operations) - set(SMALL_SPACE):
        raise UserError(
            f"cell {cell!r}: {sorted(other)[0]} is not in the space {', '.join(SMALL_SPACE)}"
        )
    kinds = ("nor_conv_3x3", "skip_connect")
    return np.array([[name == kind for name in operations] for kind in kinds], np.float32)


class MaskedCell(nn.Module):
    """A cell with a convolution on each edge: [N H W C] -> [N H W C].

    Its parameters have the names of a `SearchCell` of 3x3 convolutions. A convolution that the cell
    lacks is not computed. On a CPU, with two of six, this halves the time of a step.
    """

    masks: Array  # f32 [2 6]: make_masks
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        unit = partial(ReluConvNorm, x.shape[-1], 3, self.conv, self.norm)
        nodes = [x, *(NODES - 1) * [jnp.zeros_like(x)]]
        convolves, passes = self.masks
        for i, (source, target) in enumerate(EDGES):
            y, module = nodes[source], unit(name=f"edge{source}_{target}")
            if self.is_initializing():
                z = module(y)
            else:
                z = nn.cond(convolves[i] > 0, _run, _skip, module, y)
            nodes[target] = nodes[target] + z + passes[i] * y
        return nodes[-1]


def _run(module: nn.Module, x: Array) -> Array:
    with layers.inside_control_flow():
        return module(x)


def _skip(module: nn.Module, x: Array) -> Array:
    return jnp.zeros_like(x)


class SharedNetwork(CellNetwork):
    """`CellNetwork` of the cell that `masks` describe: images f32 [N H W C] -> logits f32 [N K]."""

    cell: str = write_cell(["nor_conv_3x3"] * len(EDGES))  # the names of the parameters

    @nn.compact
    def __call__(self, images: Array, masks: Array, *, train: bool = False) -> Array:  # type: ignore[override]
        make_cell = cast(ModuleDef, partial(MaskedCell, masks))
        return apply_skeleton(self, images, make_cell, train=train)
