"""The one entry: a config -> a data set: digits, TFDS, official archives, a folder of images, a
file of arrays, the user's own, or noise.

Whatever the source, the splits get their roles here (types.py says which). Where a data set has no
labeled test split its validation split serves as test (ImageNet); where it has neither, a fifth of
train does, seeded and stratified. Where no validation split is left it is taken from train. Of the
classes a config may choose some, before all that; of the training examples that are left it may
keep a fraction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_cnns.config import validate_section
from flax_cnns.data import array_dataset, batch_dataset
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data.classes import select_classes
from flax_cnns.data.decode import read_all
from flax_cnns.data.mock import make_mock_dataset
from flax_cnns.data.readers import archives, folder, npz
from flax_cnns.data.splits import (
    assign_roles,
    check_decodes,
    check_source,
    decoding_error,
    find_notes,
    fits_in_memory,
    keep_fraction,
    take_from_train,
)
from flax_cnns.data.statistics import find_covariance, find_mean_and_std
from flax_cnns.data.types import Dataset, RawDataset, Split
from flax_cnns.errors import UserError

EVAL_SHARE = 0.875  # of the shorter side, in evaluation of networks trained on random crops


def load_dataset(config: Any, *, data: Dataset | None = None, begun: bool = False) -> Dataset:
    """The data set that `config` (`config.data` of configs/common.py) describes. `data`, a data set
    of the user's own (`Dataset.from_arrays` ...), takes its place, as `config` wants it.

    Raises UserError: unknown name, label or folder; no network; missing package; damaged file; a
    split that cannot be made, or of which no image can be decoded; one class alone. `begun`: a
    run of this config exists, and goes on with an ambiguous `data.classes`.
    """
    validate_section(config, "data")
    data = _read_own(config) if data is None else data
    if data is not None and data.reader is None:
        return (
            batch_dataset.apply_config(data, config)
            if data.is_stream
            else array_dataset.apply_config(data, config, begun)
        )
    if config.mock > 0 and data is not None:
        raise UserError(f"data.mock does not act on a data set of your own ({data.name})")
    if config.mock > 0:
        return make_mock_dataset(config)
    raw = _read(config) if data is None else _read_given(data)
    name = config.name if data is None else data.name
    for split, source in raw.sources.items():
        check_source(source, f"{name}, {split} split", raw.num_classes)
    raw, notes = select_classes(raw, config, begun, name)
    if raw.num_classes < 2:
        raise UserError(f"expected two classes or more; {name} has {raw.num_classes}")
    found = fingerprints.compute(raw.sources, raw.class_names, raw.provenance)
    sources = assign_roles(raw.sources, name, config.split_seed)
    own_channels = raw.image_shape[2]
    size, channels = config.image_size, config.channels or own_channels
    if data is not None:
        size, channels = _find_size(data, raw)
    varies = None in raw.image_shape
    crops = bool(config.augment.random_resized_crop)
    share = EVAL_SHARE if varies and crops else 1.0
    in_memory = fits_in_memory(config, sum(map(len, sources.values())) * size * size * channels)
    if in_memory and varies and crops and config.in_memory == "auto":
        # Crops of what has been shrunk to image_size already would be enlarged and dull.
        in_memory = False

    splits, damaged = {}, []
    for role, source in sources.items():
        if not in_memory:
            splits[role] = Split(labels=source.labels, source=source)
            continue
        images, labels, skipped = read_all(
            source,
            size,
            channels,
            share=1.0 if role == "train" else share,
            threads=config.threads if varies else 1,
            skip_damaged=config.skip_damaged,
        )
        if not len(images):
            raise decoding_error(role, source)
        splits[role] = Split(labels=labels, images=images)
        damaged += skipped
    has_own_validation = "validation" in splits
    if not has_own_validation and config.validation:
        splits = take_from_train(splits, "validation", config.validation, config.split_seed)
    if config.fraction < 1:
        splits = keep_fraction(splits, config.fraction, config.split_seed)
    for role, split in splits.items():
        if split.source is not None:
            check_decodes(role, split.source, config.skip_damaged)
    notes += find_notes(splits, raw.class_names, config.batch_size)

    mean, std, normalized_by = find_mean_and_std(
        config, name, own_channels, channels, splits["train"]
    )
    return Dataset(
        covariance=find_covariance(config, size, channels, splits["train"]),
        name=name,
        num_classes=raw.num_classes,
        class_names=raw.class_names,
        image_shape=(size, size, channels),
        mean=mean,
        std=std,
        normalized_by=normalized_by,
        splits=splits,
        eval_share=share,
        damaged=damaged,
        left_out=raw.left_out,
        multi_frame_files=set() if raw.multi_frame_files is None else raw.multi_frame_files,
        notes=tuple(notes),
        fingerprint=found,
        has_own_validation=has_own_validation,
    )


def read_fingerprint(config: Any, data: Dataset | None = None) -> dict[str, Any]:
    """The fingerprint of the data set that `config` describes, as `load_dataset` gives it; no image
    is decoded and nothing is downloaded. Raises UserError."""
    validate_section(config, "data")
    data = _read_own(config) if data is None else data
    if data is not None and data.is_stream:
        return batch_dataset.make_fingerprint(data)
    if data is not None and data.reader is None:
        return array_dataset.read_fingerprint(data, config)
    if config.mock > 0:
        return {}
    given = data is not None
    raw = _read_given(data, prepare=False) if given else _read(config, prepare=False)
    raw, _ = select_classes(raw, config, begun=True)
    return fingerprints.compute(raw.sources, raw.class_names, raw.provenance)


def _read_own(config: Any) -> Dataset | None:
    """The user's own data set that `config` names: a file of arrays; None if it names another."""
    if config.source == "auto" and config.name.endswith(".npz"):
        return npz.read(config.name, config.dir)
    return None


def _read_given(data: Dataset, *, prepare: bool = True) -> RawDataset:
    raw = data.reader(prepare)
    return raw._replace(provenance={"reader": "tfds", **raw.provenance})


def _find_size(data: Dataset, raw: RawDataset) -> tuple[int, int]:
    """Height and width, and channels, that a network sees of the user's own builder."""
    size, _, channels = data.image_shape
    height, width, own_channels = raw.image_shape
    if not size and (height is None or height != width):
        has = "several sizes" if height is None or width is None else f"{height}x{width}"
        raise UserError(
            f"{data.name} has images of {has}, and a network sees squares: give"
            " Dataset.from_tfds(builder, image_size=...)"
        )
    return size or height, channels or own_channels


def _read(config: Any, *, prepare: bool = True) -> RawDataset:
    source = _find_source(config) if config.source == "auto" else config.source
    raw = READERS[source](config, prepare)
    return raw._replace(provenance={"reader": source, **raw.provenance})


def _find_source(config: Any) -> str:
    """The reader that "auto" is, by what lies in `dir`."""
    if config.name == "folder":
        return "folder"
    if config.name != "digits" and config.dir and archives.exists(config.name, config.dir):
        return "archive"
    return "tfds"


def _read_tfds(config: Any, prepare: bool) -> RawDataset:
    # TFDS takes half a second to import, and the others need none of it.
    from flax_cnns.data.readers import tfds

    return tfds.read(config.name, config.dir, config.labels, prepare=prepare)


# By `data.source`. With `prepare`, a reader may download and prepare what is not there.
READERS: dict[str, Callable[[Any, bool], RawDataset]] = {
    "folder": lambda config, prepare: folder.read(config.dir, config.name),
    "archive": lambda config, prepare: archives.read(config.name, config.dir, config.labels),
    "tfds": _read_tfds,
}
