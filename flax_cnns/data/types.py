"""Image sources, splits and data sets.

A split has one of three roles. `train` is trained on. `validation` chooses epochs, checkpoints and
hyperparameters. `test` is looked at once, at the end.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError


class DamagedImage(UserError):
    """An image that cannot be decoded: `location` names the image, `cause` is the error."""

    def __init__(self, location: str, cause: Exception):
        super().__init__(
            f"cannot decode {location}: {cause}; repair or delete it, or set data.skip_damaged=True"
        )
        self.location, self.cause = location, cause

    def __reduce__(self):  # Worker processes pickle their errors.
        return DamagedImage, (self.location, self.cause)


class WrongLabel(UserError):
    """A label outside the range of the data set's classes. `location` names the example."""

    def __init__(self, location: str, label: int, num_classes: int):
        problem = "it has no label (-1)" if label == -1 else f"its label is {label}"
        super().__init__(f"{location}: {problem}; expected 0 to {num_classes - 1}")
        self.location, self.label, self.num_classes = location, label, num_classes

    def __reduce__(self):
        return WrongLabel, (self.location, self.label, self.num_classes)


class ImageSource(Protocol):
    """Images that are decoded when they are read. The `repr` must be stable: Grain saves it."""

    @property
    def labels(self) -> np.ndarray | None:
        """i32 [N]; None if every example would have to be read to know the labels."""

    def __len__(self) -> int: ...

    def open(self, i: int) -> tuple[Image.Image, int]:
        """Returns the image (of any size and mode, perhaps not decoded yet) and the label."""

    def location(self, i: int) -> str:
        """Returns the name of example `i` for error messages."""

    def fetch(self, rows: np.ndarray) -> ImageSource:
        """Returns this source with these rows loaded, if loading many at once is faster."""


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some rows of another source."""

    source: ImageSource
    rows: np.ndarray
    name: str

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int) -> tuple[Image.Image, int]:
        return self.source.open(self.rows[i])

    def location(self, i: int) -> str:
        return self.source.location(self.rows[i])

    def fetch(self, rows: np.ndarray) -> ImageSource:
        return dataclasses.replace(self, source=self.source.fetch(self.rows[rows]))

    def __repr__(self) -> str:
        return f"Subset({self.source!r}, {self.name}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class Relabeled:
    """Another source with new labels."""

    source: ImageSource
    labels: np.ndarray  # i32 [N]
    name: str

    def __len__(self) -> int:
        return len(self.source)

    def open(self, i: int) -> tuple[Image.Image, int]:
        return self.source.open(i)[0], self.labels[i]

    def location(self, i: int) -> str:
        return self.source.location(i)

    def fetch(self, rows: np.ndarray) -> ImageSource:
        return dataclasses.replace(self, source=self.source.fetch(rows))

    def __repr__(self) -> str:
        return f"Relabeled({self.source!r}, {self.name}, {len(self)})"


def find_multi_frame_files(source: ImageSource) -> set[str]:
    """Returns the `multi_frame_files` of a `FileSource` (readers/folder.py), also if the source is
    wrapped in Subset or Relabeled. Returns an empty set for other sources."""
    while isinstance(source, Subset | Relabeled):
        source = source.source
    return getattr(source, "multi_frame_files", set())


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """Some rows of a user's array. Only indexing copies rows."""

    array: np.ndarray  # [N ...]
    rows: np.ndarray | None = None  # i64; None: all

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def size(self) -> int:
        return len(self) * (self.array.size // len(self.array))

    def __len__(self) -> int:
        return len(self.array if self.rows is None else self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows of `index`: an integer, integers or a slice."""
        return self.array[index if self.rows is None else self.rows[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def take_rows(images: np.ndarray | ArrayRows, which: np.ndarray) -> np.ndarray | ArrayRows:
    """Returns the rows `which`: a copy if `images` is an array, a view if it is `ArrayRows`."""
    if not isinstance(images, ArrayRows):
        return images[which]
    return ArrayRows(images.array, which if images.rows is None else images.rows[which])


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a split: arrays in memory, a source to decode, or the number of examples in
    the batches of a user's factory."""

    # i32 [N]; f32 [N K] if labels are soft or multilabel; None for a streamed TFDS split.
    labels: np.ndarray | None
    images: np.ndarray | ArrayRows | None = None  # u8 [N H W C]; a user's own may be f32
    source: ImageSource | None = None
    count: int = 0  # examples in the batches of a user's factory; otherwise 0

    def __len__(self) -> int:
        if self.images is not None:
            return len(self.images)
        return self.count if self.source is None else len(self.source)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits of images with labels. The methods `from_...` make one from a user's own data."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # H, W, C as the network sees them
    mean: tuple[float, ...]  # per channel, in 0..1
    std: tuple[float, ...]
    # The origin of mean and std: published, training images, ImageNet, config, data set, uniform
    # noise, nothing.
    normalized_by: str
    splits: dict[str, Split]  # train, test, and validation if there is one
    eval_share: float = 1.0  # evaluation crops this share of the shorter side
    # [C C] of the training images' colors in 0..1; () if data.augment.pca is off.
    covariance: tuple[tuple[float, ...], ...] = ()
    # Images that could not be decoded and were skipped. Streaming a split adds to the list.
    damaged: list[str] = dataclasses.field(default_factory=list)
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # unused files by kind
    # Files with more than one frame, whose first frame is used. Streaming a split adds to the set.
    multi_frame_files: set[str] = dataclasses.field(default_factory=set)
    notes: tuple[str, ...] = ()  # for the user, on possible mistakes
    # Whether the data set came with its validation split; False: that split was cut from train.
    has_own_validation: bool = False
    # See flax_cnns/data/fingerprint.py; {} for noise, and if no fingerprint was computed.
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: str = "classes"  # or "multilabel": labels are f32 [N K] of 0 and 1
    # False: images are floats of any range, and the network sees them unchanged.
    normalize: bool = True
    # `factory(split, start_step, process_index, process_count)` of `from_batches`, otherwise None.
    factory: Callable[[str, int, int, int], Iterable[Any]] | None = None
    # `reader(prepare) -> RawDataset` of `from_tfds`, which `load_dataset` calls; otherwise None.
    reader: Callable[[bool], RawDataset] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether a user's factory gives the batches, so that the order of examples is fixed."""
        return self.factory is not None

    @property
    def is_decoded(self) -> bool:
        """Whether this package decodes the images; False for a user's own arrays and batches."""
        return not (self.is_stream or isinstance(self.splits["train"].images, ArrayRows))

    @property
    def snapshot(self) -> fingerprints.DataSnapshot:
        """What a run compares to notice that its data changed."""
        counts = {role: len(split) for role, split in self.splits.items()}
        mean = self.mean if self.normalized_by == "training images" else ()
        return fingerprints.DataSnapshot(self.fingerprint, counts, mean)

    @property
    def in_memory(self) -> bool:
        """Whether images reach the loader decoded: as arrays, or as a user's own batches.

        False: the loader decodes images as they are read, and does the random resized crop.
        """
        return self.is_stream or self.splits["train"].images is not None

    def as_dict(self) -> dict[str, Any]:
        """Returns the facts about the data set, without its images, ready for JSON."""
        omitted = {"splits", "damaged", "left_out", "multi_frame_files", "notes", "factory"}
        omitted |= {"has_own_validation", "reader"}
        fields = (f.name for f in dataclasses.fields(self) if f.name not in omitted)
        return {name: getattr(self, name) for name in fields}

    def describe(self) -> list[str]:
        """Returns lines for the user: images per split, files left out, notes."""
        counts = ", ".join(f"{role} {len(split):,}" for role, split in self.splits.items())
        lines = [f"{self.name}: {self.num_classes} classes; images: {counts}"]
        if left_out := describe_counts(self.left_out):
            lines.append(f"left out: {left_out}")
        if self.multi_frame_files:
            count = len(self.multi_frame_files)
            lines.append(f"files with several frames (only the first is used): {count}")
        return lines + [f"note: {note}" for note in self.notes]

    @classmethod
    def from_arrays(
        cls,
        train: tuple[Any, Any],
        test: tuple[Any, Any] | None = None,
        validation: tuple[Any, Any] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        task: str = "classes",
        normalize: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str = "arrays",
    ) -> Dataset:
        """Makes a data set from your own arrays, (images, labels) for each split. Pass it to `run`.

        Images are uint8 or floats from 0 to 1, [N H W C] or [N H W]. Floats of another range need
        `normalize=False`; the network then sees them unchanged. Labels are integers [N], or soft
        labels [N K] with rows of numbers >= 0 that sum to 1, or with `task="multilabel"` 0 and 1
        [N K]. The number of classes is the length of `class_names`, otherwise `num_classes`,
        otherwise the largest label + 1. `mean` and `std` are per channel of images in 0..1; by
        default they are computed from the training images.

        If there is no test split, the validation split serves as test; if there is neither, a fifth
        of train does. If no validation split remains, the share or number `data.validation` of the
        training examples becomes one. Arrays are used without a copy, except floats that are not
        float32: do not change them while a run reads them. Raises UserError if arrays or arguments
        do not fit.
        """
        # Imported late: flax_cnns/data/array_dataset.py imports this module.
        return importlib.import_module("flax_cnns.data.array_dataset").from_arrays(
            dict(train=train, test=test, validation=validation),
            class_names=class_names,
            num_classes=num_classes,
            task=task,
            normalize=normalize,
            mean=mean,
            std=std,
            name=name,
        )

    @classmethod
    def from_batches(
        cls,
        factory: Callable[[str, int, int, int], Iterable[Any]],
        sizes: Mapping[str, int],
        image_shape: Sequence[int],
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        task: str = "classes",
        normalize: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str = "batches",
    ) -> Dataset:
        """Makes a data set from a function of yours that returns batches (Grain, torch, tf.data).
        Pass it to `run`.

        `factory(split, start_step, process_index, process_count)` returns an iterable of {"image":
        [n H W C], "label": [n] or [n K]} or (images, labels). Each item is this process's part of a
        global batch: rows process_index*n to (process_index+1)*n of `data.batch_size`
        (`data.eval_batch_size` for test and validation), with n = batch size / process_count.
        "train" starts at batch number `start_step` and never ends; all its batches have the same
        size. The other splits are read once, in order, and their last batch may be smaller. A run
        resumes exactly if "train" always gives the same batches from a given step on.

        `sizes` is {"train": N, "test": M}, and "validation" if there is one; N images are an epoch.
        `image_shape` is (H, W, C). Images, labels, `task` and `normalize` are as in `from_arrays`.
        `mean` and `std` default to ImageNet's. Raises UserError if the arguments do not fit, and
        during the run if a batch does not fit.
        """
        return importlib.import_module("flax_cnns.data.batch_dataset").from_batches(
            factory,
            sizes,
            image_shape,
            num_classes=num_classes,
            class_names=class_names,
            task=task,
            normalize=normalize,
            mean=mean,
            std=std,
            name=name,
        )

    @classmethod
    def from_tfds(
        cls,
        builder: Any,
        *,
        image_size: int = 0,
        channels: int = 0,
        labels: str = "",
        data_dir: str = "",
        **fields: Any,
    ) -> Dataset:
        """Makes a data set from your own TFDS builder, a class or an instance. Pass it to `run`.

        If the data set is not prepared yet, the run prepares it first. That needs no TensorFlow if
        the builder yields encoded images (a PNG in io.BytesIO). `image_size` is the height and
        width that the network sees; 0 is the images' own size, which must then be the same for all.
        `channels` is 1 or 3; 0 is the images' own number. `labels` is the key of the class labels
        if the data set has several. `data_dir=""` is TFDS's default. `fields`, such as config and
        version, are passed to a class. Raises UserError if the arguments do not fit.
        """
        return importlib.import_module("flax_cnns.data.readers.tfds").from_builder(
            builder, fields, (image_size, image_size, channels), labels, data_dir
        )

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Dataset:
        """Makes a data set without splits from `as_dict`'s facts, perhaps after a trip through
        JSON."""
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in facts.items()
            if key in known
        }
        return cls(**values, splits={})


class RawDataset(NamedTuple):
    """A reader's result, before roles are assigned and images are resized or loaded."""

    sources: Mapping[str, ImageSource]  # by the data set's own split names
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]  # None: sizes vary
    left_out: Mapping[str, int] = MappingProxyType({})  # as in Dataset
    multi_frame_files: set[str] | None = None
    # What the reader adds to the fingerprint: see `fingerprint.compute`.
    provenance: dict[str, Any] = {}  # noqa: RUF012 (never changed)


def describe_counts(counts: Mapping[str, int], limit: int = 8) -> str:
    """Formats the counts of the `limit` most frequent kinds; "" if `counts` is empty."""
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{kind}: {count:,}" for kind, count in kinds[:limit]]
    rest = sum(count for _, count in kinds[limit:])
    return ", ".join(parts) + (f", other kinds: {rest:,}" if rest else "")
