"""Checks of a user's images, labels, classes, mean and std. All checks raise UserError."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flax_cnns.data.statistics import broadcast_to_channels
from flax_cnns.data.types import WrongLabel
from flax_cnns.errors import UserError

TASKS = ("classes", "multilabel")
VALUE_TOLERANCE = 1e-5  # outside 0..1: x * (1 / 255) may be slightly more than 1
SUM_TOLERANCE = 1e-3  # of the sum of a row of soft labels


def check_task(task: str) -> None:
    if task not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")


def check_images(split: str, value: Any, normalize: bool) -> np.ndarray:
    """Returns the images of a split as u8 or f32 [N H W C], without a copy if possible."""
    name = f"{split} images"
    images = to_numpy(name, value)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise UserError(f"{name}: expected [N H W C] or [N H W], got {list(images.shape)}")
    if images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise layout_error(name, images.shape)
    if not images.size:
        raise UserError(
            f"{name}: expected at least one image of at least one pixel, got {images.shape}"
        )
    return check_values(name, images, normalize)


def layout_error(name: str, shape: Sequence[int]) -> UserError:
    return UserError(
        f"{name}: expected [N H W C], got {list(shape)}; transpose them by (0, 2, 3, 1)"
    )


def check_values(name: str, images: np.ndarray, normalize: bool) -> np.ndarray:
    """Returns images [N H W C] as u8 or f32, after checking their range."""
    if images.dtype == np.uint8:
        if not normalize:
            raise UserError(
                f"{name} are uint8, but normalize=False is for floats that the network sees"
                " unchanged; give floats, or set data.augment.normalize=False, which only divides"
                " by 255"
            )
        return images
    if images.dtype.kind != "f":
        remedy = "images.astype(np.uint8)" if images.dtype.kind in "iu" else "a float32 array"
        if images.dtype.kind in "iu" and images.max() > 255:  # uint8 would wrap around
            remedy = "(images / WHITE).astype(np.float32), where WHITE is the value of white"
        elif images.dtype == bool:
            remedy = "images.astype(np.float32)"
        raise UserError(
            f"{name} are {images.dtype}; expected uint8 (0 to 255) or floats (0 to 1): give"
            f" {remedy}"
        )
    images = np.asarray(images, np.float32)
    low, high = np.inf, -np.inf
    for chunk in _split_into_chunks(images):
        low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())
    if not np.isfinite([low, high]).all():
        raise UserError(f"{name} have values that are not finite (NaN or infinite)")
    if normalize and (low < -VALUE_TOLERANCE or high > 1 + VALUE_TOLERANCE):
        raise UserError(
            f"{name} are floats from {low:.6g} to {high:.6g}; expected 0 to 1: divide by 255, give"
            " uint8, or set normalize=False, so that the network sees them unchanged"
        )
    return images


def _split_into_chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yields a few MiB of images at a time, so that temporary arrays stay small."""
    size = max(1, 2**24 // images[0].nbytes)
    return (images[start : start + size] for start in range(0, len(images), size))


def check_labels(split: str, value: Any, task: str) -> np.ndarray:
    """Returns the labels of a split: i32 [N], or f32 [N K] if soft or multilabel."""
    name = f"{split} labels"
    labels = to_numpy(name, value)
    if labels.dtype.kind in "US":
        raise UserError(
            f"{name} are strings; expected numbers: names, labels = np.unique(labels,"
            " return_inverse=True)"
        )
    if labels.dtype.kind not in "biuf":
        raise UserError(f"{name} are {labels.dtype}; expected integers or floats")
    if task == "multilabel":
        if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
            raise UserError(
                f"{name} of task='multilabel': expected 0 and 1 [N K], got {describe_value(labels)}"
            )
        return np.asarray(labels, np.float32)
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype.kind in "biu":
        labels = labels[:, 0]  # Keras has this shape
    if labels.ndim == 1:
        if labels.dtype.kind == "f":
            raise UserError(f"{name} are {labels.dtype} [N]; expected integers: labels.astype(int)")
        return to_int32(labels)
    if labels.ndim != 2:
        raise UserError(
            f"{name}: expected integers [N] or soft labels [N K], got {list(labels.shape)}"
        )
    check_soft_labels(name, labels)
    return np.asarray(labels, np.float32)


def check_soft_labels(name: str, labels: np.ndarray) -> None:
    """Raises UserError for the first row of [N K] that is not a distribution over classes."""
    sums = labels.sum(1, dtype=np.float64)
    wrong = np.flatnonzero(~((labels >= 0).all(1) & (np.abs(sums - 1) <= SUM_TOLERANCE)))
    if len(wrong):
        i = int(wrong[0])
        remedy = "; if an image may have several classes, give task='multilabel'"
        raise UserError(
            f"{name}: row {i} has the sum {sums[i]:.6g} and the smallest value"
            f" {labels[i].min():.6g}; expected values of at least 0 with the sum 1"
            + (remedy if np.isin(labels, (0, 1)).all() else "")
        )


def to_int32(labels: np.ndarray) -> np.ndarray:
    """Converts to i32. Values beyond i32 are clipped; `check_label_range` then rejects them."""
    bounds = np.iinfo(np.int32)
    return np.clip(labels.astype(np.int64), bounds.min, bounds.max).astype(np.int32)


def to_numpy(name: str, value: Any) -> np.ndarray:
    """Returns an array of NumPy, JAX, torch or TensorFlow as NumPy, without a copy if possible."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: expected one array, got {describe_value(value)}: {reason}"
        ) from error
    if array.dtype == object:
        raise UserError(
            f"{name}: expected one array of numbers, got {describe_value(value)} of objects; put"
            " images of different sizes into a folder (data.name=folder)"
        )
    return array


def describe_value(value: Any) -> str:
    """Returns the type, and the shape of an array, for error messages."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    shape = f" {list(value.shape)}" if hasattr(value, "shape") else ""
    return f"{type(value).__name__}{shape}"


def check_class_count(class_names: Sequence[str] | None, num_classes: int | None) -> int:
    """Returns the number of classes, from their names or `num_classes`; 0 if neither is given."""
    if num_classes is not None and (
        not isinstance(num_classes, int | np.integer) or num_classes < 1
    ):
        raise UserError(f"num_classes: expected a whole number above 0, got {num_classes!r}")
    if class_names is None:
        return num_classes or 0
    if isinstance(class_names, str):
        raise UserError(f"class_names: expected a sequence of names, got {class_names!r}")
    names = list(map(str, class_names))
    if num_classes not in (None, len(names)):
        raise UserError(f"num_classes={num_classes}, but class_names has {len(names)}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"class_names: {repeated[0]!r} is given more than once")
    return len(names)


def check_label_range(location: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises WrongLabel for the first label of i32 [N] outside 0 to `num_classes` - 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        i = int(wrong[0])
        raise WrongLabel(f"{location}, image {i}", int(labels[i]), num_classes)


def check_mean_and_std(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, normalize: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std per channel; (), () if neither is given."""
    if mean is None and std is None:
        return (), ()
    if mean is None or std is None:
        raise UserError("mean and std: give both, or neither")
    if not normalize:
        raise UserError("mean and std have no effect with normalize=False; remove them")
    mean, std = (np.atleast_1d(np.asarray(values, float)).tolist() for values in (mean, std))
    means, stds = broadcast_to_channels(mean, std, channels, "mean and std")
    is_finite = np.isfinite(means + stds).all()
    if not (is_finite and min(stds) > 0 and 0 <= min(means) <= max(means) <= 1):
        raise UserError(
            "mean and std: expected values for images in 0..1, with std above 0; got"
            f" {means} and {stds}"
        )
    return means, stds
