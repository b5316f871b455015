"""What a data set is: sources of images, splits with a role, and what a reader hands over.

The roles: `train`; `test`, looked at once, at the end; `validation`, by which everything else is
chosen.
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
    """An image that cannot be decoded; `location` names it."""

    def __init__(self, location: str, why: Exception):
        super().__init__(
            f"cannot decode {location}: {why}; mend or delete it, or set data.skip_damaged=True"
        )
        self.location, self.why = location, why

    def __reduce__(self):  # Errors of worker processes travel pickled.
        return DamagedImage, (self.location, self.why)


class WrongLabel(UserError):
    """A label that is none of the data set's classes; `location` names the example."""

    def __init__(self, location: str, label: int, num_classes: int):
        said = "it has no label (-1)" if label == -1 else f"its label is {label}"
        super().__init__(f"{location}: {said}; expected 0 to {num_classes - 1}")
        self.location, self.label, self.num_classes = location, label, num_classes

    def __reduce__(self):
        return WrongLabel, (self.location, self.label, self.num_classes)


class ImageSource(Protocol):
    """Images that are decoded when they are read. Its `repr` is stable: Grain saves it."""

    labels: np.ndarray | None  # i32 [N]; None where it would take reading every example

    def __len__(self) -> int: ...

    def open(self, i: int) -> tuple[Image.Image, int]:
        """Image (of any size and mode, perhaps not decoded yet) and label."""

    def location(self, i: int) -> str:
        """What to call example `i` in an error message."""

    def fetch(self, rows: np.ndarray) -> ImageSource:
        """The same source with these rows at hand, where reading many at once is quicker."""


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
    """Another source under labels of our own."""

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
    """`FileSource.multi_frame_files` (readers/folder.py) of a source, also below Subset and
    Relabeled; else empty."""
    while isinstance(source, Subset | Relabeled):
        source = source.source
    return getattr(source, "multi_frame_files", set())


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """Some rows of a user's array: indexing gathers them; nothing is copied before."""

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
        """`index`: whole numbers or a slice, of rows."""
        return self.array[index if self.rows is None else self.rows[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def take_rows(images: np.ndarray | ArrayRows, which: np.ndarray) -> np.ndarray | ArrayRows:
    """These rows: a copy of an array, and of `ArrayRows` only other numbers."""
    if not isinstance(images, ArrayRows):
        return images[which]
    return ArrayRows(images.array, which if images.rows is None else images.rows[which])


@dataclasses.dataclass(frozen=True)
class Split:
    """Arrays in memory, or a source that decodes, or a number of examples that come in batches."""

    # i32 [N]; f32 [N K] of soft labels and of multilabel data; None for a streamed TFDS split
    labels: np.ndarray | None
    images: np.ndarray | ArrayRows | None = None  # u8 [N H W C], or f32 of a user's own
    source: ImageSource | None = None
    count: int = 0  # of a split of which a user's factory gives batches; else 0

    def __len__(self) -> int:
        return self.count or len(self.source if self.images is None else self.images)


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # H, W, C as the network sees it
    mean: tuple[float, ...]  # per channel, in 0..1
    std: tuple[float, ...]
    # Where mean and std come from: published, training images, ImageNet, config, data set, nothing.
    normalized_by: str
    splits: dict[str, Split]  # train, test, and validation if there is one
    eval_share: float = 1.0  # of the shorter side that evaluation sees
    # [C C] of the training images' colors in 0..1; (): not needed, as data.augment.pca is off.
    covariance: tuple[tuple[float, ...], ...] = ()
    # Images left out because they could not be decoded; it grows while a split is streamed.
    damaged: list[str] = dataclasses.field(default_factory=list)
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # files by kind
    # Files with several pictures, of which the first is used; grows while a split is streamed.
    multi_frame_files: set[str] = dataclasses.field(default_factory=set)
    notes: tuple[str, ...] = ()  # what may be intended, but would otherwise go unnoticed
    has_own_validation: bool = False  # the validation split is the data set's, not taken from train
    # See flax_cnns/data/fingerprint.py; {} for noise, and if it was not computed.
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: str = "classes"  # or multilabel, whose labels are f32 [N K] of 0 and 1
    # False: images are floats of any range, which the network sees as they are.
    normalize: bool = True
    # `factory(split, start_step, process_index, process_count)` of `from_batches`, else None.
    factory: Callable[[str, int, int, int], Iterable[Any]] | None = None

    # `reader(prepare) -> RawDataset` of `from_tfds`, for the loader; else None.
    reader: Callable[[bool], RawDataset] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether a user's factory gives the batches: examples cannot be read in another order."""
        return self.factory is not None

    @property
    def is_decoded(self) -> bool:
        """False: images are a user's own arrays or batches."""
        return not (self.is_stream or isinstance(self.splits["train"].images, ArrayRows))

    @property
    def snapshot(self) -> fingerprints.DataSnapshot:
        counts = {role: len(split) for role, split in self.splits.items()}
        mean = self.mean if self.normalized_by == "training images" else ()
        return fingerprints.DataSnapshot(self.fingerprint, counts, mean)

    @property
    def in_memory(self) -> bool:
        """False: images are decoded as they come, and our loader does the random resized crop.
        Batches of the user's own are not decoded here."""
        return self.is_stream or self.splits["train"].images is not None

    def as_dict(self) -> dict[str, Any]:
        """What it is, without its images, as JSON has it."""
        found = (
            "splits",
            "damaged",
            "left_out",
            "multi_frame_files",
            "notes",
            "has_own_validation",
        )
        found += ("factory", "reader")
        fields = (f.name for f in dataclasses.fields(self) if f.name not in found)
        return {name: getattr(self, name) for name in fields}

    def describe(self) -> list[str]:
        """Lines for the user: how many images each split has, what was left out, notes."""
        counts = ", ".join(f"{role} {len(split):,}" for role, split in self.splits.items())
        lines = [f"{self.name}: {self.num_classes} classes; images: {counts}"]
        if said := describe_counts(self.left_out):
            lines.append(f"left out: {said}")
        if self.multi_frame_files:
            lines.append(
                "files with several pictures, of which the first is used: "
                f"{len(self.multi_frame_files)}"
            )
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
        """A data set of your own arrays, (images, labels) for each split, to give to `run`.

        Images: uint8 [N H W C] or [N H W], or floats from 0 to 1; floats of another range need
        `normalize=False`, and the network sees them as they are. Labels: integers [N]; rows of
        soft labels [N K], each at least 0, with sum 1; or, with `task="multilabel"`, 0 and 1
        [N K]. There are as many classes as `class_names`, else `num_classes`, else the largest
        label + 1. `mean` and `std`, per channel of images in 0..1, are those of the training
        images where they are not given.

        Where there is no test split the validation split serves as test, or else a fifth of train;
        `data.validation` of train is the validation split where there is none. All arrays but
        floats of another precision are used as they are, without a copy: do not change them while
        a run reads them. Raises UserError.
        """
        # By name: flax_cnns/data/array_dataset.py imports this module.
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
        """A data set of batches that a function of yours makes (Grain, torch, tf.data), to give to
        `run`.

        `factory(split, start_step, process_index, process_count)` returns an iterable of {"image":
        [n H W C], "label": [n] or [n K]} or (images, labels): this process's rows of each global
        batch, rows process_index*n to (process_index+1)*n of `data.batch_size` (`eval_batch_size`
        for other splits), n = batch size / process_count. "train" goes on without end from batch
        number `start_step`, all batches of one size; the others come once, in order, with a short
        last batch. Resuming is exact if train from a step on is always the same.

        `sizes`: {"train": N, "test": M}, and "validation" if there is one; N images are an epoch.
        `image_shape` is (H, W, C). Images, labels, `task`, `normalize`: as `from_arrays` has them.
        Without `mean` and `std` those of ImageNet are used. Raises UserError, for a batch when it
        is pulled.
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
        """A data set of a TFDS builder of yours, a class or an instance, to give to `run`.

        It is prepared first if needed: without TensorFlow, if it yields images that are encoded
        already (a PNG in io.BytesIO). `image_size`: height and width that the network sees; 0: the
        images' own, where all have one. `channels`: 1 or 3; 0: their own. `labels`: the key of the
        class labels, where there are several. `data_dir`: "" is TFDS's default. `fields`: config
        and version of a class. Raises UserError.
        """
        return importlib.import_module("flax_cnns.data.readers.tfds").from_builder(
            builder, fields, (image_size, image_size, channels), labels, data_dir
        )

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Dataset:
        """Of `as_dict`, perhaps by way of JSON: a data set of no splits."""
        known = {f.name for f in dataclasses.fields(cls)}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in known}
        return cls(**plain, splits={})


class RawDataset(NamedTuple):
    """What a reader found, before roles, sizes and memory."""

    sources: dict[str, ImageSource]  # by the data set's own split names
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]  # None: they vary
    left_out: Mapping[str, int] = MappingProxyType({})  # as Dataset has them
    multi_frame_files: set[str] | None = None
    provenance: dict[str, Any] = {}  # noqa: RUF012 (never changed) see `fingerprints.compute`


def describe_counts(counts: Mapping[str, int], most: int = 8) -> str:
    """Counts by kind as a text, the most frequent first; "" for none."""
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    said = [f"{kind}: {count:,}" for kind, count in kinds[:most]]
    rest = sum(count for _, count in kinds[most:])
    return ", ".join(said) + (f", other kinds: {rest:,}" if rest else "")
