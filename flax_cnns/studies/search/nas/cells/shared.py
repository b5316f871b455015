"""One program that trains any cell of {none, skip_connect, nor_conv_3x3}: the cell is an input.

Compiling takes longer than training a small network, and there are 729 cells. So the program holds
a 3x3 convolution on each of the six edges, and a cell is two masks: where its convolutions count,
and where its input passes unchanged. With the same variables, logits and gradients are those of the
cell's own network (tests/studies/search/nas/test_shared.py). Convolutions that the cell lacks get
no gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cnns import layers
from flax_cnns.errors import UserError
from flax_cnns.models.nas_bench_201 import (
    EDGES,
    NODES,
    CellNetwork,
    ReluConvNorm,
    apply_skeleton,
    parse_cell,
)
from flax_cnns.types import Array, ModuleDef

SMALL_SPACE = ("none", "skip_connect", "nor_conv_3x3")


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

    Its parameters have the names of a `SearchCell` of 3x3 convolutions.
    """

    masks: Array  # f32 [2 6]: make_masks
    conv: ModuleDef
    norm: ModuleDef
    skip: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        unit = partial(ReluConvNorm, x.shape[-1], 3, self.conv, self.norm)
        nodes = [x, *(NODES - 1) * [jnp.zeros_like(x)]]
        convolves, passes = self.masks
        for i, (source, target) in enumerate(EDGES):
            y, module = nodes[source], unit(name=f"edge{source}_{target}")
            if self.skip and not self.is_initializing():
                def on(module, y):
                    with layers.inside_control_flow():
                        return module(y)
                def off(module, y):
                    return jnp.zeros_like(y)
                z = nn.cond(convolves[i] > 0, on, off, module, y)
            else:
                z = convolves[i] * module(y)
            nodes[target] = nodes[target] + z + passes[i] * y
        return nodes[-1]


class SharedNetwork(CellNetwork):
    """`CellNetwork` of the cell that `masks` describe: images f32 [N H W C] -> logits f32 [N K]."""

    cell: str = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    skip: bool = True

    @nn.compact
    def __call__(self, images: Array, masks: Array, *, train: bool = False) -> Array:
        make_cell = cast(ModuleDef, partial(MaskedCell, masks, skip=self.skip))
        return apply_skeleton(self, images, make_cell, train=train)
