"""Splits: cutting one out of another, checks before a run, and notes for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_cnns.data import opencv
from flax_cnns.data.decode import read_example
from flax_cnns.data.images import DECODING_ERRORS
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import DamagedImage, ImageSource, Split, Subset, WrongLabel, take_rows
from flax_cnns.errors import UserError

TEST_SHARE = 0.2  # of the training images, if a data set has no test split
NUM_PROBED_IMAGES = 8  # of a streamed split, evenly spaced, decoded before a run begins


# ---- roles, and cutting splits from train


def assign_roles(own: Mapping[str, ImageSource], name: str, seed: int) -> dict[str, ImageSource]:
    """Returns the splits of the data set `name` by role. `own` holds them by their own names.

    If there is no test split, validation serves as test; if there is neither, a fifth of train
    does. Raises UserError if there is no train split, or if train is too small.
    """
    if "train" not in own:
        raise UserError(f"{name} has no train split; it has: {', '.join(sorted(own))}")
    train = own["train"]
    if "test" in own:
        return {role: own[role] for role in ("train", "test", "validation") if role in own}
    if "validation" in own:
        return {"train": train, "test": own["validation"]}
    subject = f"data.name={name} has no test split; the fifth of train that becomes it"
    keep, test = split_rows(train.labels, len(train), TEST_SHARE, seed, subject=subject)
    return {
        "train": Subset(train, keep, f"without test, seed {seed}"),
        "test": Subset(train, test, f"test, seed {seed}"),
    }


def find_strata(labels: np.ndarray | None, task: str) -> np.ndarray | None:
    """Returns the class by which each example is stratified, i32 [N]: the likeliest class if labels
    are soft. None for multilabel data and unknown labels, which are split at random."""
    if labels is None or task == "multilabel":
        return None
    return labels if labels.ndim == 1 else labels.argmax(-1)


def take_from_train(
    splits: dict[str, Split],
    role: str,
    amount: float,
    seed: int,
    *,
    task: str = "classes",
    subject: str = "",
) -> dict[str, Split]:
    """Returns the splits with `role` cut out of train. `amount` and `subject` are as in
    `split_rows`."""
    train = splits["train"]
    strata = find_strata(train.labels, task)
    keep, taken = split_rows(strata, len(train), amount, seed, subject=subject)
    kept = select_rows(train, keep, f"without {role}, seed {seed}")
    return {**splits, "train": kept, role: select_rows(train, taken, f"{role}, seed {seed}")}


def keep_fraction(
    splits: dict[str, Split], fraction: float, seed: int, *, task: str = "classes"
) -> dict[str, Split]:
    """Returns the splits with `fraction` of train, stratified. The examples of a smaller fraction
    are among those of a larger one. Raises UserError if a class would lose all its images."""
    train = splits["train"]
    subject = f"data.fraction={fraction:g}"
    strata = find_strata(train.labels, task)
    _, kept = split_rows(strata, len(train), fraction, seed, subject=subject)
    if strata is not None and (lost := set(strata) - set(strata[kept])):
        raise UserError(
            f"{subject} keeps {len(kept)} of {len(train)} training images, and none of {len(lost)} "
            "classes; choose a larger fraction"
        )
    return {**splits, "train": select_rows(train, kept, f"fraction {fraction:g}, seed {seed}")}


def select_rows(split: Split, which: np.ndarray, name: str) -> Split:
    """Returns a split with the examples `which`; `name` describes this choice of examples."""
    if split.images is None:
        assert split.source is not None
        source = Subset(split.source, which, name)
        return Split(labels=source.labels, source=source)
    assert split.labels is not None
    return Split(labels=split.labels[which], images=take_rows(split.images, which))


def split_rows(
    labels: np.ndarray | None, total: int, amount: float, seed: int, subject: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows into (those that stay, those that are taken), both sorted.

    `amount` is a fraction below 1, or a count. `subject` begins the error message; "" stands for
    data.validation. The split is stratified: each class gives its share, to within one example. If
    less than half is taken, a class with a single example keeps that example. The split is random
    if `labels` is None, as for a streamed TFDS split, whose labels are known only after reading
    every image. Raises UserError if no row would be taken, or none would stay.
    """
    count = round(amount * total) if amount < 1 else int(amount)
    if not 0 < count < total:
        raise UserError(
            f"{subject or f'data.validation={amount:g}'} takes {count} of {total} training images; "
            "at least one must be taken, and one must stay"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(total)
    if labels is not None:
        # The k-th of a class's n examples gets the position (k + 1/2) / n. The `count` lowest
        # positions then hold the same share of every class.
        classes = labels[shuffled]
        order = np.argsort(classes, kind="stable")
        _, starts, sizes = np.unique(classes[order], return_index=True, return_counts=True)
        position = np.empty(total)
        rank = np.arange(total) - np.repeat(starts, sizes)
        position[order] = (rank + 0.5) / np.repeat(sizes, sizes)
        shuffled = shuffled[np.argsort(position, kind="stable")]
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


# ---- checks


def check_source(source: ImageSource, where: str, num_classes: int) -> None:
    """Raises UserError if a split has no examples, images without pixels, or a label outside 0 to
    num_classes - 1. `where` names the split. Labels that are not known yet are checked when they
    are read."""
    if not len(source):
        raise UserError(f"{where}: expected at least one example, got none")
    if isinstance(source, ArraySource) and not source.images.size:
        shape = "x".join(map(str, source.images.shape[1:3]))
        raise UserError(f"{where}: expected images of at least one pixel, got {shape}")
    if source.labels is not None:
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
        if len(wrong):
            i = int(wrong[0])
            raise WrongLabel(source.location(i), int(source.labels[i]), num_classes)


def decoding_error(role: str, source: ImageSource) -> UserError:
    """Returns the error for a split whose images are all damaged. Reads the first image to give the
    reason."""
    try:
        read_example(source, 0, 8, 3)
        reason = ""
    except DamagedImage as error:
        reason = f"; the first, {error.location}: {error.cause}"
    return UserError(f"none of the {len(source)} {role} images can be decoded{reason}")


def check_decodes(role: str, source: ImageSource, skip_damaged: bool) -> None:
    """Checks that a streamed split can be decoded, by NUM_PROBED_IMAGES evenly spaced images.

    Raises DamagedImage if one of them is damaged. With `skip_damaged`, raises UserError if all
    images of the split are damaged.
    """
    total = len(source)
    if any([_decodes(source, i, skip_damaged) for i in _probe(source)]):
        return
    if not any(_decodes(source, i, skip_damaged) for i in range(total)):
        raise decoding_error(role, source)


def check_opencv(source: ImageSource, name: str) -> None:
    """Raises UserError if OpenCV is not installed, or would decode none of NUM_PROBED_IMAGES evenly
    spaced images of the data set `name`."""
    opencv.import_opencv()
    kinds = set()
    for i in _probe(source):
        try:
            image, _ = source.open(int(i))
        except DECODING_ERRORS:
            continue  # another check reports damaged images
        with image:
            if opencv.is_supported(image):
                return
            kinds.add(f"{image.format} {image.mode}" if image.format else "pixels, not files")
    if kinds:
        raise UserError(
            f"data.decoder='opencv' decodes gray and RGB JPEGs, but the images of {name} are"
            f" {', '.join(sorted(kinds))}; leave it at 'pillow'"
        )


def _probe(source: ImageSource) -> np.ndarray:
    """Returns the rows of NUM_PROBED_IMAGES evenly spaced images."""
    total = len(source)
    return np.unique(np.linspace(0, total - 1, min(NUM_PROBED_IMAGES, total)).astype(int))


def _decodes(source: ImageSource, i: int, skip_damaged: bool) -> bool:
    try:
        read_example(source, int(i), 8, 3)
    except DamagedImage:
        if not skip_damaged:
            raise
        return False
    return True


# ---- notes


def find_notes(
    splits: dict[str, Split],
    class_names: Sequence[str],
    batch_size: int,
    *,
    task: str = "classes",
) -> list[str]:
    """Returns notes for the user on possible mistakes in settings and data. Raises UserError if all
    training images have the same class."""
    train, notes = splits["train"], []
    if note := make_batch_note(batch_size, len(train)):
        notes.append(note)
    if train.labels is not None:
        soft = train.labels.ndim > 1
        counts = (
            (train.labels > 0).sum(0)
            if soft
            else np.bincount(train.labels, minlength=len(class_names))
        )
        missing = [name for name, count in zip(class_names, counts) if not count]
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        note = f"{len(missing)} of {len(class_names)} classes have no training image: {shown}"
        if task == "classes" and len(missing) == len(class_names) - 1:
            raise UserError(f"{note}; expected images of two classes or more")
        if missing:
            notes.append(note)
    return notes


def make_batch_note(batch_size: int, images: int) -> str:
    """Returns a line if a batch is larger than the training set, otherwise ""."""
    if batch_size <= images:
        return ""
    return (
        f"data.batch_size={batch_size} is more than the {images} training images: a batch holds "
        f"each image {batch_size / images:.1f} times on average"
    )


# ---- memory


def fits_in_memory(config: Any, size: int) -> bool:
    """Returns whether `size` bytes of images should be kept in memory, by `config.in_memory`."""
    if config.in_memory == "auto":
        return size < config.memory_limit * 2**30
    return config.in_memory == "yes"
