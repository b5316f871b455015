"""Fixup: residual networks without normalization, by their first values and a few scalars.

Zhang, Dauphin & Ma 2019, https://arxiv.org/abs/1901.09321, the three rules of section 3. Modules
take their part in them by the names that they have in all our networks: a branch's convolutions are
`conv1` ... `conv<m>` and what stands in a norm's place behind them is `norm1` ... `norm<m>`. So the
blocks know nothing of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns.errors import UserError
from flax_cnns.layers.conv import Conv
from flax_cnns.types import Array, Dtype, ModuleDef


def fixup(conv: partial, dense: partial, branches: int, depth: int) -> tuple[ModuleDef, ...]:
    """(conv, norm, dense) of a network of `branches` residual branches, `depth` convolutions each.

    `conv` and `dense` are partials of `layers.Conv` and `nn.Dense`.

    Rule 1: the classifier and the last convolution of a branch start at 0.
    Rule 2: the others of a branch start with their `kernel_init` times L^(-1 / (2m - 2)), L
    branches of m convolutions; the stem and projections with `kernel_init`.
    Rule 3: a scalar, 0 at first, is added before each convolution, the classifier and each ReLU,
    and each branch is multiplied by a scalar, 1 at first. The authors train these scalars with
    a tenth of the learning rate: rules for `optimizer.lr_mult`.

    Raises `UserError` for branches of a single convolution, which rule 2 does not know.
    """
    if depth < 2:
        raise UserError(f'norm="fixup" is for branches of two convolutions or more, got {depth}')
    return (
        partial(FixupConv, branches=branches, depth=depth, **conv.keywords),
        partial(FixupScalars, depth=depth, param_dtype=dense.keywords["param_dtype"]),
        partial(FixupDense, **dense.keywords | dict(kernel_init=nn.initializers.zeros)),
    )


def _shift(module: nn.Module, x: Array, name: str) -> Array:
    """x + a scalar of the module's."""
    bias = module.param(name, nn.initializers.zeros, (), module.param_dtype)
    return x + jnp.asarray(bias, x.dtype)


class FixupConv(Conv):
    """`layers.Conv` of x + `input_bias`, a scalar: [N H W C] -> [N H' W' features].

    Its kernel starts as rules 1 and 2 say for the place that its name tells.
    """

    branches: int = 1
    depth: int = 2

    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        if name != "kernel":
            return super().param(name, init_fn, *args, **kwargs)
        inside = [f"conv{i}" for i in range(1, self.depth)]
        scale = self.branches ** (-1 / (2 * self.depth - 2)) if self.name in inside else 1.0
        if self.name == f"conv{self.depth}":
            scale = 0.0
        return super().param(name, lambda *a: scale * init_fn(*a), *args, **kwargs)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return super().__call__(_shift(self, x, "input_bias"))


class FixupDense(nn.Dense):
    """`nn.Dense` of x + `input_bias`, a scalar: [N C] -> [N features]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return super().__call__(_shift(self, x, "input_bias"))


class FixupScalars(nn.Module):
    """In a norm's place: x + `bias` before a ReLU, x * `scale` + `bias` at the end of a branch.

    A projection, `projection_norm`, has neither: it is added to a branch that has both.
    """

    depth: int
    param_dtype: Dtype = jnp.float32
    scale_init: Any = None  # of a norm; nothing here: branches start at 0 by rule 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.name == "projection_norm":
            return x
        if self.name == f"norm{self.depth}":
            scale = self.param("scale", nn.initializers.ones, (), self.param_dtype)
            x = x * jnp.asarray(scale, x.dtype)
        return _shift(self, x, "bias")
