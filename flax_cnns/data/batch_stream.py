"""The batches of a user's factory: checks, copies, padding and digests."""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flax_cnns.data import input_checks
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.types import Batch

# Batches that a training stream keeps for digests: the next step's, and those that a prefetching
# thread may have pulled after it (two in its queue and one in hand).
KEPT_BATCHES = 4


# ---- one split


class _Stream:
    """This process's batches of one split, checked and copied. `process` is (its index, the number
    of processes)."""

    def __init__(
        self, data: Dataset, split: str, start: int, batch_size: int, process: tuple[int, int]
    ):
        self.data, self.split, self.start, self.process = data, split, start, process
        self.batch_size = batch_size
        self.step = start  # of the next batch
        self.kinds: tuple[np.dtype, int] | None = None  # dtype of images, ndim of labels
        self._batches: Iterator[Any] | None = None

    @property
    def call(self) -> str:
        """The call of the factory, for error messages."""
        index, count = self.process
        return f"factory({self.split!r}, {self.start}, {index}, {count})"

    def take(self, count: int | None) -> Batch | None:
        """Returns the next batch, {"image": u8 or f32 [count H W C], "label": i32 [count] or f32
        [count K]}, or None at the end. If `count` is None, a batch may have any number of rows.
        Raises UserError if the batch does not fit the data set."""
        if self._batches is None:
            assert self.data.factory is not None
            batches = self.data.factory(self.split, self.start, *self.process)
            if not isinstance(batches, Iterable):
                got = input_checks.describe_value(batches)
                raise UserError(f"{self.call} returned {got}; expected an iterable of batches")
            self._batches = iter(batches)
        try:
            got = next(self._batches)
        except StopIteration:
            return None
        where = f"{self.split}, {'step' if self.split == 'train' else 'batch'} {self.step}"
        images, labels = _unpack(where, got)
        # Copied, because a factory may reuse its arrays.
        images = np.array(self._check_images(where, images, count), order="C")
        labels = np.array(self._check_labels(where, labels, len(images)), order="C")
        kinds = images.dtype, labels.ndim
        if self.kinds is not None and self.kinds != kinds:
            raise UserError(
                f"{where}: images are {images.dtype} and labels have {labels.ndim} dimensions, but"
                f" in earlier batches images were {self.kinds[0]} and labels had {self.kinds[1]}"
            )
        self.kinds = kinds
        self.step += 1
        return {"image": images, "label": labels}

    def _check_images(self, where: str, got: Any, count: int | None) -> np.ndarray:
        name, shape = f"{where}: images", self.data.image_shape
        images = input_checks.to_numpy(name, got)
        if images.ndim == 3 and shape[2] == 1:
            images = images[..., None]
        if images.shape[1:] == (shape[2], *shape[:2]) != shape:
            raise input_checks.layout_error(name, images.shape)
        if images.shape[1:] != shape or images.ndim != 4:
            raise UserError(f"{name}: expected [n {_join(shape)}], got {list(images.shape)}")
        if count is not None and len(images) != count:
            raise UserError(f"{name}: expected {count} {self._explain_count()}, got {len(images)}")
        if self.kinds is None and len(images):
            return input_checks.check_values(name, images, self.data.normalize)
        kind = {"u1": np.uint8, "f2": np.float32, "f4": np.float32, "f8": np.float32}
        if images.dtype.str[1:] not in kind:
            raise UserError(
                f"{name} are {images.dtype}; expected uint8 or floats, as in earlier batches"
            )
        return np.asarray(images, kind[images.dtype.str[1:]])

    def _explain_count(self) -> str:
        """Names the settings that decide the number of rows, for error messages."""
        shared = f" over {self.process[1]} processes" if self.process[1] > 1 else ""
        if self.split == "train":
            return f"(data.batch_size={self.batch_size}{shared}, also at the end of the data)"
        size = len(self.data.splits[self.split])
        return f"(data.eval_batch_size={self.batch_size}{shared}, sizes[{self.split!r}]={size})"

    def _check_labels(self, where: str, got: Any, count: int) -> np.ndarray:
        name, classes = f"{where}: labels", self.data.num_classes
        labels = input_checks.check_labels(f"{where}:", got, self.data.task)
        if len(labels) != count:
            raise UserError(f"{name}: expected {count}, as many as images, got {len(labels)}")
        if labels.ndim == 1:
            input_checks.check_label_range(where, labels, classes)
        elif labels.shape[1] != classes:
            raise UserError(
                f"{name} have {labels.shape[1]} columns, but there are {classes} classes"
            )
        return labels

    def close(self) -> None:
        batches: Any = self._batches
        self._batches = iter(())
        if hasattr(batches, "close"):
            batches.close()


def _join(shape: Sequence[int]) -> str:
    return " ".join(map(str, shape))


def _unpack(where: str, got: Any) -> tuple[Any, Any]:
    if isinstance(got, Mapping):
        if set(got) == {"image", "label"}:
            return got["image"], got["label"]
        raise UserError(
            f"{where}: expected the keys image and label, got {', '.join(map(str, got))}"
        )
    if isinstance(got, tuple | list) and len(got) == 2:
        return got[0], got[1]
    raise UserError(
        f"{where}: expected {{'image': ..., 'label': ...}} or (images, labels), got"
        f" {input_checks.describe_value(got)}"
    )


