"""Modes of BatchNorm layers in training: learn everything, freeze the statistics, or freeze all.

Networks contain no code for this: `intercept` changes the layers as they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.types import PyTree

# "train": the layer normalizes by the batch and updates its running statistics.
# "frozen_stats": the layer normalizes by its fixed running statistics; scale and bias learn.
# "frozen": as "frozen_stats", but scale and bias are fixed too.
MODES = ("train", "frozen_stats", "frozen")


def decide_modes(rules: pytree.Rules, trainable: PyTree, batch_stats: PyTree) -> dict[str, str]:
    """Returns `{"stage1/block1/norm1": mode}` for each BatchNorm of `batch_stats`.

    A stack of blocks has one entry. `rules`, from `config.optimizer.bn`, are (regex of the path,
    mode). `trainable` has a bool for each parameter.

    Without rules, a layer is "frozen" if none of its parameters learns. A layer without parameters
    is "frozen" if, in the nearest enclosing module that has parameters, no parameter learns.

    Raises `UserError` if a rule decides nothing, if no rule decides a layer, or if the blocks of a
    stack get different modes.
    """
    leaves = (path.rpartition("/") for path in pytree.flatten(batch_stats))
    layers = [layer for layer, _, name in leaves if layer and name == "mean"]
    if not rules:
        flat = pytree.flatten(trainable)
        return {layer: "train" if _learns(layer, flat) else "frozen" for layer in layers}
    named = [name for layer in layers for name in pytree.expand_stack(layer)]
    decided = pytree.match(rules, named, what="optimizer.bn")
    modes = {}
    for layer in layers:
        block_modes = {decided[name] for name in pytree.expand_stack(layer)}
        if len(block_modes) > 1:
            raise UserError(
                f"optimizer.bn: the rules treat the blocks of the stack {layer!r} differently; let "
                "them agree, or set model.scan=False"
            )
        (modes[layer],) = block_modes
    return modes


def _learns(layer: str, trainable: Mapping[str, bool]) -> bool:
    """Whether a parameter of the layer learns; of the nearest enclosing module that has parameters,
    if the layer has none."""
    while True:
        prefix = f"{layer}/" if layer else ""
        inside = [learns for path, learns in trainable.items() if path.startswith(prefix)]
        if inside or not layer:
            return any(inside)
        layer = layer.rpartition("/")[0]


def has_mode(tree: PyTree, modes: Mapping[str, str], mode: str) -> PyTree:
    """Returns a bool for each leaf of `tree` (params or batch_stats): whether its layer has `mode`.

    Leaves outside BatchNorm layers count as "train".
    """
    leaves = [modes.get(path.rpartition("/")[0], "train") == mode for path in pytree.flatten(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def intercept(modes: Mapping[str, str], *, momentum: float | None = None) -> Any:
    """Returns a context in which every BatchNorm that is called in training follows its mode.

    `momentum`, if given, replaces the momentum of the layers whose mode is "train".
    """

    def call(function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        layer = context.module
        training = isinstance(layer, nn.BatchNorm) and not layer.use_running_average
        if not training or context.method_name != "__call__":
            return function(*args, **kwargs)
        changes: dict[str, Any] = {}
        if modes.get("/".join(layer.path), "train") != "train":
            changes["use_running_average"] = True
        elif momentum not in (None, layer.momentum):
            changes["momentum"] = momentum
        if not changes:
            return function(*args, **kwargs)
        # The clone shares the layer's scope, and so its variables.
        return layer.clone(parent=layer.scope, **changes)(*args, **kwargs)

    return nn.intercept_methods(call)
