"""Noise in the place of a data set (`data.mock`), for runs that try the machinery."""

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
    """Random images of the data set's own classes and channels: nothing is read or downloaded."""
    num_classes, class_names, own = _facts(config)
    chosen, notes = find_class_indices(config, class_names)
    if chosen:
        num_classes, class_names = len(chosen), tuple(class_names[i] for i in chosen)
    size, channels = config.image_size, config.channels or own
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
        std=(0.2887,) * channels,  # 1/sqrt(12): uniform
        covariance=find_covariance(config, size, channels, splits["train"]),
        normalized_by="uniform noise",
        splits=splits,
        notes=tuple(notes),
    )


def _facts(config: Any) -> tuple[int, tuple[str, ...], int]:
    """Classes, their names and channels of a data set that need not be there."""
    if config.name == "folder":
        return 10, DIGIT_NAMES, 3
    from flax_cnns.data.readers import tfds  # half a second to import

    return tfds.read_facts(config.name, config.dir, config.labels)
