"""Other libraries' tensors in our networks: one file of rules a family, one table a source."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model, init_variables, model_info
from flax_cnns.weights import adapt, files, wrappers
from flax_cnns.weights import name_maps as _rules
from flax_cnns.weights.preprocessing import Preprocessing, preprocessing


class Converted(NamedTuple):
    """What `open_weights` makes of a file."""

    tree: dict[str, dict]  # {"params": ..., "batch_stats": ...}
    input_size: tuple[int, int, int]  # of the images that it takes: H, W, C
    notes: tuple[str, ...]  # what was chosen, renamed or adapted


def load_weights(
    model_name: str,
    source: str,
    path: str | os.PathLike | None = None,
    *,
    averaged: bool = False,
    adapt_stem: bool = False,
    resize_positions: bool = False,
    with_preprocessing: bool = False,
    say: Callable[[str], Any] = print,
    **fields: Any,
) -> dict[str, dict] | tuple[dict[str, dict], Preprocessing]:
    """`{"params": ..., "batch_stats": ...}` of `model_name` with the weights of a file.

    `source`, whose names and layout the tensors have, is one of `model_info(model_name).sources`:
    "torchvision", "timm", "keras" or "efficientnet_lite". `path` is a file that `files.read` can
    read; where it is left out, the source's published ImageNet weights are downloaded once
    (`hub.fetch`). `fields` are the network's. Without `num_classes` the head has the file's own
    classes, and is left out where the file has none or with `num_classes=None`; without
    `input_size` the stem takes the file's own channels, and positions are the file's own grid.
    Arrays are NumPy's.

    `averaged` takes the running averages that a training script put beside the weights. If the
    given `input_size` is not the file's, `adapt_stem` and `resize_positions` fit the weights to it
    (see `adapt`). What was chosen, renamed or adapted goes to `say`, a line each.

    `with_preprocessing` returns `(variables, preprocessing)`: `preprocessing(photo)`, f32
    [1 size size 3], is what these weights were evaluated on, at the size that they take, and its
    `num_classes` is the file's, 0 without a head. The numbers are those of the source's published
    weights: weights that were trained with others take `preprocessing._replace(mean=...)`.

    Raises `UserError` for an unknown name or source, for a file that is missing, damaged, refused
    or of another network, and where a download fails; with the preprocessing also for weights whose
    images are no squares of 3 channels.
    """
    found = open_weights(
        model_name,
        source,
        path,
        averaged=averaged,
        adapt_stem=adapt_stem,
        resize_positions=resize_positions,
        **fields,
    )
    for note in found.notes:
        say(f"note: {note}")
    if not with_preprocessing:
        return found.tree
    return found.tree, _preprocessing_of(model_name, source, found)


def _preprocessing_of(model_name: str, source: str, found: Converted) -> Preprocessing:
    """At the size and with the number of classes that the weights have."""
    head = found.tree["params"].get("head")
    row = preprocessing(model_name, source)._replace(
        num_classes=0 if head is None else int(head["kernel"].shape[-1])
    )
    try:
        return row.for_images(found.input_size, create_model(model_name).input_size)
    except UserError as error:
        raise UserError(f"{model_name} from {source}: {error}") from None


def open_weights(
    model_name: str,
    source: str,
    path: str | os.PathLike | None = None,
    *,
    averaged: bool = False,
    **options: Any,
) -> Converted:
    """Like `load_weights`, but returns the notes too. There are three more options: `optional_head`
    leaves out a head that is not one layer; `image_size` and `channels` are those of the images, in
    place of `input_size`, or 0 for the file's own."""
    _check_source(model_name, source)
    if path is None:
        from flax_cnns.weights import hub

        path = hub.fetch(model_name, source)
    tensors, notes = files.read_contents(path, averaged=averaged)
    try:
        found = _convert(model_name, tensors, source, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except MemoryError:
        raise UserError(f"{path}: its arrays take more memory than there is") from None
    return found._replace(notes=(*notes, *found.notes))


def convert(
    model_name: str,
    tensors: Mapping[str, Any],
    source: str,
    *,
    adapt_stem: bool = False,
    resize_positions: bool = False,
    say: Callable[[str], Any] = print,
    **fields: Any,
) -> dict[str, dict]:
    """`{"params": ..., "batch_stats": ...}` of `model_name` out of another library's tensors.

    `tensors` maps the source's names to arrays in its own order: a state dict (`source` is
    "torchvision", "timm" or "efficientnet_lite"), or `{w.path: w.numpy() for w in model.weights}`
    ("keras", whatever number its automatic names begin with). `model_info(model_name).sources`
    lists what a network takes. Head, stem, positions, `fields`, `adapt_stem`, `resize_positions`
    and `say` are as in `load_weights`. Arrays are copies in NumPy, laid out as ours.

    Raises `UserError` for an unknown name or source, for a tensor that is not used (unless the
    rules name it so), for one that is missing or of another shape, and for numbers that are not
    real.
    """
    options = dict(adapt_stem=adapt_stem, resize_positions=resize_positions)
    found = _convert(model_name, tensors, source, **options, **fields)
    for note in found.notes:
        say(f"note: {note}")
    return found.tree


def _convert(
    model_name: str,
    tensors: Mapping[str, Any],
    source: str,
    *,
    adapt_stem: bool = False,
    resize_positions: bool = False,
    optional_head: bool = False,
    image_size: int = 0,
    channels: int = 0,
    **fields: Any,
) -> Converted:
    what = _check_source(model_name, source)
    family = model_info(model_name).family
    table = importlib.import_module(f"flax_cnns.weights.{family}").TABLES[source]
    model = create_model(model_name, **fields)
    paths = pytree.flatten(_shapes(model))
    notes: list[str] = []
    if isinstance(tensors, Mapping) and source != "keras" and all(type(n) is str for n in tensors):
        tensors = wrappers.unwrap(tensors, notes)
    found = _rules.apply(
        table(model) if callable(table) else table,
        tensors,
        source,
        paths,
        what,
        headless=model.num_classes is None,
        optional_head=optional_head,
        notes=notes,
    )
    if "num_classes" not in fields:
        kernel = found.get("params/head/kernel")
        if kernel is not None:
            fields["num_classes"] = int(kernel.shape[-1])
        elif found and not any(path.startswith(("params/head/", "params/aux")) for path in found):
            fields["num_classes"] = None  # a network that was saved without its head
        model = create_model(model_name, **fields)
        paths = pytree.flatten(_shapes(model))
    if "input_size" not in fields:
        own = _own_size(model.input_size, found, paths)
        size = (image_size or own[0], image_size or own[1], channels or own[2])
        if size != tuple(model.input_size):
            model = create_model(model_name, **fields, input_size=size)
            paths = pytree.flatten(_shapes(model))
            notes.append("the weights are for images [{} {} {}]".format(*size))
    if "input_size" in fields or image_size or channels:
        found = _adapted(
            found, paths, what, model.input_size[2], adapt_stem, resize_positions, notes
        )
    return Converted(_rules.fit(found, paths, what), tuple(model.input_size), tuple(notes))


def _own_size(
    size: tuple[int, int, int], found: Mapping[str, np.ndarray], shapes: Mapping[str, Any]
) -> tuple[int, int, int]:
    """(H, W, C) of the images that tensors are for, as far as stem and positions say it."""
    height, width, channels = size
    for path, array in found.items():
        here = tuple(shapes[path].shape) if path in shapes else array.shape
        if adapt.is_stem(here, array.shape, first=here[2:3] == (size[2],)):
            channels = array.shape[2]
        elif adapt.is_positions(path, here, array.shape):
            patch, tokens = shapes["params/patches/kernel"].shape[0], array.shape[1] - 1
            rows = adapt.side(array.shape[1]) or 1  # not a square: only their number matters
            height, width = rows * patch, tokens // rows * patch
    return height, width, channels


def _adapted(
    found: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    what: str,
    channels: int,
    stem: bool,
    positions: bool,
    notes: list[str],
) -> dict[str, np.ndarray]:
    """The tensors with stem and positions fitted to `shapes`, if `stem` and `positions` say so.
    Raises `UserError` if they do not, and it would help."""
    new = dict(found)
    for path, array in found.items():
        here = tuple(shapes[path].shape) if path in shapes else array.shape
        first = here[2:3] == (channels,)
        plan = adapt.plan(path, here, array.shape, stem=stem, positions=positions, first=first)
        if plan is None:
            continue
        if plan.make is None:
            raise UserError(
                f"{what}: {path} is {list(here)} here and {list(array.shape)} in the file;"
                f" {plan.text}"
            )
        new[path] = plan.make(array)
        notes.append(f"{path}: {plan.text}")
    return new


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
