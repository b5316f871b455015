"""What stands around the weights in a file: a training script's checkpoint, a wrapper's prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.errors import UserError

# The weights as they were trained, and their running average, in the checkpoints of training
# scripts (PyTorch's examples, torchvision, timm, Lightning, and others).
TRAINED = ("state_dict", "model", "model_state_dict")
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")
# DataParallel's, torch.compile's, Lightning's and a detector's or self-supervised method's.
PREFIXES = ("module", "_orig_mod", "model", "backbone")
# What networks call their heads.
HEADS = ("fc", "head", "heads", "classifier", "last_linear", "linear", "classif", "predictions")
# How training scripts call a loss, which may have weights of classes.
LOSSES = ("criterion", "loss", "loss_fn")
_DEPTH = 3
_COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel's


def choose(tree: Any, *, averaged: bool, notes: list[str]) -> Any:
    """The weights in what was saved: all of it, or the part that a training script put under a
    name.

    `averaged` takes those of `AVERAGED`. `notes` gets what was taken if there was a choice. Raises
    `UserError` if averaged weights are asked for and there are none.
    """
    inner = {}
    for _ in range(_DEPTH):  # a pickle may hold itself
        if not isinstance(tree, Mapping) or not (found := _inside(tree)):
            break
        inner |= found
        trained = next((name for name in TRAINED if name in found), "")
        means = next((name for name in AVERAGED if name in found), "")
        taken = means if (averaged and means) or not trained else trained
        if means and taken == trained:
            notes.append(
                f"took {trained!r}; the averaged weights {means!r} are there too, and the option"
                " averaged takes them"
            )
        elif means:
            beside = f"; {trained!r} is there too" if trained else ", the only ones there"
            notes.append(f"took {means!r}, the averaged weights{beside}")
        tree = tree[taken]
    if averaged and not set(inner) & set(AVERAGED):
        held = "it holds " + (", ".join(map(repr, inner)) or "one set of weights without a name")
        raise UserError(
            f"there are no averaged weights ({', '.join(AVERAGED)}): {held}; leave out averaged"
        )
    return tree


def _inside(tree: Mapping) -> dict[str, Mapping]:
    return {name: tree[name] for name in (*TRAINED, *AVERAGED) if _has_arrays(tree.get(name))}


def _has_arrays(tree: Any) -> bool:
    """Whether that may be weights: "model" may also be a network's options."""
    return isinstance(tree, Mapping) and any(
        hasattr(value, "shape") or isinstance(value, Mapping) for value in tree.values()
    )


def unwrap(tensors: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The tensors without the prefixes that wrappers put before all names, in any nesting.

    A head may stand outside a `backbone.`, and a loss outside of all. `notes` gets what was
    removed.
    """
    tensors, taken, left = dict(tensors), [], []
    while prefix := _prefix(tensors):
        left += [name for name in tensors if _is_beside(name) and name != _COUNTER]
        tensors = {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in tensors.items()
            if not _is_beside(name)
        }
        taken.append(f"{prefix}.")
    if taken:
        notes.append(f"removed {''.join(taken)!r}, the prefix of a wrapper, from the names")
    if left:
        notes.append(f"left out a loss's {', '.join(left)[:200]}")
    return tensors


def _is_beside(name: str) -> bool:
    return name == _COUNTER or name.partition(".")[0] in LOSSES


def _prefix(tensors: Mapping[str, Any]) -> str:
    """The wrapper around all tensors but heads, losses and counters; "" if there is none."""
    names = [name for name in tensors if not _is_beside(name)]
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    found = [prefix for prefix in PREFIXES if prefix in firsts]
    if len(found) != 1 or not firsts - {found[0]} <= set(HEADS):
        return ""
    bare = [name.removeprefix(f"{found[0]}.") for name in names]
    return found[0] if len(set(bare)) == len(bare) else ""
