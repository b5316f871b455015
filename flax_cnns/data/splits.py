"""Splits: how they are cut out of one another, and what each must hold before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_cnns.data.decode import read_example
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import DamagedImage, ImageSource, Split, Subset, WrongLabel, take_rows
from flax_cnns.errors import UserError

TEST_SHARE = 0.2  # of the training images, where a data set has no test split
NUM_PROBED_IMAGES = (
    8  # images of a streamed split, evenly spread, that are decoded before a run begins
)


# ---- roles, and what is taken from train


def assign_roles(own: dict[str, ImageSource], name: str, seed: int) -> dict[str, ImageSource]:
    """The splits that the data set `name` has itself, by role. Raises UserError."""
    if "train" not in own:
        raise UserError(f"{name} has no train split; it has: {', '.join(sorted(own))}")
    train = own["train"]
    if "test" in own:
        return {role: own[role] for role in ("train", "test", "validation") if role in own}
    if "validation" in own:
        return {"train": train, "test": own["validation"]}
    what = f"data.name={name} has no test split; the fifth of train that becomes it"
    keep, test = split_rows(train.labels, len(train), TEST_SHARE, seed, what=what)
    return {
        "train": Subset(train, keep, f"without test, seed {seed}"),
        "test": Subset(train, test, f"test, seed {seed}"),
    }


def find_strata(labels: np.ndarray | None, task: str) -> np.ndarray | None:
    """The class of each example, by which a split is stratified: i32 [N]; the likeliest one of soft
    labels. None: the split is random, as of multilabel data."""
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
    what: str = "",
) -> dict[str, Split]:
    """Gives `role` its share of train. `what`: as `split_rows` has it."""
    train = splits["train"]
    strata = find_strata(train.labels, task)
    keep, taken = split_rows(strata, len(train), amount, seed, what=what)
    kept = _rows(train, keep, f"without {role}, seed {seed}")
    return {**splits, "train": kept, role: _rows(train, taken, f"{role}, seed {seed}")}


def keep_fraction(
    splits: dict[str, Split], fraction: float, seed: int, *, task: str = "classes"
) -> dict[str, Split]:
    """Of train that share, every class alike. A smaller fraction is part of a larger one."""
    train = splits["train"]
    what = f"data.fraction={fraction:g}"
    strata = find_strata(train.labels, task)
    _, kept = split_rows(strata, len(train), fraction, seed, what=what)
    if strata is not None and (lost := set(strata) - set(strata[kept])):
        raise UserError(
            f"{what} keeps {len(kept)} of {len(train)} training images, and of "
            f"{len(lost)} classes none; take a larger one"
        )
    return {**splits, "train": _rows(train, kept, f"fraction {fraction:g}, seed {seed}")}


def _rows(split: Split, which: np.ndarray, name: str) -> Split:
    if split.images is None:
        source = Subset(split.source, which, name)
        return Split(labels=source.labels, source=source)
    return Split(labels=split.labels[which], images=take_rows(split.images, which))


def split_rows(
    labels: np.ndarray | None, total: int, amount: float, seed: int, what: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """(rows that stay, rows that are taken), both sorted; `amount` is a fraction below 1 or a
    count. `what` names in a message what takes them; "" is data.validation.

    Stratified: each class gives its share, to within one example, and a class of one example stays
    whole. Where `labels` is None (a streamed TFDS split, whose labels would take reading every
    image) the rows are random. Raises UserError if nothing would be left to train on.
    """
    count = round(amount * total) if amount < 1 else int(amount)
    if not 0 < count < total:
        raise UserError(
            f"{what or f'data.validation={amount:g}'} takes {count} of {total} training images; "
            "at least one must be taken, and one must stay"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(total)
    if labels is not None:
        # The k-th of a class's n examples stands at (k + 1/2) / n: the lowest `count` take from all
        # classes alike.
        mine = labels[shuffled]
        order = np.argsort(mine, kind="stable")
        _, starts, sizes = np.unique(mine[order], return_index=True, return_counts=True)
        place = np.empty(total)
        rank = np.arange(total) - np.repeat(starts, sizes)
        place[order] = (rank + 0.5) / np.repeat(sizes, sizes)
        shuffled = shuffled[np.argsort(place, kind="stable")]
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


# ---- what a split must hold


def check_source(source: ImageSource, where: str, num_classes: int) -> None:
    """Raises UserError if a split has no example, images without a pixel, or a label outside 0 to
    num_classes - 1. Labels that have to be read first are checked as they are read."""
    if not len(source):
        raise UserError(f"{where}: expected an example or more, got none")
    if isinstance(source, ArraySource) and not source.images.size:
        shape = "x".join(map(str, source.images.shape[1:3]))
        raise UserError(f"{where}: expected images of a pixel or more, got {shape}")
    if source.labels is not None:
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
        if len(wrong):
            i = int(wrong[0])
            raise WrongLabel(source.location(i), int(source.labels[i]), num_classes)


def decoding_error(role: str, source: ImageSource) -> UserError:
    """The error for a split without an image that can be decoded; reads the first for the
    reason."""
    try:
        read_example(source, 0, 8, 3)
        why = ""
    except DamagedImage as error:
        why = f"; the first, {error.location}: {error.why}"
    return UserError(f"none of the {len(source)} {role} images can be decoded{why}")


def check_decodes(role: str, source: ImageSource, skip_damaged: bool) -> None:
    """Decodes NUM_PROBED_IMAGES images of a streamed split, evenly spread. With `skip_damaged`,
    tries the others until one can be decoded.

    Raises DamagedImage for a damaged image; with `skip_damaged`, UserError if all are damaged.
    """
    total = len(source)
    tried = np.unique(np.linspace(0, total - 1, min(NUM_PROBED_IMAGES, total)).astype(int))
    if any([_decodes(source, i, skip_damaged) for i in tried]):
        return
    if not any(_decodes(source, i, skip_damaged) for i in range(total)):
        raise decoding_error(role, source)


def _decodes(source: ImageSource, i: int, skip_damaged: bool) -> bool:
    try:
        read_example(source, int(i), 8, 3)
    except DamagedImage:
        if not skip_damaged:
            raise
        return False
    return True


# ---- what is said


def find_notes(
    splits: dict[str, Split],
    class_names: Sequence[str],
    batch_size: int,
    *,
    task: str = "classes",
) -> list[str]:
    """Lines on what may be intended, but would otherwise go unnoticed. Raises UserError if all
    training images are of one class."""
    train, found = splits["train"], []
    if note := make_batch_note(batch_size, len(train)):
        found.append(note)
    if train.labels is not None:
        soft = train.labels.ndim > 1
        counts = (
            (train.labels > 0).sum(0)
            if soft
            else np.bincount(train.labels, minlength=len(class_names))
        )
        missing = [name for name, count in zip(class_names, counts) if not count]
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        said = f"{len(missing)} of {len(class_names)} classes have no training image: {shown}"
        if task == "classes" and len(missing) == len(class_names) - 1:
            raise UserError(f"{said}; expected images of two classes or more")
        if missing:
            found.append(said)
    return found


def make_batch_note(batch_size: int, images: int) -> str:
    """A line if a batch is larger than the training set, else ""."""
    if batch_size <= images:
        return ""
    return (
        f"data.batch_size={batch_size} is more than the {images} training images: a batch holds "
        f"each of them {batch_size / images:.1f} times on average"
    )


# ---- where it is kept


def fits_in_memory(config: Any, size: int) -> bool:
    """Whether so many bytes of images go to memory."""
    if config.in_memory == "auto":
        return size < config.memory_limit * 2**30
    return config.in_memory == "yes"
