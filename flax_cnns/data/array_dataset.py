"""Data sets of a user's own arrays: checked by `Dataset.from_arrays`, split when a run starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data import input_checks
from flax_cnns.data.classes import select_classes
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.splits import TEST_SHARE, find_notes, keep_fraction, take_from_train
from flax_cnns.data.statistics import broadcast_to_channels, find_covariance, moments
from flax_cnns.data.types import ArrayRows, Dataset, RawDataset, Split
from flax_cnns.errors import UserError

# Augmentation that needs values in 0..1. Padding and cutout write 0 whatever the range is.
COLOR_AUGMENTATIONS = ("randaugment", "pca", "erase")


Normalization = tuple[tuple[float, ...], tuple[float, ...], str]  # mean, std, their origin


# ---- checking the arrays


def from_arrays(
    arrays: Mapping[str, Any],
    *,
    class_names: Sequence[str] | None,
    num_classes: int | None,
    task: str,
    normalize: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    name: str,
) -> Dataset:
    """See `Dataset.from_arrays`. `arrays` maps each split to (images, labels), or to None if there
    is no such split."""
    input_checks.check_task(task)
    images, labels = {}, {}
    for split, pair in arrays.items():
        if pair is None and split != "train":
            continue
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = input_checks.describe_value(pair)
            raise UserError(f"{split}: expected (images, labels), got {got}")
        images[split] = input_checks.check_images(split, pair[0], normalize)
        labels[split] = input_checks.check_labels(split, pair[1], task)
        if len(images[split]) != len(labels[split]):
            raise UserError(
                f"{split} has {len(images[split])} images and {len(labels[split])} labels"
            )
    train = images["train"]
    for split, array in images.items():
        if array.shape[1:] != train.shape[1:] or array.dtype != train.dtype:
            raise UserError(
                f"{split} images are {array.dtype} {list(array.shape[1:])}, but train images are"
                f" {train.dtype} {list(train.shape[1:])}; expected the same"
            )
    names, notes = find_class_names(labels, class_names, num_classes, task)
    means, stds = input_checks.check_mean_and_std(mean, std, train.shape[-1], normalize)
    return Dataset(
        name=name,
        num_classes=len(names),
        class_names=names,
        image_shape=cast(tuple[int, int, int], train.shape[1:]),
        mean=means,
        std=stds,
        normalized_by="data set" if means else "",
        splits={split: Split(labels[split], ArrayRows(images[split])) for split in images},
        notes=notes,
        task=task,
        normalize=normalize,
    )


def find_class_names(
    labels: Mapping[str, np.ndarray],
    class_names: Sequence[str] | None,
    num_classes: int | None,
    task: str,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the classes, and notes. `labels` are those of each split.

    Raises UserError if the labels do not fit the classes.
    """
    notes: tuple[str, ...] = ()
    columns = {array.shape[1] if array.ndim == 2 else 0 for array in labels.values()}
    if len(columns) > 1:
        shapes = ", ".join(f"{split} {list(array.shape)}" for split, array in labels.items())
        raise UserError(f"labels: expected the same kind in all splits, got {shapes}")
    num_columns = max(columns)
    count = input_checks.check_class_count(class_names, num_classes) or num_columns
    if not count:
        count = 1 + max(int(array.max()) for array in labels.values())
        if count > sum(map(len, labels.values())):
            raise UserError(
                f"the largest label is {count - 1}, but there are fewer images: give num_classes="
                " or class_names="
            )
        notes = (
            f"assuming {count} classes, because the largest label is {count - 1}; for more, give"
            " num_classes=",
        )
    if num_columns and count != num_columns:
        raise UserError(f"labels have {num_columns} columns, but there are {count} classes")
    if task == "classes" and count < 2:
        raise UserError(f"expected two classes or more, got {count}")
    for split, array in labels.items():
        if array.ndim == 1:
            input_checks.check_label_range(split, array, count)
    names = class_names if class_names is not None else range(count)
    return tuple(map(str, names)), notes


# ---- fitting the data set to a run


