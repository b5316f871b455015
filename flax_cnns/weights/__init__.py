"""Weights of other libraries for our networks.

Each family of networks has a file with its name rules, one table per source.
"""

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
from flax_cnns.weights import adapt, files, name_maps, wrappers
from flax_cnns.weights.preprocessing import Preprocessing, preprocessing


class ConvertedWeights(NamedTuple):
    """Weights in our layout, as `open_weights` returns them."""

    tree: dict[str, dict]  # {"params": ..., "batch_stats": ...}
    input_size: tuple[int, int, int]  # (H, W, C) of the images that the weights take
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
    """Returns `{"params": ..., "batch_stats": ...}` of `model_name` with the weights of a file.

    `source` is the library whose names and layout the tensors have, one of
    `model_info(model_name).sources`: "torchvision", "timm", "keras" or "efficientnet_lite". `path`
    is a file that `files.read` can read. If `path` is None, the source's published ImageNet weights
    are downloaded once (`hub.fetch`). `fields` are fields of the network:

    - Without `num_classes`, the head has as many classes as the file. The head is left out if the
      file has no head, or with `num_classes=None`.
    - Without `input_size`, the stem takes as many channels as in the file, and the grid of position
      embeddings is the file's.

    The arrays are NumPy arrays.

    `averaged` takes the running averages that a training script saved with the weights. If the
    given `input_size` differs from the file's, `adapt_stem` and `resize_positions` fit the weights
    to `input_size` (see `adapt`). `say` is called with one line for each thing that was chosen,
    renamed or adapted.

    `with_preprocessing` returns `(variables, preprocessing)`. `preprocessing(photo)` is f32
    [1 size size 3], prepared as for the evaluation of the published weights, at the size that these
    weights take. Its `num_classes` is that of the file, 0 without a head. If your weights were
    trained with other numbers, use `preprocessing._replace(mean=...)`.

    Raises `UserError` for an unknown name or source, for a file that is missing, damaged, refused
    or of another network, and if a download fails. With `with_preprocessing` also for weights whose
    images are not squares of 3 channels.
    """
    converted = open_weights(
        model_name,
        source,
        path,
        averaged=averaged,
        adapt_stem=adapt_stem,
        resize_positions=resize_positions,
        **fields,
    )
    for note in converted.notes:
        say(f"note: {note}")
    if not with_preprocessing:
        return converted.tree
    return converted.tree, _preprocessing_of(model_name, source, converted)


def _preprocessing_of(model_name: str, source: str, converted: ConvertedWeights) -> Preprocessing:
    """The preprocessing, with the image size and the number of classes of the weights."""
    head = converted.tree["params"].get("head")
    row = preprocessing(model_name, source)._replace(
        num_classes=0 if head is None else int(head["kernel"].shape[-1])
    )
    try:
        return row.for_images(converted.input_size, create_model(model_name).input_size)
    except UserError as error:
        raise UserError(f"{model_name} from {source}: {error}") from None


