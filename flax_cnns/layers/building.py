"""What networks do alike around their blocks: what they build of, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cnns.layers.checks import check_fields
from flax_cnns.layers.conv import Conv
from flax_cnns.layers.initializers import get_head_initializer, get_initializer, he, lecun
from flax_cnns.layers.norm import make_norm
from flax_cnns.layers.pool import global_avg_pool
from flax_cnns.types import Array, Dtype, ModuleDef


def building_blocks(
    network: nn.Module,
    train: bool,
    *,
    paper: Callable | None = he,
    use_bias: bool = False,
    norm: str | None = None,
    dtype: Dtype = None,
    **norm_fields: Any,
) -> tuple[ModuleDef, ModuleDef]:
    """The convolution and the norm that a network hands down to its blocks, by its own fields.

    `kernel_init`, of which `paper` is the value "paper", `dtype`, `param_dtype` and `axis_name`
    are fields of every network; `norm`, `momentum`, `epsilon` and `scale` are taken if it has them.
    A network without the field `norm` normalizes nothing. The arguments `norm`, `dtype` and
    `norm_fields` (`make_norm`'s) take the place of the network's own fields.
    Raises `UserError` for unknown names of initializers and norms, and for a network that lacks one
    of the four fields.
    """
    asked = () if dtype is not None else ("dtype",)
    check_fields(network, "building_blocks", *asked, "kernel_init", "param_dtype", "axis_name")
    dtype = network.dtype if dtype is None else dtype
    types = dict(dtype=dtype, param_dtype=network.param_dtype)
    kernel_init = get_initializer(network.kernel_init, paper=paper)
    for field in ("momentum", "epsilon", "scale"):
        if hasattr(network, field):
            norm_fields.setdefault(field, getattr(network, field))
    make = partial(make_norm, train=train, axis_name=network.axis_name, **types, **norm_fields)
    return (
        partial(Conv, use_bias=use_bias, kernel_init=kernel_init, **types),
        make(norm or getattr(network, "norm", "none")),
    )


def make_head(network: nn.Module, paper: Callable = lecun) -> partial:
    """The dense layer that gives the classes, in float32, without their number and its name.

    Its kernel starts as `paper` says if the network's `kernel_init` is "paper", else by LeCun.
    Raises `UserError` for a network without the fields `kernel_init` and `param_dtype`.
    """
    check_fields(network, "make_head", "kernel_init", "param_dtype")
    kernel_init = get_head_initializer(network.kernel_init, paper=paper)
    return partial(
        nn.Dense, kernel_init=kernel_init, dtype=jnp.float32, param_dtype=network.param_dtype
    )


def classify(
    network: nn.Module,
    x: Array,
    *,
    dropout: nn.Module | None = None,
    paper: Callable = lecun,
    head: ModuleDef | None = None,
) -> Array:
    """The end of a network: maps [N H W C] or features [N C] -> logits f32 [N num_classes].

    Maps are averaged over H and W; `dropout` comes before the layer "head", which is
    `make_head(network, paper)` or the one given. Without classes: features f32 [N C].
    Raises `UserError` for a network without the field `num_classes`.
    """
    check_fields(network, "classify", "num_classes")
    x = global_avg_pool(x) if x.ndim == 4 else x.astype(jnp.float32)
    x = x if dropout is None else dropout(x)
    if network.num_classes is None:
        return x
    head = make_head(network, paper) if head is None else head
    return head(network.num_classes, name="head")(x)


def classify_by_maps(
    network: nn.Module, x: Array, *, paper: Callable, activation: Callable | None = nn.relu
) -> Array:
    """The end of Network in Network and of what follows it: maps [N H W C] -> logits f32 [N K].

    The 1x1 convolution "head" makes a map for each class, and the logits are the means of the maps
    behind the activation. Without classes: features f32 [N C], the means of what comes in.
    Raises `UserError` for a network without the fields that this takes.
    """
    check_fields(network, "classify_by_maps", "num_classes", "kernel_init", "param_dtype")
    if network.num_classes is None:
        return global_avg_pool(x)
    kernel_init = get_head_initializer(network.kernel_init, paper=paper)
    head = partial(Conv, dtype=jnp.float32, param_dtype=network.param_dtype)
    x = head(network.num_classes, (1, 1), kernel_init=kernel_init, name="head")(x)
    return global_avg_pool(x if activation is None else activation(x))