def apply_config(data: Dataset, config: Any, begun: bool) -> Dataset:
    """Returns a data set of `from_arrays` as a run uses it: with the selected classes, all splits,
    mean and std. `config` is a run's `config.data`; `begun` is as in `load_dataset`. Raises
    UserError if the config does not fit the data set."""
    if config.mock:
        raise UserError(f"data.mock does not apply to your own data set ({data.name})")
    if data.splits["train"].images is None:
        raise UserError(
            f"{data.name} was loaded by its name, and cannot be passed as your own data set; set"
            " data.name instead"
        )
    check_augment(data, config)
    raw, notes = _select(data, config, begun)
    splits = {}
    for role, source in raw.sources.items():
        assert isinstance(source, ArraySource)
        splits[role] = Split(source.labels, source.images)
    has_own_validation = "validation" in splits and "test" in splits
    task, seed = data.task, config.split_seed
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("there is no test split: the validation split serves as test")
    elif "test" not in splits:
        subject = f"{data.name} has no test split; the fifth of train that becomes it"
        splits = take_from_train(splits, "test", TEST_SHARE, seed, task=task, subject=subject)
        notes.append(f"there is no test split: {len(splits['test'])} images of train serve as test")
    if not has_own_validation and config.validation:
        splits = take_from_train(splits, "validation", config.validation, seed, task=task)
    if config.fraction < 1:
        splits = keep_fraction(splits, config.fraction, seed, task=task)
    notes += find_notes(splits, raw.class_names, config.batch_size, task=task)
    images = splits["train"].images
    assert images is not None
    mean, std, normalized_by = resolve_mean_and_std(
        data, config, lambda: (*moments(images), "training images")
    )
    return dataclasses.replace(
        data,
        num_classes=raw.num_classes,
        class_names=raw.class_names,
        mean=mean,
        std=std,
        normalized_by=normalized_by,
        splits=splits,
        covariance=find_covariance(config, 0, data.image_shape[-1], splits["train"]),
        notes=(*data.notes, *notes),
        has_own_validation=has_own_validation,
        fingerprint=_fingerprint(raw),
    )


def read_fingerprint(data: Dataset, config: Any) -> dict[str, Any]:
    """Returns the fingerprint of `apply_config`'s data set."""
    return _fingerprint(_select(data, config, begun=True)[0])


def _fingerprint(raw: RawDataset) -> dict[str, Any]:
    return fingerprints.compute(raw.sources, raw.class_names, raw.provenance)


def _select(data: Dataset, config: Any, begun: bool) -> tuple[RawDataset, list[str]]:
    """Returns the examples of the classes in `config.classes`, and notes."""
    labels = data.splits["train"].labels
    if config.classes and labels is not None and labels.ndim > 1:
        kind = "multilabel data" if data.task == "multilabel" else "soft labels"
        raise UserError(f"data.classes needs integer labels, but {data.name} has {kind}")
    sources = {}
    for role, split in data.splits.items():
        assert split.images is not None
        assert split.labels is not None
        sources[role] = ArraySource(split.images, split.labels, f"{data.name} {role}")
    raw = RawDataset(sources, data.num_classes, data.class_names, data.image_shape)
    return select_classes(raw._replace(provenance={"reader": "arrays"}), config, begun, data.name)


def check_augment(data: Dataset, config: Any) -> None:
    """Raises UserError if the config asks for augmentation that these images do not support."""
    wanted = [name for name in COLOR_AUGMENTATIONS if config.augment[name]]
    if wanted and not data.normalize:
        raise UserError(
            f"data.augment.{wanted[0]} needs colors from 0 to 1, but {data.name} was made with"
            " normalize=False: switch it off, or give images from 0 to 1"
        )
    channels = data.image_shape[-1]
    if "randaugment" in wanted and channels not in (1, 3):
        raise UserError(f"data.augment.randaugment: expected 1 or 3 channels, got {channels}")


def resolve_mean_and_std(
    data: Dataset, config: Any, default: Callable[[], Normalization]
) -> Normalization:
    """Returns mean, std and their origin: the config, otherwise the data set, otherwise
    `default()`. Raises UserError if the config's mean and std do not fit."""
    channels = data.image_shape[-1]
    if not data.normalize:
        if config.mean:
            raise UserError(
                f"data.mean and data.std have no effect: {data.name} was made with normalize=False"
            )
        return (0.0,) * channels, (1.0,) * channels, "nothing"
    if config.mean:
        where = "data.mean and data.std"
        return *broadcast_to_channels(config.mean, config.std, channels, where), "config"
    if data.mean:
        return data.mean, data.std, data.normalized_by
    return default()
