"""Loading a config's data set: digits, TFDS, official archives, a folder of images, a file of
arrays, the user's own data, or noise.

The splits of every source are made in this order (types.py explains their roles):

1. Only the examples of `data.classes` stay, if the config selects classes.
2. If there is no labeled test split, the validation split serves as test (as for ImageNet). If
   there is neither, a seeded and stratified fifth of train does.
3. If no validation split remains, one is cut from train.
4. Only `data.fraction` of the remaining training examples stays.
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
    check_opencv,
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
from flax_cnns.files import check_local

EVAL_SHARE = 0.875  # of the shorter side, in evaluation after training on random crops


def load_dataset(config: Any, *, data: Dataset | None = None, begun: bool = False) -> Dataset:
    """Loads the data set that `config` describes: a run's `config.data`.

    `data`, a data set of the user's own (`Dataset.from_arrays` ...), replaces the one that `config`
    names; the other settings of `config` apply to it. `begun` says that a run with this config
    already exists: such a run may continue with an ambiguous `data.classes`.

    Raises UserError for an unknown name, label or folder, a missing network or package, a damaged
    file, a split that cannot be made or decoded, and a data set with a single class.
    """
    validate_section(config, "data")
    data = _read_user_file(config) if data is None else data
    if data is not None and data.is_stream:
        return batch_dataset.apply_config(data, config)
    if data is not None and data.reader is None:
        return array_dataset.apply_config(data, config, begun)
    if config.mock > 0 and data is not None:
        raise UserError(f"data.mock does not apply to your own data set ({data.name})")
    if config.mock > 0:
        return make_mock_dataset(config)
    raw = _read(config) if data is None else _read_user_tfds(data)
    name = config.name if data is None else data.name
    for own_name, source in raw.sources.items():
        check_source(source, f"{name}, {own_name} split", raw.num_classes)
    raw, notes = select_classes(raw, config, begun, name)
    if raw.num_classes < 2:
        raise UserError(f"expected two classes or more; {name} has {raw.num_classes}")
    fingerprint = _make_fingerprint(raw, config)
    sources = assign_roles(raw.sources, name, config.split_seed)
    if config.decoder == "opencv":
        check_opencv(sources["train"], name)
    own_channels = raw.image_shape[2]
    size, channels = config.image_size, config.channels or own_channels
    if data is not None:
        size, channels = _find_size(data, raw)
    varies = None in raw.image_shape
    crops = bool(config.augment.random_resized_crop)
    share = EVAL_SHARE if varies and crops else 1.0
    in_memory = fits_in_memory(config, sum(map(len, sources.values())) * size * size * channels)
    if in_memory and varies and crops and config.in_memory == "auto":
        # Crops of images that are already reduced to image_size would be enlarged and blurred.
        in_memory = False

    splits: dict[str, Split] = {}
    damaged: list[str] = []
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
            decoder=config.decoder,
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
        fingerprint=fingerprint,
        has_own_validation=has_own_validation,
    )


def read_fingerprint(config: Any, data: Dataset | None = None) -> dict[str, Any]:
    """Returns the fingerprint that `load_dataset` would give, without decoding images or
    downloading. Raises UserError as `load_dataset` does, also if the data set is not prepared."""
    validate_section(config, "data")
    data = _read_user_file(config) if data is None else data
    if data is not None and data.is_stream:
        return batch_dataset.make_fingerprint(data)
    if data is not None and data.reader is None:
        return array_dataset.read_fingerprint(data, config)
    if config.mock > 0:
        return {}
    raw = _read(config, prepare=False) if data is None else _read_user_tfds(data, prepare=False)
    raw, _ = select_classes(raw, config, begun=True)
    return _make_fingerprint(raw, config)


def _make_fingerprint(raw: RawDataset, config: Any) -> dict[str, Any]:
    decoder = {} if config.decoder == "pillow" else {"decoder": config.decoder}
    return fingerprints.compute(raw.sources, raw.class_names, raw.provenance | decoder)


def _read_user_file(config: Any) -> Dataset | None:
    """Returns the data set of the file of arrays that `config` names; None if it names no file."""
    if config.source == "auto" and config.name.endswith(".npz"):
        check_local(config.name, "config.data.name")
        check_local(config.dir, "config.data.dir")
        return npz.read(config.name, config.dir)
    return None


def _read_user_tfds(data: Dataset, *, prepare: bool = True) -> RawDataset:
    assert data.reader is not None
    raw = data.reader(prepare)
    return raw._replace(provenance={"reader": "tfds", **raw.provenance})


def _find_size(data: Dataset, raw: RawDataset) -> tuple[int, int]:
    """Returns (image size, channels) of a user's own TFDS builder as the network sees them."""
    size, _, channels = data.image_shape
    height, width, own_channels = raw.image_shape
    if not size and (height is None or height != width):
        sizes = "several sizes" if height is None or width is None else f"{height}x{width}"
        raise UserError(
            f"{data.name} has images of {sizes}, but a network sees squares: give"
            " Dataset.from_tfds(builder, image_size=...)"
        )
    assert size or height is not None
    return size or height or 0, channels or own_channels


def _read(config: Any, *, prepare: bool = True) -> RawDataset:
    check_local(config.dir, "config.data.dir")
    source = _find_source(config) if config.source == "auto" else config.source
    raw = READERS[source](config, prepare)
    return raw._replace(provenance={"reader": source, **raw.provenance})


def _find_source(config: Any) -> str:
    """Returns the reader that "auto" stands for, by the files in `config.dir`."""
    if config.name == "folder":
        return "folder"
    if config.name != "digits" and config.dir and archives.exists(config.name, config.dir):
        return "archive"
    return "tfds"


def _read_tfds(config: Any, prepare: bool) -> RawDataset:
    # Imported late: TFDS takes half a second to import, and other readers do not need it.
    from flax_cnns.data.readers import tfds

    return tfds.read(config.name, config.dir, config.labels, prepare=prepare)


# Readers by `data.source`. With `prepare`, a reader may download and prepare a missing data set.
READERS: dict[str, Callable[[Any, bool], RawDataset]] = {
    "folder": lambda config, prepare: folder.read(config.dir, config.name),
    "archive": lambda config, prepare: archives.read(config.name, config.dir, config.labels),
    "tfds": _read_tfds,
}
