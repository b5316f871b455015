"""Fixup: residual networks that replace normalization by their initialization and a few scalars.

Zhang, Dauphin & Ma 2019, https://arxiv.org/abs/1901.09321, the three rules of section 3. A module's
role follows from its name. In all our networks, the convolutions of a branch are `conv1` ...
`conv<m>`, and the layers in the places of their norms are `norm1` ... `norm<m>`. So the blocks need
no code for Fixup.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns.errors import UserError
from flax_cnns.layers.conv import Conv
from flax_cnns.types import Array, Dtype, ModuleDef


def fixup(
    conv: partial, dense: partial, branches: int, depth: int
) -> tuple[ModuleDef, ModuleDef, ModuleDef]:
    """Returns a network's (conv, norm, dense) with Fixup.

    The network has `branches` residual branches of `depth` convolutions each. The arguments `conv`
    and `dense` are partials of `layers.Conv` and `nn.Dense`.

    Rule 1: The classifier and the last convolution of each branch start at 0.
    Rule 2: The other convolutions of a branch start with their `kernel_init` times
    L^(-1 / (2m - 2)), for L branches of m convolutions. The stem and the projections start with
    their `kernel_init`.
    Rule 3: A scalar that starts at 0 is added before each convolution, the classifier and each
    ReLU. Each branch is multiplied by a scalar that starts at 1. The authors train these scalars
    with a tenth of the learning rate; rules in `optimizer.lr_mult` can do that.

    Raises `UserError` if `depth` is 1, which rule 2 does not cover.
    """
    if depth < 2:
        raise UserError(f'norm="fixup" needs branches of two convolutions or more, got {depth}')
    return (
        partial(FixupConv, branches=branches, depth=depth, **conv.keywords),
        partial(FixupScalars, depth=depth, param_dtype=dense.keywords["param_dtype"]),
        partial(FixupDense, **dense.keywords | dict(kernel_init=nn.initializers.zeros)),
    )


def _shift(module: nn.Module, x: Array, name: str) -> Array:
    """Returns x + b, where b is the module's scalar parameter `name`."""
    bias = module.param(name, nn.initializers.zeros, (), module.param_dtype)
    return x + jnp.asarray(bias, x.dtype)


class FixupConv(Conv):
    """`layers.Conv` of x + `input_bias`, a scalar: [N H W C] -> [N H' W' features].

    The layer's name decides how rules 1 and 2 scale the initial kernel.
    """

    branches: int = 1
    depth: int = 2

    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        if name != "kernel":
            return super().param(name, init_fn, *args, **kwargs)
        scaled = [f"conv{i}" for i in range(1, self.depth)]
        scale = self.branches ** (-1 / (2 * self.depth - 2)) if self.name in scaled else 1.0
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
    """Takes a norm's place: x + `bias` before a ReLU, x * `scale` + `bias` at the end of a branch.

    A layer named `projection_norm` has neither scalar and returns x: a projection is added to a
    branch that has both.
    """

    depth: int
    param_dtype: Dtype = jnp.float32
    scale_init: Any = None  # accepted as a norm's, but unused: branches start at 0 by rule 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.name == "projection_norm":
            return x
        if self.name == f"norm{self.depth}":
            scale = self.param("scale", nn.initializers.ones, (), self.param_dtype)
            x = x * jnp.asarray(scale, x.dtype)
        return _shift(self, x, "bias")
