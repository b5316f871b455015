"""The images that excite a unit most, and the patches of these that the unit sees.

Zeiler & Fergus 2014, arXiv 1311.2901, figure 2. A unit is a channel of a module's output.

    tops = find_top_images(model, variables, batches, "conv3", [0, 1])
    field = find_receptive_fields(model, variables, tops[0].images)["conv3"]
    patches = cut_patches(tops[0].images, tops[0].positions, field)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.explain.targets import check_unit
from flax_cnns.analysis.receptive_field import ReceptiveField
from flax_cnns.errors import UserError
from flax_cnns.types import Array

BORDER = 0.5  # the gray outside the image


class TopImages(NamedTuple):
    """The strongest images of one unit, the strongest first."""

    unit: int
    activations: np.ndarray  # f32 [K], the largest of each image
    numbers: np.ndarray  # i64 [K], of the images, in the order of the batches, without fillers
    positions: np.ndarray  # i64 [K 2], row and column in the module's map; 0, 0 without a map
    images: np.ndarray  # [K H W C], as in the batches


def find_top_images(
    model: nn.Module,
    variables: Variables,
    batches: Iterable[Array | np.ndarray | tuple[np.ndarray, np.ndarray]],
    path: str,
    units: Sequence[int],
    *,
    normalize: Callable[[Array], Array] = lambda images: images,
    count: int = 9,
) -> list[TopImages]:
    """Returns the `count` images with the largest activation of each unit of the module `path`.

    `batches`: images [n H W C], or (images, mask [n]), where mask 0 marks images that fill a batch
    and are not counted. The network sees `normalize(images)`. Each image counts once, with its
    largest activation. Of equal activations, the earlier image and the upper left position win.
    Only the best images of each unit stay in memory. Fewer images than `count` are all returned.

    Raises `UserError` for an unknown path or unit, an output of tokens, an activation that is not
    finite, and if there are no images.
    """
    model, variables = tap.unroll(model, variables)
    tops: list[TopImages] = []
    seen = 0
    for batch in batches:
        images, mask = batch if isinstance(batch, tuple) else (batch, np.ones(len(batch)))
        inputs = normalize(jnp.asarray(images))
        if not tops:
            _check(model, variables, inputs, path, units)
            tops = [_make_empty(unit, images) for unit in units]
        found = _find_largest(model, variables, inputs, path, jnp.asarray(units, jnp.int32))
        real = np.flatnonzero(mask)
        values, positions = (np.asarray(each)[:, real] for each in found)
        if not np.isfinite(values).all():
            raise UserError(f"the output of {path!r} is not finite")
        numbers, images = seen + np.arange(len(real)), np.asarray(images)[real]
        tops = [
            _merge(top, TopImages(top.unit, value, numbers, position, images), count)
            for top, value, position in zip(tops, values, positions)
        ]
        seen += len(real)
    if not seen:
        raise UserError("expected at least one image, got none")
    return tops


def cut_patches(
    images: np.ndarray,
    positions: np.ndarray,
    field: ReceptiveField | None,
    *,
    border: float = BORDER,
) -> np.ndarray:
    """Returns the patches [K h w C] of images f32 [K H W C] that maps see at `positions` [K 2].

    Pixels outside the image have the value `border`. An axis along which the field is larger than
    the image is not cut. Without a field, the whole images are returned.
    """
    if field is None:
        return images
    return np.stack([_cut(*pair, field, border) for pair in zip(images, positions)])


def _cut(
    image: np.ndarray, position: np.ndarray, field: ReceptiveField, border: float
) -> np.ndarray:
    for axis in (0, 1):
        size, length = field.size[axis], image.shape[axis]
        if size > length:
            continue
        first = field.start[axis] + int(position[axis]) * field.stride[axis]
        wanted = np.arange(first, first + size)
        inside = (wanted >= 0) & (wanted < length)
        image = np.take(image, np.clip(wanted, 0, length - 1), axis)
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        image = np.where(inside.reshape(shape), image, np.asarray(border, image.dtype))
    return image


def _check(
    model: nn.Module, variables: Variables, inputs: Array, path: str, units: Sequence[int]
) -> None:
    outputs = tap.list_outputs(model, variables, inputs)
    tap.check_path(path, outputs)
    shape = outputs[path].shape
    if len(shape) not in (2, 4):
        raise UserError(
            f"{path!r} gives {list(shape)}: expected maps [N H W C], or [N C], for the strongest"
            " images of a unit"
        )
    for unit in units:
        check_unit(path, unit, shape)


def _make_empty(unit: int, images: Array | np.ndarray) -> TopImages:
    nothing = np.zeros(0, np.int64)
    pixels = np.zeros((0, *images.shape[1:]), images.dtype)
    return TopImages(unit, np.zeros(0, np.float32), nothing, nothing.reshape(0, 2), pixels)


def _merge(old: TopImages, new: TopImages, count: int) -> TopImages:
    values = np.concatenate([old.activations, new.activations])
    best = np.argsort(-values, kind="stable")[:count]  # stable: earlier images stay in front
    if len(best) == len(old.activations) and (best < len(old.activations)).all():
        return old
    return TopImages(old.unit, *(np.concatenate(pair)[best] for pair in zip(old[1:], new[1:])))


@tracing.jit("path")
def _find_largest(
    model: nn.Module, variables: Variables, images: Array, path: str, units: Array
) -> tuple[Array, Array]:
    """Returns the largest activations f32 [U N], and their positions i32 [U N 2]."""
    output = tap.capture(model, variables, images, {path.partition("[")[0]})[path]
    maps = output if output.ndim == 4 else output[:, None, None]
    width = maps.shape[2]
    flat = jnp.take(maps, units, axis=-1).astype(jnp.float32)
    flat = jnp.moveaxis(flat, -1, 0).reshape(len(units), len(images), -1)
    best = flat.argmax(-1)
    return flat.max(-1), jnp.stack([best // width, best % width], -1)
