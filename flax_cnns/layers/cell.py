"""Cells of NASNet and PNASNet, described as data. Other networks can use their operations too.

Zoph et al. 2017, https://arxiv.org/abs/1707.07012. A cell has rows (operation, input, operation,
input) and a list of outputs. The two results of a row are added; the outputs are concatenated. In
details that the paper leaves open, cells follow its authors' release, TensorFlow's slim network:

- The order is ReLU, convolution, norm.
- Each separable convolution is applied twice.
- A 1x1 convolution squeezes each of a cell's two inputs to the cell's width.
- The cell after a reduction halves the older input by two shifted 1x1 convolutions
  (`FactorizedReduction`).

There is one difference: this module squeezes the older input even if it already has the cell's
width and size, and slim does not. None of slim's networks has such an input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
    """The rows and outputs of a cell.

    An input is "x" (the output of the last cell), "p" (the output of the cell before that), or a
    row's number, from "1".
    """

    rows: Sequence[tuple[str, str, str, str]]  # two operations, each with its input
    output: Sequence[str]  # the inputs and rows that are concatenated


class PaddingRules(NamedTuple):
    """How a cell's operations pad their input."""

    padding: str  # of convolutions and pooling: mbconv.resolve_padding
    zero_pools: Sequence[str]  # kinds of pooling ("max", "mean") that pad with zeros if strided


class ReluConvNorm(nn.Module):
    """ReLU, convolution, norm: [N H W C] -> [N H/stride W/stride width], rounded up."""

    width: int
    kernel_size: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = self.conv(
            self.width,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.kernel_size // 2,
            name="conv",
        )
        return self.norm(name="norm")(conv(nn.relu(x)))


class Separable(nn.Module):
    """(ReLU, depthwise, 1x1, norm) twice: [N H W C] -> [N H/stride W/stride width]."""

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
    """3x3 pooling: [N H W C] -> [N H/stride W/stride width].

    If C is not `width`, a 1x1 convolution and a norm follow.
    """

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


class Identity(nn.Module):
    """Returns x; if the shape changes, ReLU, 1x1 convolution and norm of x.

    [N H W C] -> [N H/stride W/stride width].
    """

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
    """Halves the map by two 1x1 convolutions: [N H W C] -> [N H/2 W/2 width].

    After a ReLU, one convolution reads the even rows and columns and the other the odd ones. Their
    results are concatenated and normalized.
    """

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


OPERATIONS: dict[str, Callable[..., nn.Module]] = {
    "identity": Identity,
    **{f"separable{k}": partial(Separable, kernel_size=k) for k in (3, 5, 7)},
    "max3": partial(Pool, kind="max"),
    "mean3": partial(Pool, kind="mean"),
}


class Cell(nn.Module):
    """Applies `recipe` to x [N H W C] and p, the outputs of the last two cells.

    Returns [N H/stride W/stride C'], where C' is `width` times the number of outputs. p is
    squeezed, or halved if its map is larger than x's. In a first cell p is None; x takes its place
    and is not squeezed. Only operations on x and p have the stride. Each operation, except
    identities, is dropped independently with the rate of `drop`.
    Raises `UserError` for an unknown operation.
    """

    width: int
    recipe: CellRecipe
    conv: ModuleDef
    norm: ModuleDef
    padding_rules: PaddingRules
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, p: Array | None, drop: DropPath | None = None) -> Array:
        given: dict[str, Any] = dict(conv=self.conv, norm=self.norm)
        squeeze: ModuleDef = partial(ReluConvNorm, self.width, 1, **given)
        states = {"x": squeeze(name="squeeze")(x)}
        if p is None:
            states["p"] = x
        else:
            if p.shape[1:3] != x.shape[1:3]:
                squeeze = partial(FactorizedReduction, self.width, **given)
            states["p"] = squeeze(name="squeeze_previous")(p)
        size = [-(-n // self.stride) for n in x.shape[1:3]]
        zero = jnp.zeros((len(x), *size, self.width), states["x"].dtype)
        for i, row in enumerate(self.recipe.rows, 1):
            sides = {"left": row[:2], "right": row[2:]}
            total = zero
            for side, (operation, source) in sides.items():  # source: "x", "p" or a row's number
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
                operation_drop = None
                if drop is not None and operation != "identity":
                    operation_drop = _for_operation(drop, 2 * i + (side == "right"))
                branch = lambda _, x, module=module: module()(x)  # noqa: E731
                total = residual(total, branch, self, states[source], operation_drop)
            states[str(i)] = total
        parts = [states[name] for name in self.recipe.output]
        if parts[0].shape[-1] != self.width:  # a first cell's p
            first = self.conv(self.width, (1, 1), padding=0, name="project")(parts[0])
            parts[0] = self.norm(name="project_norm")(first)
        return jnp.concatenate(parts, axis=-1)


def _for_operation(drop: DropPath, i: int) -> DropPath:
    """Returns `drop` with a key of its own for the cell's operation `i`."""
    key = None if drop.key is None else jax.random.fold_in(drop.key, i)
    return dataclasses.replace(drop, key=key)
