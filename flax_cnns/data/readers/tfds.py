"""Data sets through TFDS. Prepared data sets are read without TensorFlow (array_record); others are
prepared first, if possible.

This module imports tensorflow_datasets (half a second): import it inside functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from flax_cnns import files
from flax_cnns.data.known_datasets import KNOWN_DATASETS, base_name
from flax_cnns.data.readers import (
    archives,
    digits,  # noqa: F401  registers the builder
)
from flax_cnns.data.types import Dataset, ImageSource, RawDataset, WrongLabel
from flax_cnns.errors import UserError, did_you_mean

NETWORK_TIMEOUT = 4.0  # seconds, to reach the host of a download

# By data set: the name of a kind of labels (`data.labels`) -> its key in TFDS, if they differ.
LABEL_KEYS = {"cifar100": {"fine": "label", "coarse": "coarse_label"}}


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """The examples of a split that TFDS has prepared."""

    records: Any  # tfds.data_source whose images are not decoded
    image_key: str
    label_key: str
    name: str
    num_classes: int
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.records)

    def open(self, i: int) -> tuple[Image.Image, int]:
        record = self.records[int(i)]
        image, label = record[self.image_key], int(record[self.label_key])
        if not 0 <= label < self.num_classes:
            raise WrongLabel(self.location(i), label, self.num_classes)
        if isinstance(image, bytes):
            return Image.open(io.BytesIO(image)), label
        image = np.asarray(image)
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), label

    def location(self, i: int) -> str:
        return f"{self.name}, example {i}"

    def fetch(self, rows: np.ndarray) -> ImageSource:
        indices = [int(row) for row in rows]
        records = dict(zip(indices, self.records.__getitems__(indices)))  # faster than one by one
        return dataclasses.replace(self, records=records)

    def __repr__(self) -> str:
        return f"TfdsSource({self.name}, {self.label_key}, {len(self)})"


def from_builder(
    builder: Any,
    fields: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    labels: str,
    data_dir: str,
) -> Dataset:
    """See `Dataset.from_tfds`. 0 in `image_shape` stands for the builder's own."""
    kind: Any = builder if isinstance(builder, type) else type(builder)
    if not issubclass(kind, tfds.core.DatasetBuilder):
        raise UserError(
            "from_tfds: expected a tfds.core.DatasetBuilder, a class or an instance, got"
            f" {getattr(kind, '__name__', kind)}"
        )

    size, _, channels = image_shape
    if not isinstance(size, int) or size < 0:
        raise UserError(f"image_size: expected a whole number of at least 0, got {size!r}")
    if channels not in (0, 1, 3):
        raise UserError(f"channels: expected 0 (the images' own), 1 or 3, got {channels!r}")
    if kind is not builder and (fields or data_dir):
        given = ", ".join([*fields, *(["data_dir"] if data_dir else [])])
        raise UserError(
            f"from_tfds: {given} apply to a builder class, but this {kind.name} is an instance"
        )

    def read_builder(prepare: bool) -> RawDataset:
        return _read(lambda: _make_builder(builder, fields, data_dir), kind.name, labels, prepare)

    return Dataset(
        name=kind.name,
        num_classes=0,
        class_names=(),
        image_shape=image_shape,
        mean=(),
        std=(),
        normalized_by="",
        splits={},
        reader=read_builder,
    )


def _make_builder(
    builder: Any, fields: Mapping[str, Any], directory: str
) -> tfds.core.DatasetBuilder:
    """Returns `builder`, or an instance if `builder` is a class. Raises UserError if that fails."""
    if not isinstance(builder, type):
        return builder
    try:
        with _quiet():
            return builder(data_dir=_data_dir(directory), file_format="array_record", **fields)
    except Exception as error:  # any error of the user's own code
        raise UserError(f"cannot make {builder.__name__}: {_one_line(error)}") from error


def read(name: str, directory: str, labels: str, *, prepare: bool = True) -> RawDataset:
    """Reads the data set `name`. With `prepare`, prepares it first if needed. Raises UserError if
    the data set is unknown, not prepared or damaged, or has no such labels."""
    return _read(lambda: _find_builder(name, directory), name, labels, prepare)


