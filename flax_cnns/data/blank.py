"""Black images in place of a data set: its shapes without its data, to plan a run elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_cnns.data.known_datasets import KNOWN_DATASETS, base_name
from flax_cnns.data.splits import fits_in_memory
from flax_cnns.data.types import Dataset, Split

ASSUMED_TRAIN = 50000  # training images of a data set that is not known


def make_blank_dataset(config: Any, num_classes: int = 0) -> Dataset | None:
    """Returns black images in the shapes of the data set that `config` (a run's `config.data`)
    describes; None if it is neither known nor `num_classes` given.

    Reads nothing and takes no memory. The published facts (known_datasets.py) give the classes,
    channels and number of images. With `num_classes`, a data set of that many classes stands for
    one that is not known: photographs in color, `ASSUMED_TRAIN` for training. Whether the loader
    crops the images, or the training step, is decided as by `load_dataset`. Notes say what was
    assumed. The labels are all 0.
    """
    known = KNOWN_DATASETS.get(base_name(config.name)) if config.name != "folder" else None
    if num_classes:
        classes, channels, total, sizes_vary = num_classes, 3, ASSUMED_TRAIN, True
        if known is not None:
            channels, total, sizes_vary = len(known.mean), known.train, known.sizes_vary
    elif known is not None and known.train:
        classes = len(config.classes) or known.classes
        channels, total, sizes_vary = len(known.mean), known.train, known.sizes_vary
    else:
        return None
    total = max(1, round(total * config.fraction))
    size, channels = config.image_size, config.channels or channels
    shape = (size, size, channels)
    in_memory = fits_in_memory(config, total * size * size * channels)
    if in_memory and sizes_vary and config.augment.random_resized_crop:
        in_memory = config.in_memory != "auto"

    def make_split(count: int) -> Split:
        labels = np.broadcast_to(np.int32(0), (count,))
        if not in_memory:
            return Split(labels=labels, count=count)
        return Split(labels=labels, images=np.broadcast_to(np.uint8(0), (count, *shape)))

    how = "augmented by the training step" if in_memory else "decoded and cropped by the loader"
    roles = ("train", "test", *(["validation"] if config.validation else []))
    return Dataset(
        name=config.name,
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        image_shape=shape,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        covariance=tuple(map(tuple, np.eye(channels).tolist())) if config.augment.pca else (),
        normalized_by="nothing",
        splits={role: make_split(total) for role in roles},
        notes=(
            f"{config.name} was not read: assumed {classes} classes, {total:,} training images of"
            f" {size}x{size}x{channels}, {how}",
        ),
    )
