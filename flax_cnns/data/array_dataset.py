"""A user's own arrays as a data set: checked when they are given, finished when a run begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data import input_checks
from flax_cnns.data.classes import select_classes
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.splits import TEST_SHARE, find_notes, keep_fraction, take_from_train
from flax_cnns.data.statistics import broadcast_to_channels, find_covariance, moments
from flax_cnns.data.types import ArrayRows, Dataset, RawDataset, Split
from flax_cnns.errors import UserError

# Augmentation that takes values of 0..1 for granted. Padding and cutout put 0, whatever it means.
COLOR_AUGMENTATIONS = ("randaugment", "pca", "erase")


Normalization = tuple[tuple[float, ...], tuple[float, ...], str]  # mean, std, where they come from


# ---- what is given


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
    """See `Dataset.from_arrays`; `arrays`: (images, labels) by split, None for one that there is
    not."""
    input_checks.check_task(task)
    splits = {}
    for split, pair in arrays.items():
        if pair is None and split != "train":
            continue
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(
                f"{split}: expected (images, labels), got {input_checks.describe_value(pair)}"
            )
        images = input_checks.check_images(split, pair[0], normalize)
        labels = input_checks.check_labels(split, pair[1], task)
        if len(images) != len(labels):
            raise UserError(f"{split} has {len(images)} images and {len(labels)} labels")
        splits[split] = Split(labels=labels, images=ArrayRows(images))
    train = splits["train"].images
    for split, one in splits.items():
        if one.images.shape[1:] != train.shape[1:] or one.images.dtype != train.dtype:
            raise UserError(
                f"{split} images are {one.images.dtype} {list(one.images.shape[1:])}, and train"
                f" images {train.dtype} {list(train.shape[1:])}; expected the same"
            )
    class_names, notes = find_class_names(splits, class_names, num_classes, task)
    mean, std = input_checks.check_mean_and_std(mean, std, train.shape[-1], normalize)
    return Dataset(
        name=name,
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=train.shape[1:],
        mean=mean,
        std=std,
        normalized_by="data set" if mean else "",
        splits=splits,
        notes=notes,
        task=task,
        normalize=normalize,
    )


def find_class_names(
    splits: Mapping[str, Split],
    class_names: Sequence[str] | None,
    num_classes: int | None,
    task: str,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, and notes. Raises UserError where labels do not fit them."""
    labels = {split: one.labels for split, one in splits.items()}
    notes = ()
    columns = {one.shape[1] if one.ndim == 2 else 0 for one in labels.values()}
    if len(columns) > 1:
        shapes = ", ".join(f"{split} {list(one.shape)}" for split, one in labels.items())
        raise UserError(f"labels: expected the same kind in all splits, got {shapes}")
    found = max(columns)
    count = input_checks.check_class_count(class_names, num_classes) or found
    if not count:
        count = 1 + max(int(one.max()) for one in labels.values())
        if count > sum(map(len, labels.values())):
            raise UserError(
                f"the largest label is {count - 1}, of fewer images: give num_classes= or"
                " class_names="
            )
        said = f"{count} classes, as the largest label is {count - 1}; num_classes= may say more"
        notes = (said,)
    if found and count != found:
        raise UserError(f"labels have {found} columns, for {count} classes")
    if task == "classes" and count < 2:
        raise UserError(f"expected two classes or more, got {count}")
    for split, one in labels.items():
        if one.ndim == 1:
            input_checks.check_label_range(split, one, count)
    names = class_names if class_names is not None else range(count)
    return tuple(map(str, names)), notes


# ---- what a run makes of it


def apply_config(data: Dataset, config: Any, begun: bool) -> Dataset:
    """The data set of a run, of one that `from_arrays` made; `config` is `config.data`. Raises
    UserError."""
    if config.mock:
        raise UserError(f"data.mock does not act on a data set of your own ({data.name})")
    if data.splits["train"].images is None:
        raise UserError(f"{data.name} is read by its name (data.name), and cannot be given")
    check_augment(data, config)
    raw, notes = _select(data, config, begun)
    splits = {role: Split(s.labels, s.images) for role, s in raw.sources.items()}
    has_own_validation = "validation" in splits and "test" in splits
    task, seed = data.task, config.split_seed
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("there is no test split: the validation split serves as test")
    elif "test" not in splits:
        what = f"{data.name} has no test split; the fifth of train that becomes it"
        splits = take_from_train(splits, "test", TEST_SHARE, seed, task=task, what=what)
        notes.append(f"there is no test split: {len(splits['test'])} images of train serve as test")
    if not has_own_validation and config.validation:
        splits = take_from_train(splits, "validation", config.validation, seed, task=task)
    if config.fraction < 1:
        splits = keep_fraction(splits, config.fraction, seed, task=task)
    notes += find_notes(splits, raw.class_names, config.batch_size, task=task)
    mean, std, normalized_by = resolve_mean_and_std(
        data, config, lambda: (*moments(splits["train"].images), "training images")
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
    """As `apply_config` gives it."""
    return _fingerprint(_select(data, config, begun=True)[0])


def _fingerprint(raw: RawDataset) -> dict[str, Any]:
    return fingerprints.compute(raw.sources, raw.class_names, raw.provenance)


def _select(data: Dataset, config: Any, begun: bool) -> tuple[RawDataset, list[str]]:
    """The classes of `config.classes` alone, and notes."""
    if config.classes and data.splits["train"].labels.ndim > 1:
        kind = "multilabel data" if data.task == "multilabel" else "soft labels"
        raise UserError(f"data.classes chooses by integer labels, and {data.name} has {kind}")
    sources = {
        role: ArraySource(split.images, split.labels, f"{data.name} {role}")
        for role, split in data.splits.items()
    }
    raw = RawDataset(sources, data.num_classes, data.class_names, data.image_shape)
    return select_classes(raw._replace(provenance={"reader": "arrays"}), config, begun, data.name)


def check_augment(data: Dataset, config: Any) -> None:
    """Raises UserError for augmentation that these images cannot have."""
    wanted = [name for name in COLOR_AUGMENTATIONS if config.augment[name]]
    if wanted and not data.normalize:
        raise UserError(
            f"data.augment.{wanted[0]} takes colors from 0 to 1, and {data.name} was given with"
            " normalize=False: switch it off, or give images from 0 to 1"
        )
    channels = data.image_shape[-1]
    if "randaugment" in wanted and channels not in (1, 3):
        raise UserError(f"data.augment.randaugment: expected 1 or 3 channels, got {channels}")


def resolve_mean_and_std(
    data: Dataset, config: Any, otherwise: Callable[[], Normalization]
) -> Normalization:
    """Mean, std and where they come from: config, data set, or `otherwise`. Raises UserError."""
    channels = data.image_shape[-1]
    if not data.normalize:
        if config.mean:
            raise UserError(
                f"data.mean and data.std do nothing: {data.name} was given with normalize=False"
            )
        return (0.0,) * channels, (1.0,) * channels, "nothing"
    if config.mean:
        return *broadcast_to_channels(
            config.mean, config.std, channels, "data.mean and data.std"
        ), "config"
    if data.mean:
        return data.mean, data.std, data.normalized_by
    return otherwise()
