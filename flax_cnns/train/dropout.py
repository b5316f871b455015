"""Dropout after any layer of any network, of single activations or of whole channels.

Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html, as inverted dropout: values
that are kept are multiplied by 1 / (1 - rate), and evaluation is unchanged. Channels are dropped as
in Tompson et al. 2015, https://arxiv.org/abs/1411.4280, section 3.2 ("SpatialDropout").

Networks contain no code for this: `intercept` changes the outputs of the layers as they are called.
This dropout is independent of a network's `dropout` field; both may be on. `train.precise_bn`
computes its statistics without this dropout, as evaluation does. With the dropout, the variances
would be those of the scaled activations.
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

# "unit" drops single activations; "channel" drops a whole feature map of an image, or a feature in
# all tokens of an image.
MODES = ("unit", "channel")

STREAM = "layer_dropout"  # layers.Stage splits it for its blocks


def decide_rates(
    rules: Sequence, model: nn.Module, images_shape: Sequence[int], params: PyTree
) -> dict[str, float]:
    """Returns `{"stage1/block1/conv1": rate}` for each module that gets dropout.

    A stack of blocks has one entry. `rules`, from `config.train.dropout`, are either (rate,), for
    every convolution outside the head, or (regex of the path, rate) for any module, blocks and
    norms included. `params` is any tree with the structure that the step takes: its blocks are
    named or stacked. Computes only shapes.

    Raises `UserError` if a rule decides nothing, if no rule decides a module, if the blocks of a
    stack get different rates, or if nothing in the network would be dropped.
    """
    if not rules:
        return {}
    modules = _find_modules(model, images_shape)
    if len(rules) == 1 and isinstance(rules[0], (int, float)):
        rates = {
            path: rules[0] if is_conv and not path.startswith("head") else 0.0
            for path, is_conv in modules.items()
        }
    else:
        rates = pytree.match(rules, modules, what="train.dropout")
    asked = any(rule if isinstance(rule, (int, float)) else rule[1] for rule in rules)
    if asked and not any(rates.values()):
        raise UserError(
            f"train.dropout: nothing would be dropped in {type(model).__name__}. (rate,) applies to"
            " every flax.linen.Conv outside the head, (regex, rate) to the linen layers that the"
            " regex matches"
        )
    split_paths = (path.split("/") for path in pytree.flatten(params))
    prefixes = dict.fromkeys("/".join(p[:i]) for p in split_paths for i in range(1, len(p)))
    for stack in prefixes:
        first, *others = pytree.expand_stack(stack)
        if not others or len(pytree.expand_stack(stack.rpartition("/")[0])) > 1:
            continue
        for path in [path for path in rates if f"{path}/".startswith(f"{first}/")]:
            inside = path.removeprefix(first)
            if {rates.get(other + inside) for other in others} != {rates[path]}:
                raise UserError(
                    f"train.dropout: the rules treat the blocks of the stack {stack!r} differently "
                    f"({path} in one of them); let them agree, or set model.scan=False"
                )
            rates[stack + inside] = rates[path]
    return {path: rate for path, rate in rates.items() if rate}


def _find_modules(model: nn.Module, images_shape: Sequence[int]) -> dict[str, bool]:
    """Returns {path: whether it is a convolution} of every submodule whose output is [N ...]."""
    is_conv: dict[str, bool] = {}

    def call(function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        y = function(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path and getattr(y, "ndim", 0) > 1:
            path = "/".join(context.module.path)
            is_conv[path] = is_conv.get(path, False) or isinstance(context.module, nn.Conv)
        return y

    images = jax.ShapeDtypeStruct(tuple(images_shape), jnp.float32)
    with nn.intercept_methods(call):
        jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    return is_conv


def intercept(rates: Mapping[str, float], mode: str = "unit") -> Any:
    """Returns a context in which the modules in `rates` get dropout, with keys of stream `STREAM`.

    Outputs are [N H W C], [N T C] or [N C]. Only training uses the context.
    """
    # A module may delegate to another one with the same scope: it gets dropout once.
    inside: list[str] = []

    def call(function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        path = "/".join(context.module.path)
        if context.method_name != "__call__" or path in inside or path not in rates:
            return function(*args, **kwargs)
        inside.append(path)
        try:
            y = function(*args, **kwargs)
        finally:
            inside.pop()
        return drop(y, rates[path], context.module.make_rng(STREAM), mode)

    return nn.intercept_methods(call)


def drop(x: Array, rate: float, key: Array, mode: str) -> Array:
    """Returns x / (1 - rate), [N ... C], with a fraction `rate` of the values set to 0."""
    shape = x.shape if mode == "unit" else (len(x), *[1] * (x.ndim - 2), x.shape[-1])
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x / (1 - rate), 0)


def add_dropout(apply_fn: Callable, rates: Mapping[str, float], mode: str = "unit") -> Callable:
    """Returns `apply_fn` with dropout, for a training step; keys come from the rng "dropout"."""
    if not rates:
        return apply_fn

    @functools.wraps(apply_fn)
    def apply(*args: Any, rngs: Mapping[str, Array], **kwargs: Any) -> Any:
        # A separate stream leaves all other random draws unchanged.
        key = jax.random.fold_in(rngs["dropout"], 1)
        with intercept(rates, mode):
            return apply_fn(*args, rngs={**rngs, STREAM: key}, **kwargs)

    return apply
