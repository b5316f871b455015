"""A user's own batches as a data set: what it is, and what a run makes of it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flax_cnns.config import DEFAULTS
from flax_cnns.data import input_checks
from flax_cnns.data.array_dataset import check_augment, resolve_mean_and_std
from flax_cnns.data.known_datasets import IMAGENET
from flax_cnns.data.splits import find_notes
from flax_cnns.data.statistics import convert_to_channels
from flax_cnns.data.types import Dataset, Split
from flax_cnns.errors import UserError, did_you_mean

SPLITS = ("train", "test", "validation")


# ---- what is given


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
    if len(shape) != 3 or not all(_is_count(side) for side in shape):
        raise UserError(f"image_shape: expected (height, width, channels), got {image_shape!r}")
    count = input_checks.check_class_count(class_names, num_classes)
    if count < (2 if task == "classes" else 1):
        said = f"got {count}" if count else "give num_classes= or class_names="
        raise UserError(f"expected two classes or more; {said}")
    mean, std = input_checks.check_mean_and_std(mean, std, shape[2], normalize)
    return Dataset(
        name=name,
        num_classes=count,
        class_names=tuple(map(str, range(count) if class_names is None else class_names)),
        image_shape=tuple(map(int, shape)),
        mean=mean,
        std=std,
        normalized_by="data set" if mean else "",
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
        raise UserError(f"factory: expected {expected}, got {input_checks.describe_value(factory)}")
    try:
        inspect.signature(factory).bind("train", 0, 0, 1)
    except TypeError as why:
        raise UserError(f"factory: expected {expected}; it takes other arguments: {why}") from why
    except ValueError:  # a callable of C, which has no signature
        pass


def _check_sizes(sizes: Mapping[str, int]) -> None:
    if not isinstance(sizes, Mapping):
        raise UserError(f"sizes: expected {{'train': N, 'test': M}}, got {sizes!r}")
    for split, size in sizes.items():
        if split not in SPLITS:
            raise UserError(f"sizes: there is no split {split!r}{did_you_mean(str(split), SPLITS)}")
        if not _is_count(size):
            raise UserError(f"sizes[{split!r}]: expected a whole number above 0, got {size!r}")
    if missing := [split for split in SPLITS[:2] if split not in sizes]:
        raise UserError(f"sizes: expected 'train' and 'test', and there is no {missing[0]!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0


# ---- what a run makes of it


def apply_config(data: Dataset, config: Any) -> Dataset:
    """The data set of a run, of one that `from_batches` made; `config` is `config.data`. Raises
    UserError for what would need examples in another order; `data.validation` at its default is a
    note."""
    has_own_validation = "validation" in data.splits
    asked = config.validation not in (0, DEFAULTS["data.validation"])
    impossible = {
        "mock": config.mock,
        "classes": config.classes,
        "fraction": config.fraction < 1,
        "validation": asked and not has_own_validation,
    }
    cures = {
        "validation": "give sizes['validation'], or set data.validation=0",
        "mock": "set data.mock=0",
    }
    for name in (name for name, wanted in impossible.items() if wanted):
        cure = cures.get(name, "choose the examples in the factory")
        raise UserError(
            f"data.{name}={config[name]!r} does not act on batches of your own ({data.name}), which"
            f" come in their own order; {cure}"
        )
    check_augment(data, config)
    if config.augment.pca:
        raise UserError(
            "data.augment.pca needs the colors of all training images before the first step, and"
            f" {data.name} gives batches; set it to 0"
        )
    mean, std, normalized_by = resolve_mean_and_std(data, config, lambda: _of_imagenet(data))
    notes = find_notes(data.splits, data.class_names, config.batch_size)
    if not has_own_validation:
        notes.append("there is no validation split; from_batches takes sizes['validation']")
    if normalized_by == "ImageNet":
        notes.append("normalized by ImageNet's mean and std; from_batches takes mean= and std=")
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
    """What can be known without reading: see flax_cnns/data/fingerprint.py."""
    return {
        "reader": "batches",
        "classes": list(data.class_names),
        "splits": {split: {"images": len(one)} for split, one in data.splits.items()},
    }


def _of_imagenet(data: Dataset) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    channels = data.image_shape[-1]
    if channels not in (1, 3):
        raise UserError(f"{data.name} has {channels} channels: give from_batches mean= and std=")
    return *convert_to_channels(IMAGENET, channels), "ImageNet"