def open_weights(
    model_name: str,
    source: str,
    path: str | os.PathLike | None = None,
    *,
    averaged: bool = False,
    **options: Any,
) -> ConvertedWeights:
    """Like `load_weights`, but returns the notes too.

    Three more options: `optional_head` leaves out a head of several layers. `image_size` and
    `channels` describe the images, in place of `input_size`; 0 means as in the file.
    """
    _check_source(model_name, source)
    if path is None:
        from flax_cnns.weights import hub

        path = hub.fetch(model_name, source)
    tensors, notes = files.read_contents(path, averaged=averaged)
    try:
        converted = _convert(model_name, tensors, source, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except MemoryError:
        raise UserError(f"{path}: its arrays need more memory than there is") from None
    return converted._replace(notes=(*notes, *converted.notes))


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
    """Converts another library's tensors to `{"params": ..., "batch_stats": ...}` of `model_name`.

    `tensors` maps the source's names to arrays in the source's layout. For "torchvision", "timm"
    and "efficientnet_lite" that is a state dict. For "keras" it is
    `{w.path: w.numpy() for w in model.weights}`; its automatic names may start at any number.
    `model_info(model_name).sources` lists the sources of a network. Head, stem, positions,
    `fields`, `adapt_stem`, `resize_positions` and `say` are as in `load_weights`. The arrays are
    NumPy copies in our layout.

    Raises `UserError` for an unknown name or source, for a tensor without a place in the network
    (unless a rule marks the tensor as unused), for a tensor that is missing or has another shape,
    and for a tensor that does not hold real numbers.
    """
    options = dict(adapt_stem=adapt_stem, resize_positions=resize_positions)
    converted = _convert(model_name, tensors, source, **options, **fields)
    for note in converted.notes:
        say(f"note: {note}")
    return converted.tree


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
) -> ConvertedWeights:
    what = _check_source(model_name, source)
    family = model_info(model_name).family
    table = importlib.import_module(f"flax_cnns.weights.{family}").TABLES[source]
    model = create_model(model_name, **fields)
    paths = pytree.flatten(_shapes(model))
    notes: list[str] = []
    if isinstance(tensors, Mapping) and source != "keras" and all(type(n) is str for n in tensors):
        tensors = wrappers.remove_prefixes(tensors, notes)
    arrays = name_maps.apply_rules(
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
        kernel = arrays.get("params/head/kernel")
        if kernel is not None:
            fields["num_classes"] = int(kernel.shape[-1])
        elif arrays and not any(path.startswith(("params/head/", "params/aux")) for path in arrays):
            fields["num_classes"] = None  # the network was saved without its head
        model = create_model(model_name, **fields)
        paths = pytree.flatten(_shapes(model))
    if "input_size" not in fields:
        own = _own_size(model.input_size, arrays, paths)
        size = (image_size or own[0], image_size or own[1], channels or own[2])
        if size != tuple(model.input_size):
            model = create_model(model_name, **fields, input_size=size)
            paths = pytree.flatten(_shapes(model))
            notes.append("the weights are for images [{} {} {}]".format(*size))
    if "input_size" in fields or image_size or channels:
        arrays = _adapted(
            arrays, paths, what, model.input_size[2], adapt_stem, resize_positions, notes
        )
    return ConvertedWeights(
        name_maps.make_tree(arrays, paths, what), tuple(model.input_size), tuple(notes)
    )


def _own_size(
    size: tuple[int, int, int], arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any]
) -> tuple[int, int, int]:
    """(H, W, C) of the images that the tensors take, as far as stem and positions determine it.

    `size` gives what they do not determine.
    """
    height, width, channels = size
    for path, array in arrays.items():
        here = tuple(shapes[path].shape) if path in shapes else array.shape
        if adapt.is_stem(here, array.shape, first=here[2:3] == (size[2],)):
            channels = array.shape[2]
        elif adapt.is_position_embedding(path, here, array.shape):
            patch, tokens = shapes["params/patches/kernel"].shape[0], array.shape[1] - 1
            # If the grid is not a square, any image with this number of patches will do.
            rows = adapt.grid_side(array.shape[1]) or 1
            height, width = rows * patch, tokens // rows * patch
    return height, width, channels


def _adapted(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    what: str,
    channels: int,
    stem: bool,
    positions: bool,
    notes: list[str],
) -> dict[str, np.ndarray]:
    """The tensors, with the stem (if `stem`) and positions (if `positions`) fitted to `shapes`.

    Raises `UserError` if one of these options is off and would make the tensors fit.
    """
    new = dict(arrays)
    for path, array in arrays.items():
        here = tuple(shapes[path].shape) if path in shapes else array.shape
        first = here[2:3] == (channels,)
        plan = adapt.make_plan(path, here, array.shape, stem=stem, positions=positions, first=first)
        if plan is None:
            continue
        if plan.adapt is None:
            raise UserError(
                f"{what}: {path} is {list(here)} in the network and {list(array.shape)} in the"
                f" file; {plan.description}"
            )
        new[path] = plan.adapt(array)
        notes.append(f"{path}: {plan.description}")
    return new


def _check_source(model_name: str, source: str) -> str:
    """The beginning of messages. Raises `UserError` if the source does not have the network."""
    what, sources = f"{model_name} from {source}", model_info(model_name).sources
    if not sources:
        raise UserError(f"{what}: no other library has weights for this network")
    if source not in sources:
        raise UserError(f"{what}: expected {' or '.join(sources)} as the source")
    return what


def _shapes(model: Any) -> dict[str, Any]:
    return jax.eval_shape(partial(init_variables, model), jax.random.key(0))


__all__ = ["Preprocessing", "convert", "load_weights", "preprocessing"]