def _read(
    make: Callable[[], tfds.core.DatasetBuilder], name: str, labels: str, prepare: bool
) -> RawDataset:
    builder = make()
    label_key = _find_label_key(builder, labels)
    image_key = _find_image_key(builder)
    if not _is_prepared(builder):
        if not prepare:
            raise UserError(f"{name} is not prepared in {builder.data_dir}")
        _prepare(builder, name)
        builder = make()
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{builder.data_dir} is prepared as {builder.info.file_format.value}, which cannot be "
            "read without TensorFlow; prepare it as array_record in another data.dir: "
            + _prepare_command(name)
        )
    sources, left_out = {}, {}
    num_classes, class_names = _find_classes(builder, label_key)
    for split in builder.info.splits:
        try:
            records = builder.as_data_source(
                split=split, decoders={image_key: tfds.decode.SkipDecoding()}
            )
            # TFDS marks unpublished labels of a test split by -1: such a split cannot be used.
            last = len(records) - 1
            probed: Any = np.unique(np.linspace(0, last, 5).astype(int)) if records else []
            is_unlabeled = all(int(records[int(i)][label_key]) == -1 for i in probed)
        except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise UserError(
                f"cannot read {builder.data_dir}: {_one_line(error)}; "
                "delete the folder to prepare it again"
            ) from error
        if not is_unlabeled:
            sources[split] = TfdsSource(
                records, image_key, label_key, f"{name} {split}", num_classes
            )
            continue
        missing = "labels" if len(records) else "examples"
        if split == "train":
            raise UserError(f"the train split of {builder.data_dir} has no {missing}")
        left_out[f"{split} split, which has no {missing}"] = 1
    raw = RawDataset(sources, num_classes, class_names, _find_shape(builder, image_key), left_out)
    return raw._replace(provenance=_describe_provenance(builder, sources))


def _describe_provenance(
    builder: tfds.core.DatasetBuilder, splits: Iterable[str]
) -> dict[str, Any]:
    """Returns the builder's part of the fingerprint. Only a user's own builder has bytes: the
    version of a stock data set identifies its content, and its bytes depend on the image encoder.
    """
    provenance: dict[str, Any] = {"builder": builder.info.full_name}
    if builder.name not in tfds.list_builders(with_community_datasets=False):
        provenance["bytes"] = {split: int(builder.info.splits[split].num_bytes) for split in splits}
    return provenance


def read_facts(name: str, directory: str, labels: str) -> tuple[int, tuple[str, ...], int]:
    """Returns the number of classes, their names and the number of channels. The data set need not
    be prepared."""
    builder = _find_builder(name, directory)
    classes = _find_classes(builder, _find_label_key(builder, labels))
    return *classes, _find_shape(builder, _find_image_key(builder))[2]


def _find_builder(name: str, directory: str) -> tfds.core.DatasetBuilder:
    base = base_name(name)
    known = tfds.list_builders(with_community_datasets=False)
    path = _data_dir(directory)
    if base not in known and not (path / base).is_dir():
        raise UserError(
            f"unknown data set {name!r} (a folder of images is data.name=folder data.dir=...)"
            + did_you_mean(base, [*known, "folder"])
        )
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=path)
            if not _is_prepared(builder):
                builder = tfds.builder(name, data_dir=path, file_format="array_record")
            return builder
    except Exception as error:  # a dozen kinds: unknown configs and versions, damaged metadata
        if (path / base).is_dir():
            raise UserError(
                f"cannot read the files in {path / base} ({_one_line(error)}); remove the folder"
                " to prepare it again"
            ) from error
        raise UserError(f"TFDS has no {name!r} in {path}: {_one_line(error)}") from error


def _data_dir(directory: str) -> Path:
    return Path(directory or tfds.core.constants.get_default_data_dir()).expanduser()


def _is_stock(builder: tfds.core.DatasetBuilder) -> bool:
    """Returns whether the builder comes with TFDS, not from the user or this package."""
    return type(builder).__module__.partition(".")[0] == "tensorflow_datasets"


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    # builder.is_prepared() is the same check, but warns if the data set is not prepared.
    return (Path(builder.data_dir) / "dataset_info.json").exists()


