"""Other libraries' tensors in our networks: one file of rules a family, one table a source."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from flax_cnns import pytree
from flax_cnns.errors import UserError
from flax_cnns.registry import create_model, init_variables, model_info
from flax_cnns.weights import files
from flax_cnns.weights import rules as _rules
from flax_cnns.weights.preprocessing import Preprocessing, preprocessing


def load_weights(
    model_name: str, source: str, path: str | os.PathLike | None = None, **fields: Any
) -> dict[str, dict]:
    """`{"params": ..., "batch_stats": ...}` of `model_name` with the weights of a file.

    `source`, whose names and layout the tensors have, is one of `model_info(model_name).sources`:
    "torchvision", "timm", "keras" or "efficientnet_lite". `path` is a file that `files.read` can
    read; where it is left out, the source's published ImageNet weights are downloaded once
    (`hub.fetch`). The head has the file's own classes, and is left out where the file has none or
    with `num_classes=None`; `fields` are the network's. Arrays are NumPy's.

    Raises `UserError` for an unknown name or source, for a file that is missing, damaged, refused
    or of another network, and where a download fails.
    """
    _check_source(model_name, source)
    if path is None:
        from flax_cnns.weights import hub

        path = hub.fetch(model_name, source)
    tensors = files.read(path)
    try:
        return convert(model_name, tensors, source, **fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def convert(
    model_name: str, tensors: Mapping[str, Any], source: str, **fields: Any
) -> dict[str, dict]:
    """`{"params": ..., "batch_stats": ...}` of `model_name` out of another library's tensors.

    `tensors` maps the source's names to arrays in its own order: a state dict (`source` is
    "torchvision", "timm" or "efficientnet_lite"), or `{w.path: w.numpy() for w in model.weights}`
    ("keras", whatever number its automatic names begin with). `model_info(model_name).sources`
    lists what a network takes. The head has as many classes as the tensors, and is left out where
    they have none or with `num_classes=None`; `fields` are the network's. Arrays are copies in
    NumPy, laid out as ours.

    Raises `UserError` for an unknown name or source, for a tensor that is not used (unless the
    rules name it so), and for one that is missing or of another shape.
    """
    what = _check_source(model_name, source)
    family = model_info(model_name).family
    table = importlib.import_module(f"flax_cnns.weights.{family}").TABLES[source]
    model = create_model(model_name, **fields)
    paths = pytree.flatten(_shapes(model))
    found = _rules.apply(
        table(model) if callable(table) else table,
        tensors,
        source,
        paths,
        what,
        headless=model.num_classes is None,
    )
    if "num_classes" not in fields:
        kernel = found.get("params/head/kernel")
        if kernel is not None:
            fields["num_classes"] = int(kernel.shape[-1])
        elif found and not any(path.startswith(("params/head/", "params/aux")) for path in found):
            fields["num_classes"] = None  # a network that was saved without its head
        paths = pytree.flatten(_shapes(create_model(model_name, **fields)))
    return _rules.fit(found, paths, what)


def _check_source(model_name: str, source: str) -> str:
    """How messages begin. Raises `UserError` where the source does not have the network."""
    what, sources = f"{model_name} from {source}", model_info(model_name).sources
    if not sources:
        raise UserError(f"{what}: no other library has this network")
    if source not in sources:
        raise UserError(f"{what}: expected tensors of {' or '.join(sources)}")
    return what


def _shapes(model: Any) -> dict[str, Any]:
    return jax.eval_shape(partial(init_variables, model), jax.random.key(0))


__all__ = ["Preprocessing", "convert", "load_weights", "preprocessing"]
