"""Other libraries' tensors in our networks: one file of rules a family, one table a source."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from flax_cnns import pytree
from flax_cnns.errors import UserError
from flax_cnns.registry import create_model, init_variables, model_info
from flax_cnns.weights import rules as _rules


def convert(
    model_name: str, tensors: Mapping[str, Any], source: str, **fields: Any
) -> dict[str, dict]:
    """`{"params": ..., "batch_stats": ...}` of `model_name` out of another library's tensors.

    `tensors` maps the source's names to arrays in its own order: a state dict (`source` is
    "torchvision" or "timm"), or `{w.path: w.numpy() for w in model.weights}` ("keras", whatever
    number its automatic names begin with). `model_info(model_name).sources` lists what a network
    takes. The head has as many classes as the tensors, or is left out with `num_classes=None`;
    `fields` are the network's. Arrays are copies in NumPy, laid out as ours.

    Raises `UserError` for an unknown name or source, for a tensor that is not used (unless the
    rules name it so), and for one that is missing or of another shape.
    """
    info = model_info(model_name)
    what = f"{model_name} from {source}"
    if source not in info.sources:
        if not info.sources:
            raise UserError(f"{what}: no other library has this network")
        raise UserError(f"{what}: expected tensors of {' or '.join(info.sources)}")
    table = importlib.import_module(f"flax_cnns.weights.{info.family}").TABLES[source]
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
    kernel = found.get("params/head/kernel")
    if "num_classes" not in fields and kernel is not None:
        model = create_model(model_name, **fields, num_classes=int(kernel.shape[-1]))
        paths = pytree.flatten(_shapes(model))
    return _rules.fit(found, paths, what)


def _shapes(model: Any) -> dict[str, Any]:
    return jax.eval_shape(partial(init_variables, model), jax.random.key(0))


__all__ = ["convert"]
