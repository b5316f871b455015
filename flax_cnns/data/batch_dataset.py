"""Data sets of a user's own batches: checked by `Dataset.from_batches`, completed when a run
starts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flax_cnns.config import DEFAULTS
from flax_cnns.data import input_checks
from flax_cnns.data.array_dataset import Normalization, check_augment, resolve_mean_and_std
from flax_cnns.data.known_datasets import IMAGENET
from flax_cnns.data.splits import find_notes
from flax_cnns.data.statistics import convert_to_channels
from flax_cnns.data.streams import alternates_flips
from flax_cnns.data.types import Dataset, Split
from flax_cnns.errors import UserError, did_you_mean

SPLITS = ("train", "test", "validation")


# ---- checking the arguments


def from_batches(
    factory: Callable[[str, int, int, int], Iterable[Any]],
    sizes: Mapping[str, int],
    image_shape: Sequence[int],
    *,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    task: str,
    normalize: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    name: str,
) -> Dataset:
    """See `Dataset.from_batches`."""
    input_checks.check_task(task)
    _check_factory(factory)
    _check_sizes(sizes)
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(_is_positive_integer(side) for side in shape):
        raise UserError(f"image_shape: expected (height, width, channels), got {image_shape!r}")
    height, width, channels = map(int, shape)
    count = input_checks.check_class_count(class_names, num_classes)
    if count < (2 if task == "classes" else 1):
        problem = f"got {count}" if count else "give num_classes= or class_names="
        raise UserError(f"expected two classes or more; {problem}")
    means, stds = input_checks.check_mean_and_std(mean, std, channels, normalize)
    return Dataset(
        name=name,
        num_classes=count,
        class_names=tuple(map(str, range(count) if class_names is None else class_names)),
        image_shape=(height, width, channels),
        mean=means,
        std=stds,
        normalized_by="data set" if means else "",
        splits={s: Split(labels=None, count=int(sizes[s])) for s in SPLITS if s in sizes},
        task=task,
        normalize=normalize,
        factory=factory,
    )


def _check_factory(factory: Any) -> None:
    expected = (
        "a function of (split, start_step, process_index, process_count) that returns batches"
    )
    if not callable(factory):
        got = input_checks.describe_value(factory)
        raise UserError(f"factory: expected {expected}, got {got}")
    try:
        inspect.signature(factory).bind("train", 0, 0, 1)
    except TypeError as error:
        raise UserError(
            f"factory: expected {expected}, but it takes other arguments: {error}"
        ) from error
    except ValueError:  # a callable written in C has no signature
        pass


def _check_sizes(sizes: Mapping[str, int]) -> None:
    if not isinstance(sizes, Mapping):
        raise UserError(f"sizes: expected {{'train': N, 'test': M}}, got {sizes!r}")
    for split, size in sizes.items():
        if split not in SPLITS:
            raise UserError(f"sizes: there is no split {split!r}{did_you_mean(str(split), SPLITS)}")
        if not _is_positive_integer(size):
            raise UserError(f"sizes[{split!r}]: expected a whole number above 0, got {size!r}")
    if missing := [split for split in SPLITS[:2] if split not in sizes]:
        raise UserError(f"sizes: expected 'train' and 'test', but {missing[0]!r} is missing")


def _is_positive_integer(value: Any) -> bool:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_integer and bool(value > 0)


# ---- fitting the data set to a run


def apply_config(data: Dataset, config: Any) -> Dataset:
    """Returns a data set of `from_batches` as a run uses it, with mean, std, notes and fingerprint.
    `config` is a run's `config.data`.

    Raises UserError if the config asks for other examples or another order. If `data.validation`
    has its default value but there is no validation split, a note says so.
    """
    has_own_validation = "validation" in data.splits
    wants_validation = config.validation not in (0, DEFAULTS["data.validation"])
    impossible = {
        "mock": config.mock,
        "classes": config.classes,
        "fraction": config.fraction < 1,
        "validation": wants_validation and not has_own_validation,
    }
    remedies = {
        "validation": "give sizes['validation'], or set data.validation=0",
        "mock": "set data.mock=0",
    }
    for name in (name for name, wanted in impossible.items() if wanted):
        remedy = remedies.get(name, "choose the examples in the factory")
        raise UserError(
            f"data.{name}={config[name]!r} does not apply to your own batches ({data.name}), whose"
            f" order is fixed; {remedy}"
        )
    if alternates_flips(config.augment):
        raise UserError(
            "data.augment.alternate_flip needs to know the epochs of each image, which batches of"
            " Dataset.from_batches do not tell; leave it at False"
        )
    check_augment(data, config)
    if config.augment.pca:
        raise UserError(
            "data.augment.pca needs the colors of all training images before the first step, but"
            f" {data.name} only gives batches; set it to 0"
        )
    mean, std, normalized_by = resolve_mean_and_std(data, config, lambda: _imagenet(data))
    notes = find_notes(data.splits, data.class_names, config.batch_size)
    if not has_own_validation:
        notes.append("there is no validation split; pass sizes['validation'] to from_batches")
    if normalized_by == "ImageNet":
        notes.append("normalized by ImageNet's mean and std; pass mean= and std= to from_batches")
    return dataclasses.replace(
        data,
        mean=mean,
        std=std,
        normalized_by=normalized_by,
        notes=(*data.notes, *notes),
        has_own_validation=has_own_validation,
        fingerprint=make_fingerprint(data),
    )


def make_fingerprint(data: Dataset) -> dict[str, Any]:
    """Returns the part of a fingerprint that needs no batch: see flax_cnns/data/fingerprint.py."""
    return {
        "reader": "batches",
        "classes": list(data.class_names),
        "splits": {role: {"images": len(split)} for role, split in data.splits.items()},
    }


def _imagenet(data: Dataset) -> Normalization:
    channels = data.image_shape[-1]
    if channels not in (1, 3):
        raise UserError(f"{data.name} has {channels} channels: give from_batches mean= and std=")
    return *convert_to_channels(IMAGENET, channels), "ImageNet"
