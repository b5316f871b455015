"""Noise in place of a data set (`data.mock`), for test runs without data."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_cnns.data.classes import find_class_indices
from flax_cnns.data.known_datasets import DIGIT_NAMES
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.splits import fits_in_memory, keep_fraction
from flax_cnns.data.statistics import find_covariance
from flax_cnns.data.types import Dataset, Split


def make_mock_dataset(config: Any) -> Dataset:
    """Makes random images with the classes and channels of the data set `config.name`, which is not
    read or downloaded."""
    num_classes, class_names, own_channels = _read_facts(config)
    selected, notes = find_class_indices(config, class_names)
    if selected:
        num_classes, class_names = len(selected), tuple(class_names[i] for i in selected)
    size, channels = config.image_size, config.channels or own_channels
    rng = np.random.default_rng(config.split_seed)
    counts = {"train": config.mock, "test": max(1, config.mock // 5)}
    if config.validation:
        counts["validation"] = counts["test"]
    splits = {}
    for role, count in counts.items():
        images = rng.integers(0, 256, (count, size, size, channels), np.uint8)
        labels = rng.permutation(np.arange(count, dtype=np.int32) % num_classes)
        if fits_in_memory(config, images.nbytes):
            splits[role] = Split(labels=labels, images=images)
        else:
            source = ArraySource(images, labels, f"mock {config.name} {role}")
            splits[role] = Split(labels=labels, source=source)
    if config.fraction < 1:
        splits = keep_fraction(splits, config.fraction, config.split_seed)
    return Dataset(
        name=config.name,
        num_classes=num_classes,
        class_names=class_names,
        image_shape=(size, size, channels),
        mean=(0.5,) * channels,
        std=(0.2887,) * channels,  # 1/sqrt(12), of a uniform distribution
        covariance=find_covariance(config, size, channels, splits["train"]),
        normalized_by="uniform noise",
        splits=splits,
        notes=tuple(notes),
    )


def _read_facts(config: Any) -> tuple[int, tuple[str, ...], int]:
    """Returns the number of classes, their names and the number of channels. The data set need not
    be on disk. A folder stands for ten classes, named as digits, in color."""
    if config.name == "folder":
        return 10, DIGIT_NAMES, 3
    from flax_cnns.data.readers import tfds  # half a second to import

    return tfds.read_facts(config.name, config.dir, config.labels)
