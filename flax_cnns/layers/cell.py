"""Cells of searched networks, as data: NASNet's and PNASNet's, and any of their operations.

Zoph et al. 2017, https://arxiv.org/abs/1707.07012. A cell is rows (operation, input, operation,
input) whose two results are added, and what stands side by side in its output. What the paper does
not say is as in its authors' release, TensorFlow's slim network: ReLU, convolution, norm in that
order; each separable convolution twice; a 1x1 squeezes both inputs of a cell to its width; the cell
behind a reduction halves the older input by two shifted 1x1 (`FactorizedReduction`). Where slim
leaves an older input of the cell's width and size as it is, which happens in none of its networks,
here it is squeezed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.layers.drop_path import DropPath, residual
from flax_cnns.layers.mbconv import SeparableConv, resolve_padding
from flax_cnns.layers.pool import avg_pool, max_pool
from flax_cnns.types import Array, ModuleDef


class CellRecipe(NamedTuple):
    """A cell. Inputs are "x", the last cell's output, "p", the one's before, and rows from "1"."""

    rows: Sequence[tuple[str, str, str, str]]  # OPERATIONS and their inputs, left and right
    output: Sequence[str]


class PaddingRules(NamedTuple):
    """What is around the maps."""

    padding: str  # of convolutions and poolings: mbconv.resolve_padding
    zero_pools: Sequence[str]  # "max", "mean": those of stride 2 take the padding for zeros


class Separable(nn.Module):
    """ReLU, depthwise, 1x1, norm, twice: [N H W C] -> [N H/stride W/stride width]."""

    width: int
    kernel_size: int
    conv: ModuleDef
    norm: ModuleDef
    padding_rules: PaddingRules
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        unit = partial(SeparableConv, self.width, self.conv, self.kernel_size)
        unit = partial(unit, padding=self.padding_rules.padding)
        x = unit(stride=self.stride, name="conv1")(nn.relu(x))
        x = nn.relu(self.norm(name="norm1")(x))
        return self.norm(name="norm2")(unit(name="conv2")(x))


class Pool(nn.Module):
    """3x3; where C is not `width`, a 1x1 and a norm: [N H W C] -> [N H/stride W/stride width]."""

    width: int
    kind: str  # "max" or "mean"
    conv: ModuleDef
    norm: ModuleDef
    padding_rules: PaddingRules
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = resolve_padding(self.padding_rules.padding, 3)
        if self.stride > 1 and self.kind in self.padding_rules.zero_pools:
            pads = [(1, 1)] * 2
            if padding == "SAME":
                pads = lax.padtype_to_pads(x.shape[1:3], (3, 3), [self.stride] * 2, padding)
            x, padding = jnp.pad(x, ((0, 0), *pads, (0, 0))), 0
        if self.kind == "max":
            y = max_pool(x, 3, self.stride, padding)
        else:
            y = avg_pool(x, 3, self.stride, padding, count_padding=False)
        if x.shape[-1] == self.width:
            return y
        return self.norm(name="norm")(self.conv(self.width, (1, 1), padding=0, name="conv")(y))


class Squeeze(nn.Module):
    """ReLU, 1x1, norm: [N H W C] -> [N H W width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = self.conv(self.width, (1, 1), padding=0, name="conv")
        return self.norm(name="norm")(conv(nn.relu(x)))


class Identity(nn.Module):
    """x itself; as `Squeeze` where the shape changes: [N H W C] -> [N H/stride W/stride width]."""

    width: int
    conv: ModuleDef
    norm: ModuleDef
    padding_rules: PaddingRules
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.stride == 1 and x.shape[-1] == self.width:
            return x
        conv = self.conv(self.width, (1, 1), strides=self.stride, padding=0, name="conv")
        return self.norm(name="norm")(conv(nn.relu(x)))


class FactorizedReduction(nn.Module):
    """[N H W C] -> [N H/2 W/2 width]: even rows and columns beside odd ones, each by a 1x1."""

    width: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, half = nn.relu(x), self.width // 2
        odd = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
        even = self.conv(half, (1, 1), padding=0, name="conv1")(x[:, ::2, ::2])
        odd = self.conv(self.width - half, (1, 1), padding=0, name="conv2")(odd[:, ::2, ::2])
        return self.norm(name="norm")(jnp.concatenate([even, odd], axis=-1))


OPERATIONS = {
    "identity": Identity,
    **{f"separable{k}": partial(Separable, kernel_size=k) for k in (3, 5, 7)},
    "max3": partial(Pool, kind="max"),
    "mean3": partial(Pool, kind="mean"),
}


class Cell(nn.Module):
    """`recipe` on the outputs of the last two cells, x [N H W C] and p: [N H/stride W/stride C'].

    C' is `width` for each part of the output. p is squeezed, or halved where it is larger than x;
    a first cell, which has none, takes x as it is for p. Only operations on x and p stride. All
    but identities are dropped, each for itself, as `drop` says. Raises `UserError` for an unknown
    operation.
    """

    width: int
    recipe: CellRecipe
    conv: ModuleDef
    norm: ModuleDef
    padding_rules: PaddingRules
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, p: Array | None, drop: DropPath | None = None) -> Array:
        given = dict(conv=self.conv, norm=self.norm)
        states = {"x": Squeeze(self.width, **given, name="squeeze")(x)}
        if p is None:
            states["p"] = x
        else:
            match = Squeeze if p.shape[1:3] == x.shape[1:3] else FactorizedReduction
            states["p"] = match(self.width, **given, name="squeeze_previous")(p)
        size = [-(-n // self.stride) for n in x.shape[1:3]]
        zero = jnp.zeros((len(x), *size, self.width), states["x"].dtype)
        for i, row in enumerate(self.recipe.rows, 1):
            sides = {"left": row[:2], "right": row[2:]}
            total = zero
            for side, (operation, source) in sides.items():
                if operation not in OPERATIONS:
                    hint = did_you_mean(operation, OPERATIONS)
                    raise UserError(f"unknown operation {operation!r} of a cell{hint}")
                module = partial(
                    OPERATIONS[operation],
                    self.width,
                    stride=self.stride if source in ("x", "p") else 1,
                    padding_rules=self.padding_rules,
                    name=f"block{i}_{side}",
                    **given,
                )
                drops = operation != "identity" and drop is not None
                own = _own(drop, 2 * i + (side == "right")) if drops else None
                branch = lambda _, x, module=module: module()(x)  # noqa: E731
                total = residual(total, branch, self, states[source], own)
            states[str(i)] = total
        parts = [states[name] for name in self.recipe.output]
        if parts[0].shape[-1] != self.width:  # a first cell's p
            first = self.conv(self.width, (1, 1), padding=0, name="project")(parts[0])
            parts[0] = self.norm(name="project_norm")(first)
        return jnp.concatenate(parts, axis=-1)


def _own(drop: DropPath, i: int) -> DropPath:
    """The cell's rate, and a key for its i-th operation alone."""
    return drop.replace(key=None if drop.key is None else jax.random.fold_in(drop.key, i))
