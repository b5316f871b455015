"""Other libraries' weights as a checkpoint of ours, for `graft` and `experiments.inspect`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import jax

from flax_cnns import pytree, weights
from flax_cnns.checkpoint import manager
from flax_cnns.weights import hub


def convert(
    model_name: str,
    source: str,
    out: str | os.PathLike,
    path: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Writes `load_weights(model_name, source, path)` into the new folder `out`.

    Returns what it also writes into `out`/about.json: model, source, the file and its SHA-256, the
    number of parameters, the preprocessing. Raises `UserError` as `load_weights` and
    `manager.write_tree` do.
    """
    seen = weights.preprocessing(model_name, source)
    out = manager.new_folder(out)  # told before anything is downloaded or read
    file = Path(path).expanduser() if path else hub.fetch(model_name, source)
    tree = weights.load_weights(model_name, source, file)
    head = pytree.flatten(tree).get("params/head/kernel")
    seen = seen._replace(num_classes=0 if head is None else int(head.shape[-1]))  # the file's own
    with open(file, "rb") as data:
        sha256 = hashlib.file_digest(data, "sha256").hexdigest()
    about = {
        "model": model_name,
        "source": source,
        "file": file.name,
        "sha256": sha256,
        "params": pytree.count(tree["params"]),
        "leaves": len(jax.tree.leaves(tree)),
        "preprocessing": seen._asdict(),
    }
    manager.write_tree(out, tree, about)
    return about
