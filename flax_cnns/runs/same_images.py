"""Checks that several runs classify the same images into the same classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.runs.classifier import check_split


class SplitFacts(NamedTuple):
    """What must agree, without the images."""

    name: str  # of the run, for messages
    split: str
    dataset: str
    task: str
    classes: tuple[str, ...]  # of the data set; a head may have more
    logits: int
    images: int  # of the split
    labels: np.ndarray | None  # None: not known without reading every image
    fingerprint: dict  # of the data set's own splits


def describe_split(name: str, dataset: Dataset, split: str, logits: int) -> SplitFacts:
    """Returns the facts of a split. Raises UserError if there is none of this name."""
    check_split(dataset, split)
    examples = dataset.splits[split]
    return SplitFacts(
        name,
        split,
        dataset.name,
        dataset.task,
        tuple(dataset.class_names),
        logits,
        len(examples),
        None if examples.labels is None else np.asarray(examples.labels),
        dataset.fingerprint.get("splits", {}),
    )


def check_same_images(first: SplitFacts, other: SplitFacts) -> None:
    """Raises UserError, which names what differs, unless both splits have the same images and
    classes in the same order.

    Images are compared by what the fingerprints of the data hold: for files names and sizes, for
    arrays the pixels, and for all the numbers of images of each class, in order.
    """
    one, two, split = first.name, other.name, first.split
    if first.task != other.task:
        raise UserError(f"{two} has {other.task} data, {one} has {first.task} data")
    for number, (ours, theirs) in enumerate(zip(first.classes, other.classes)):
        if ours != theirs:
            raise UserError(
                f"{two} has the class {theirs!r} where {one} has {ours!r} (class {number}); they"
                " must have the same classes in the same order"
            )
    if (len(first.classes), first.logits) != (len(other.classes), other.logits):
        raise UserError(
            f"{two} has {len(other.classes)} classes and {other.logits} logits, {one} has"
            f" {len(first.classes)} classes and {first.logits} logits"
        )
    if first.images != other.images:
        raise UserError(
            f"the {split} split has {other.images:,} images for {two} and {first.images:,} for"
            f" {one}; {_explain(first, other)}"
        )
    differs = [
        name
        for name in ([split] if split in first.fingerprint else sorted(first.fingerprint))
        if name in other.fingerprint and first.fingerprint[name] != other.fingerprint[name]
    ]
    if differs:
        raise UserError(
            f"{two} has other images than {one}: the fingerprints of {differs[0]} differ;"
            f" {_explain(first, other)}"
        )
    labels = [facts.labels for facts in (first, other) if facts.labels is not None]
    if len(labels) == 2 and not np.array_equal(labels[0], labels[1]):
        raise UserError(
            f"{two} has other images than {one} in the {split} split: their labels differ;"
            f" {_explain(first, other)}"
        )


def _explain(first: SplitFacts, other: SplitFacts) -> str:
    if first.dataset != other.dataset:
        return f"their data sets are {other.dataset} and {first.dataset}"
    return (
        "give runs with the same data.name, data.dir, data.classes, data.fraction, data.validation"
        " and data.split_seed"
    )
