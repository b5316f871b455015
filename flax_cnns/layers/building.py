"""Helpers for network classes: the partials that build their blocks, and the classifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

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
    """Returns (conv, norm), the partials that a network hands down to its blocks.

    The partials use the network's fields `kernel_init`, `dtype`, `param_dtype` and `axis_name`,
    which every network has, and `norm`, `momentum`, `epsilon` and `scale` if the network has them.
    `paper` is the initializer that `kernel_init="paper"` stands for. A network without the field
    `norm` has no norms. The arguments `norm`, `dtype` and `norm_fields` (arguments of `make_norm`)
    override the network's fields.

    Raises `UserError` for unknown names of initializers and norms, and if the network lacks one of
    the first four fields. The field `dtype` is not needed if the argument `dtype` is given.
    """
    required = () if dtype is not None else ("dtype",)
    check_fields(network, "building_blocks", *required, "kernel_init", "param_dtype", "axis_name")
    dtype = network.dtype if dtype is None else dtype
    types: dict[str, Any] = dict(dtype=dtype, param_dtype=network.param_dtype)
    kernel_init = get_initializer(network.kernel_init, paper=paper)
    for field in ("momentum", "epsilon", "scale"):
        if hasattr(network, field):
            norm_fields.setdefault(field, getattr(network, field))
    norm_name = cast(str, norm or getattr(network, "norm", "none"))
    conv = partial(Conv, use_bias=use_bias, kernel_init=kernel_init, **types)
    norm_fields = dict(axis_name=network.axis_name, **types, **norm_fields)
    return conv, make_norm(norm_name, train=train, **norm_fields)


def make_head(network: nn.Module, paper: Callable = lecun) -> partial:
    """Returns the classifier, a float32 `nn.Dense`, as a partial without `features` and `name`.

    Its kernel's initializer is `paper` if the network's `kernel_init` is "paper", else LeCun's.
    Raises `UserError` if the network lacks the field `kernel_init` or `param_dtype`.
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

    Maps are averaged over H and W. Then `dropout` and the layer "head" are applied. The argument
    `head` makes the layer; if it is None, `make_head(network, paper)` does. If `num_classes` is
    None, the result is the input of "head": features f32 [N C].
    Raises `UserError` if the network lacks the field `num_classes`.
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
    """The end of Network in Network and its successors: maps [N H W C] -> logits f32 [N K].

    The 1x1 convolution "head" makes one map for each class. The logits are the means of these maps
    after `activation`. If `num_classes` is None, the result is the mean of each input map: features
    f32 [N C].
    Raises `UserError` if the network lacks `num_classes`, `kernel_init` or `param_dtype`.
    """
    check_fields(network, "classify_by_maps", "num_classes", "kernel_init", "param_dtype")
    if network.num_classes is None:
        return global_avg_pool(x)
    kernel_init = get_head_initializer(network.kernel_init, paper=paper)
    head = partial(Conv, dtype=jnp.float32, param_dtype=network.param_dtype)
    x = head(network.num_classes, (1, 1), kernel_init=kernel_init, name="head")(x)
    return global_avg_pool(x if activation is None else activation(x))
