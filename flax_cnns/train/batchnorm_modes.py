"""What each BatchNorm does in training: learn, keep its statistics, or keep everything.

No network knows of it: `intercept` changes the layers as they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.types import PyTree

# "train": normalizes by the batch, and the running statistics move.
# "frozen_stats": by the running statistics, which stay; scale and bias learn.
# "frozen": as that, and scale and bias stay too.
MODES = ("train", "frozen_stats", "frozen")


def decide_modes(rules: pytree.Rules, trainable: PyTree, batch_stats: PyTree) -> dict[str, str]:
    """`{"stage1/block1/norm1": mode}` for each BatchNorm that `batch_stats` has, a stack being one.

    `rules` (regex over such paths, mode) are `config.optimizer.bn`. Without any a layer is "frozen"
    where `trainable`, bools in the shape of the params, freezes all that it has; where it has
    neither scale nor bias, all that stands beside it. Raises `UserError` for a rule that decides
    nothing, a layer that none decides, and a stack whose blocks differ.
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
        found = {decided[name] for name in pytree.expand_stack(layer)}
        if len(found) > 1:
            raise UserError(
                f"optimizer.bn: the rules treat the blocks of the stack {layer!r} differently; let "
                "them agree, or set model.scan=False"
            )
        (modes[layer],) = found
    return modes


def _learns(layer: str, trainable: Mapping[str, bool]) -> bool:
    """Whether a parameter of the layer learns, or of the nearest module around it that has any."""
    while True:
        prefix = f"{layer}/" if layer else ""
        own = [learns for path, learns in trainable.items() if path.startswith(prefix)]
        if own or not layer:
            return any(own)
        layer = layer.rpartition("/")[0]


def has_mode(tree: PyTree, modes: Mapping[str, str], mode: str) -> PyTree:
    """Bools in the shape of `tree` (params or batch_stats): whether the leaf's layer has that mode.
    What is of no BatchNorm counts as "train"."""
    found = [modes.get(path.rpartition("/")[0], "train") == mode for path in pytree.flatten(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def intercept(modes: Mapping[str, str], *, momentum: float | None = None) -> Any:
    """A context in which every BatchNorm that is called in training follows its mode, and those
    that train move their running statistics by `momentum`, if given, in place of their own."""

    def call(function: Callable, args: tuple, kwargs: dict, at: nn.module.InterceptorContext):
        layer = at.module
        training = isinstance(layer, nn.BatchNorm) and not layer.use_running_average
        if not training or at.method_name != "__call__":
            return function(*args, **kwargs)
        changes: dict[str, Any] = {}
        if modes.get("/".join(layer.path), "train") != "train":
            changes["use_running_average"] = True
        elif momentum not in (None, layer.momentum):
            changes["momentum"] = momentum
        if not changes:
            return function(*args, **kwargs)
        # The same layer with other fields: it shares the scope, and so the variables.
        return layer.clone(parent=layer.scope, **changes)(*args, **kwargs)

    return nn.intercept_methods(call)