# ---- training


class TrainBatches:
    """An iterator over this process's training batches, from a given step on.

    One thread may pull batches ahead of the steps that use them, while another asks for a digest.
    """

    def __init__(self, data: Dataset, batch_size: int, start: int, process: tuple[int, int]):
        self._stream = _Stream(data, "train", start, batch_size, process)
        self._n = batch_size // process[1]
        self._lock = threading.Lock()  # guards the stream and the attributes below
        self._kept: dict[int, Batch] = {}  # the last KEPT_BATCHES pulled, by step
        # Batches that were pulled for a digest and not used yet.
        self._ahead: collections.deque[Batch] = collections.deque()
        self._error: Exception | None = None
        self._closed = False

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        with self._lock:
            if self._closed:
                raise StopIteration
            return dict(self._ahead.popleft() if self._ahead else self._pull())

    def _pull(self) -> Batch:
        if self._error is not None:
            raise self._error
        step = self._stream.step
        try:
            batch = self._stream.take(self._n)
            if batch is None:
                raise UserError(
                    f"{self._stream.call} ended before step {step}, after"
                    f" {step - self._stream.start} batches; expected batches without end: start"
                    " over when the data ends"
                )
        except Exception as error:
            self._error = error
            raise
        self._kept[step] = batch
        self._kept.pop(step - KEPT_BATCHES, None)
        return batch

    def digest(self, step: int) -> str:
        """Computes a digest of the images and labels of this process's batch for step `step`.
        Pulls the batch if that has not happened yet, and waits if it is being pulled.

        Returns "" if there is no such batch because the factory failed or ended; the step itself
        reports that. Raises ValueError if the batch is no longer among the last KEPT_BATCHES.
        """
        batch = self._kept.get(step)
        if batch is None:
            with self._lock:
                while self._stream.step <= step:
                    if self._closed:
                        return ""
                    try:
                        self._ahead.append(self._pull())
                    except Exception:
                        return ""
                if step not in self._kept:
                    raise ValueError(f"the batch of step {step} is no longer kept")
                batch = self._kept[step]
        digest = hashlib.blake2b(digest_size=8)
        for key in ("image", "label"):
            digest.update(f"{batch[key].dtype} {batch[key].shape}".encode())
            digest.update(batch[key])
        return digest.hexdigest()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stream.close()


# ---- evaluation


def eval_batches(
    data: Dataset, split: str, batch_size: int, process: tuple[int, int]
) -> Generator[Batch]:
    """Yields the batches of `pipeline.eval_batches`. Raises UserError for the training split, and
    while iterating if the number of examples differs from the data set's `sizes`."""
    if split == "train":
        raise UserError(
            f"the training batches of {data.name} never end, and the factory may augment them;"
            " they cannot be evaluated (train.evaluate_train)"
        )
    return _eval_batches(data, split, batch_size, process)


def _eval_batches(
    data: Dataset, split: str, batch_size: int, process: tuple[int, int]
) -> Generator[Batch]:
    n, total = batch_size // process[1], len(data.splits[split])
    first, number = process[0] * n, -(-total // batch_size)
    stream = _Stream(data, split, 0, batch_size, process)
    expected = f"sizes[{split!r}]={total} and data.eval_batch_size={batch_size} make {number}"
    try:
        for b in range(number):
            rows = min(max(total - b * batch_size - first, 0), n)
            batch = stream.take(rows)
            if batch is None and rows:
                raise UserError(f"{stream.call} ended after {b} batches; {expected}")
            yield _pad(batch or _empty(data, stream), n)
        # A process without rows in the last batch may or may not yield an empty batch.
        if stream.take(None) is not None:
            raise UserError(f"{stream.call} goes on after {number} batches; {expected}")
    finally:
        stream.close()


def _empty(data: Dataset, stream: _Stream) -> Batch:
    """Returns a batch of 0 rows, with the dtypes and dimensions of other processes' batches."""
    if stream.kinds is None:
        training = _Stream(data, "train", 0, 0, stream.process)
        try:
            if training.take(None) is None:
                raise UserError(f"{training.call} ended before step 0")
        finally:
            training.close()
        stream.kinds = training.kinds
    assert stream.kinds is not None
    dtype, ndim = stream.kinds
    labels = np.zeros(0, np.int32) if ndim == 1 else np.zeros((0, data.num_classes), np.float32)
    return {"image": np.zeros((0, *data.image_shape), dtype), "label": labels}


def _pad(batch: Batch, n: int) -> Batch:
    """Returns {"image", "label", "mask"}, padded with zeros to `n` rows."""
    rows = len(batch["label"])
    padded = {
        key: np.concatenate([array, np.zeros((n - rows, *array.shape[1:]), array.dtype)])
        if rows < n
        else array
        for key, array in batch.items()
    }
    return {**padded, "mask": (np.arange(n) < rows).astype(np.float32)}