def _find_image_key(builder: tfds.core.DatasetBuilder) -> str:
    features = builder.info.features
    for key in ("image", *features):
        if key in features and isinstance(features[key], tfds.features.Image):
            return key
    raise UserError(
        f"{builder.name} has no feature with one image per example; it has: {', '.join(features)}"
    )


def _find_label_key(builder: tfds.core.DatasetBuilder, wanted: str) -> str:
    features = builder.info.features
    keys = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    if not keys:
        raise UserError(f"{builder.name} has no class labels; it has: {', '.join(features)}")
    names = LABEL_KEYS.get(builder.name, {key: key for key in keys})
    if not wanted:
        return "label" if "label" in keys else keys[0]
    if wanted in names:
        return names[wanted]
    raise UserError(f"{builder.name} has no labels {wanted!r}{did_you_mean(wanted, names)}")


def _find_classes(builder: tfds.core.DatasetBuilder, key: str) -> tuple[int, tuple[str, ...]]:
    feature = builder.info.features[key]
    known = KNOWN_DATASETS.get(builder.name)
    # Some builders know the class names only once they are prepared, or never (svhn).
    names = known.class_names if known and known.class_names else feature.names
    return feature.num_classes, tuple(names)


def _find_shape(builder: tfds.core.DatasetBuilder, key: str) -> tuple[int | None, int | None, int]:
    height, width, channels = builder.info.features[key].shape
    return height, width, 1 if channels == 1 else 3


def _prepare_command(name: str) -> str:
    # Not TFDS's own command line, which also needs Apache Beam.
    return (
        "pip install 'flax_cnns[prepare]' && python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder('{name}', data_dir='DIR', file_format='array_record')"
        '.download_and_prepare()"'
    )


def _prepare(builder: tfds.core.DatasetBuilder, name: str) -> None:
    path = Path(builder.data_dir)
    stock = _is_stock(builder)
    if stock or builder.url_infos:  # a user's own builder may need no download
        host = _download_host(builder)
        if not _reachable(host):
            raise UserError(
                f"{name} is not prepared in {path} and {host} cannot be reached: prepare it on a "
                f"machine with a network ({_prepare_command(name)})"
                f"{_describe_archives(builder.name)} and set data.dir=DIR, or try data.name=digits "
                "or data.mock=1000"
            )
        if stock and importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                f"{name} is not prepared in {path}, and TFDS needs TensorFlow to prepare it (not "
                "to read it): pip install 'flax_cnns[prepare]'"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / ".lock"):
            # Another process may have prepared it meanwhile. TFDS writes to a folder of another
            # name and renames it at the end: a killed process leaves nothing that looks prepared.
            if not _is_prepared(builder):
                with _quiet() if builder.name == "digits" else contextlib.nullcontext():
                    builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(
            f"cannot prepare {name} in {path}: {error}; choose another data.dir"
        ) from error
    except ImportError as error:
        if importlib.util.find_spec("tensorflow") is not None:
            raise UserError(f"TFDS cannot prepare {name} in {path}: {_one_line(error)}") from error
        raise UserError(
            f"TFDS needs TensorFlow to prepare {name} (not to read it): pip install"
            " 'flax_cnns[prepare]', or let the builder yield encoded images, as a PNG in io.BytesIO"
            " or the path of a file"
        ) from error
    except Exception as error:  # downloads, checksums, missing manual files, missing packages
        raise UserError(f"TFDS cannot prepare {name} in {path}: {_one_line(error)}") from error


def _describe_archives(name: str) -> str:
    """Says which archives may be put into data.dir instead."""
    if name in archives.CIFAR_FILES:
        return f", or put {archives.CIFAR_FILES[name]} into DIR,"
    if "mnist" in name:
        return ", or put train-images-idx3-ubyte.gz and its three companions into DIR,"
    return ""


def _download_host(builder: tfds.core.DatasetBuilder) -> str:
    urls = [url for url in builder.url_infos or () if "://" in url]
    return files.find_host((urls or ["https://storage.googleapis.com"])[0])


def _reachable(host: str) -> bool:
    return files.is_reachable(host, NETWORK_TIMEOUT)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Admits one process at a time. The kernel releases the lock if its process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS: its progress bars, its "Unknown size" lines and its log."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _one_line(error: Exception) -> str:
    """Returns an error as one line of at most 300 characters; some errors fill pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + " …"
