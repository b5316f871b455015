"""Writes other libraries' weights as a checkpoint, for `graft` and `experiments.inspect`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import jax

from flax_cnns import tree as pytree
from flax_cnns import weights
from flax_cnns.checkpoint import manager
from flax_cnns.weights import hub


def convert(
    model_name: str,
    source: str,
    out: str | os.PathLike,
    path: str | os.PathLike | None = None,
    *,
    image_size: int = 0,
    channels: int = 0,
    head: bool = True,
    **options: bool,
) -> dict[str, Any]:
    """Writes `load_weights(model_name, source, path, **options)` into the new folder `out`.

    `image_size` and `channels` describe the images that the weights will get; 0 means as in the
    file. `head`: whether the head is kept. `options` are `averaged`, `adapt_stem` and
    `resize_positions`.

    Returns what is also written to `out`/about.json: model, source, the file and its SHA-256, the
    number of parameters and leaves, the `input_size` [H W C] of the images that the weights take,
    the preprocessing, and notes on what was chosen, renamed or adapted. Raises the errors of
    `load_weights` and `manager.write_tree`.
    """
    row = weights.preprocessing(model_name, source)
    out = manager.check_new_folder(out)  # checked before anything is downloaded or read
    file = Path(path).expanduser() if path else hub.fetch(model_name, source)
    fields: dict[str, Any] = {} if head else {"num_classes": None}
    converted = weights.open_weights(
        model_name,
        source,
        file,
        image_size=image_size,
        channels=channels,
        **options,
        **fields,
    )
    tree = converted.tree
    kernel = pytree.flatten(tree).get("params/head/kernel")
    row = row._replace(num_classes=0 if kernel is None else int(kernel.shape[-1]))
    with open(file, "rb") as data:
        sha256 = hashlib.file_digest(data, "sha256").hexdigest()
    about = {
        "model": model_name,
        "source": source,
        "file": file.name,
        "sha256": sha256,
        "params": pytree.count(tree["params"]),
        "leaves": len(jax.tree.leaves(tree)),
        "input_size": converted.input_size,
        "preprocessing": row._asdict(),
        "notes": converted.notes,
    }
    manager.write_tree(out, tree, about)
    return about
