"""Dropout behind any layer of any network, of single responses or of whole maps.

Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html, inverted: what stays is
multiplied by 1 / (1 - rate), and evaluation is left alone. Whole maps as Tompson et al. 2015,
https://arxiv.org/abs/1411.4280, section 3.2 ("SpatialDropout").

No network knows of it: `intercept` changes what the layers give as they are called. A network's own
`dropout` field is another matter, and both may be on. `train.precise_bn` computes its statistics
without it, as evaluation does: with it the variances would be those of scaled responses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree

# "unit": each response by itself; "channel": each map of an image, each feature of its tokens.
MODES = ("unit", "channel")

STREAM = "layer_dropout"  # layers.Stage splits it for its blocks


def decide_rates(
    rules: Sequence, model: nn.Module, images_shape: Sequence[int], params: PyTree
) -> dict[str, float]:
    """`{"stage1/block1/conv1": rate}` for each module whose output is dropped, a stack being one.

    `rules` are `config.train.dropout`: (rate,) for every convolution but those of the head, or
    (regex over such paths, rate), blocks and norms included. `params`, or a tree of that shape, are
    as the step takes them, named or stacked. Computes shapes only. Raises `UserError` for a rule
    that decides nothing, a module that none decides, a stack whose blocks differ, and a network of
    which nothing would be dropped.
    """
    if not rules:
        return {}
    found = _modules(model, images_shape)
    if len(rules) == 1 and isinstance(rules[0], (int, float)):
        rates = {
            path: rules[0] if is_conv and not path.startswith("head") else 0.0
            for path, is_conv in found.items()
        }
    else:
        rates = pytree.match(rules, found, what="train.dropout")
    asked = any(rule if isinstance(rule, (int, float)) else rule[1] for rule in rules)
    if asked and not any(rates.values()):
        raise UserError(
            f"train.dropout: {type(model).__name__} has no layer that it drops; one rate is for"
            " each flax.linen.Conv but the head's, (regex, rate) for the linen layers it names"
        )
    parts = (path.split("/") for path in pytree.flatten(params))
    prefixes = dict.fromkeys("/".join(p[:i]) for p in parts for i in range(1, len(p)))
    for stack in prefixes:
        first, *others = pytree.expand_stack(stack)
        if not others or len(pytree.expand_stack(stack.rpartition("/")[0])) > 1:
            continue
        for path in [path for path in rates if f"{path}/".startswith(f"{first}/")]:
            inside = path.removeprefix(first)
            if {rates.get(other + inside) for other in others} != {rates[path]}:
                raise UserError(
                    f"train.dropout: the rules treat the blocks of the stack {stack!r} differently "
                    f"({path} and its like); let them agree, or set model.scan=False"
                )
            rates[stack + inside] = rates[path]
    return {path: rate for path, rate in rates.items() if rate}


def _modules(model: nn.Module, images_shape: Sequence[int]) -> dict[str, bool]:
    """The path of every module inside that gives an array [N ...]: whether it is a convolution."""
    found: dict[str, bool] = {}

    def call(function: Callable, args: tuple, kwargs: dict, at: nn.module.InterceptorContext):
        y = function(*args, **kwargs)
        if at.method_name == "__call__" and at.module.path and getattr(y, "ndim", 0) > 1:
            path = "/".join(at.module.path)
            found[path] = found.get(path, False) or isinstance(at.module, nn.Conv)
        return y

    images = jax.ShapeDtypeStruct(tuple(images_shape), jnp.float32)
    with nn.intercept_methods(call):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    return found


def intercept(rates: Mapping[str, float], mode: str = "unit") -> Any:
    """A context in which the outputs of the modules in `rates` are dropped, by the stream STREAM.

    Outputs are [N H W C], [N T C] or [N C]. It is for training: evaluation does without.
    """
    # A module may run as another one with the same scope: it is dropped once.
    inside: list[str] = []

    def call(function: Callable, args: tuple, kwargs: dict, at: nn.module.InterceptorContext):
        path = "/".join(at.module.path)
        if at.method_name != "__call__" or path in inside or path not in rates:
            return function(*args, **kwargs)
        inside.append(path)
        try:
            y = function(*args, **kwargs)
        finally:
            inside.pop()
        return drop(y, rates[path], at.module.make_rng(STREAM), mode)

    return nn.intercept_methods(call)


def drop(x: Array, rate: float, key: Array, mode: str) -> Array:
    """x / (1 - rate), of which the share `rate` is 0; of the shape and dtype of x [N ... C]."""
    shape = x.shape if mode == "unit" else (len(x), *[1] * (x.ndim - 2), x.shape[-1])
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x / (1 - rate), 0)


def add_dropout(apply_fn: Callable, rates: Mapping[str, float], mode: str = "unit") -> Callable:
    """`apply_fn` with dropout, for a training step: the keys are made of its stream "dropout"."""
    if not rates:
        return apply_fn

    @functools.wraps(apply_fn)
    def apply(*args: Any, rngs: Mapping[str, Array], **kwargs: Any) -> Any:
        # A stream of its own leaves all other draws as they were.
        key = jax.random.fold_in(rngs["dropout"], 1)
        with intercept(rates, mode):
            return apply_fn(*args, rngs={**rngs, STREAM: key}, **kwargs)

    return apply
