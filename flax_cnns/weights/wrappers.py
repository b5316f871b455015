"""Finds weights in the checkpoints of training scripts, and removes the prefixes of wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.errors import UserError

# Keys of the trained weights, and of their running averages, in the checkpoints of training scripts
# (PyTorch's examples, torchvision, timm, Lightning, and others).
TRAINED_KEYS = ("state_dict", "model", "model_state_dict")
AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict")
# Prefixes of DataParallel, torch.compile, Lightning, and detectors or self-supervised methods.
PREFIXES = ("module", "_orig_mod", "model", "backbone")
# Names of heads in other networks.
HEADS = ("fc", "head", "heads", "classifier", "last_linear", "linear", "classif", "predictions")
# Names of a loss in training scripts; a loss may have class weights.
LOSSES = ("criterion", "loss", "loss_fn")
_DEPTH = 3
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def choose_weights(tree: Any, *, averaged: bool, notes: list[str]) -> Any:
    """Returns the weights in `tree`, the content of a file.

    They are the whole tree, or the part that a training script saved under one of `TRAINED_KEYS` or
    `AVERAGED_KEYS`. `averaged` chooses the averaged ones. If there was a choice, `notes` gets a
    line. Raises `UserError` if averaged weights are asked for and there are none.
    """
    keys: set[str] = set()
    for _ in range(_DEPTH):  # a pickle may contain itself
        if not isinstance(tree, Mapping) or not (parts := _weight_sets(tree)):
            break
        keys |= parts.keys()
        trained = next((name for name in TRAINED_KEYS if name in parts), "")
        means = next((name for name in AVERAGED_KEYS if name in parts), "")
        taken = means if (averaged and means) or not trained else trained
        if means and taken == trained:
            notes.append(
                f"took {trained!r}; the file also has the averaged weights {means!r}, which the"
                " option averaged takes"
            )
        elif means:
            other = f"the file also has {trained!r}" if trained else "the file has no others"
            notes.append(f"took the averaged weights {means!r}; {other}")
        tree = tree[taken]
    if averaged and not keys & set(AVERAGED_KEYS):
        held = ", ".join(map(repr, sorted(keys))) or "one set of weights without a name"
        raise UserError(
            f"the file has no averaged weights ({', '.join(AVERAGED_KEYS)}), only {held}; leave out"
            " the option averaged"
        )
    return tree


def _weight_sets(tree: Mapping) -> dict[str, Mapping]:
    """The sets of weights that a training script saved, by key."""
    return {
        name: tree[name] for name in (*TRAINED_KEYS, *AVERAGED_KEYS) if _has_arrays(tree.get(name))
    }


def _has_arrays(tree: Any) -> bool:
    """Whether `tree` may hold weights; "model" may also hold the options of a network."""
    return isinstance(tree, Mapping) and any(
        hasattr(value, "shape") or isinstance(value, Mapping) for value in tree.values()
    )


def remove_prefixes(tensors: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The tensors, without the prefixes of wrappers and without the weights of a loss.

    Prefixes may be nested. A head may stand outside a `backbone.`, and a loss outside all prefixes.
    `notes` gets a line on what was removed.
    """
    tensors = dict(tensors)
    prefixes: list[str] = []
    loss_weights: list[str] = []
    while prefix := _prefix(tensors):
        loss_weights += [name for name in tensors if _is_extra(name) and name != _COUNTER]
        tensors = {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in tensors.items()
            if not _is_extra(name)
        }
        prefixes.append(f"{prefix}.")
    if prefixes:
        notes.append(f"removed the wrapper's prefix {''.join(prefixes)!r} from the names")
    if loss_weights:
        notes.append(f"left out the weights of a loss: {', '.join(loss_weights)[:200]}")
    return tensors


def _is_extra(name: str) -> bool:
    """Whether a tensor belongs to a loss or a wrapper, not to the network."""
    return name == _COUNTER or name.partition(".")[0] in LOSSES


def _prefix(tensors: Mapping[str, Any]) -> str:
    """The prefix of all tensors except heads, losses and counters; "" if they share none."""
    names = [name for name in tensors if not _is_extra(name)]
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    prefixes = [prefix for prefix in PREFIXES if prefix in firsts]
    if len(prefixes) != 1 or not firsts - {prefixes[0]} <= set(HEADS):
        return ""
    bare = [name.removeprefix(f"{prefixes[0]}.") for name in names]
    return prefixes[0] if len(set(bare)) == len(bare) else ""
