"""Measures images and labels: normalization, classes, duplicates, and what labels say of images."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from flax_cnns.data.pipeline import train_batches
from flax_cnns.studies.search.sanity.bench import HostBatch, SanityBench

SIDE = 16  # images are averaged down to about this side for the nearest neighbor
PERMUTATIONS = 999
BATCHES = 20  # whose classes are counted


def measure_inputs(bench: SanityBench, train: HostBatch, validation: HostBatch | None) -> dict:
    """Returns the numbers of the check `inputs`, ready for JSON.

    `train` and `validation` are examples of the two splits, not augmented.
    """
    dataset = bench.dataset
    images = bench.normalize(train["image"])
    numbers: dict[str, Any] = {
        "data": dataset.name,
        "images": len(images),
        "validation_images": 0 if validation is None else len(validation["label"]),
        "classes": dataset.num_classes,
        "task": dataset.task,
        "mock": bench.config.data.mock > 0,
        "normalize": bool(bench.config.data.augment.normalize and dataset.normalize),
        "normalized_by": dataset.normalized_by,
        "grafted": bool(bench.config.graft.source),
        "finite": bool(np.isfinite(images).all()),
        "mean": images.mean((0, 1, 2), dtype=np.float64).tolist(),
        "std": images.std((0, 1, 2), dtype=np.float64).tolist(),
        "pixel_range": [float(train["image"].min()), float(train["image"].max())],
    }
    numbers["counts"] = count_labels(dataset, train)
    numbers["order"] = measure_order(bench)
    numbers |= count_duplicates(dataset, train, validation)
    if not numbers["finite"]:
        return numbers
    return numbers | measure_information(
        shrink(images),
        train["label"],
        None if validation is None else shrink(bench.normalize(validation["image"])),
        None if validation is None else validation["label"],
        dataset.task,
    )


def count_labels(dataset: Any, train: HostBatch) -> list[float]:
    """Returns the number of training examples of each class, from all labels if they are known."""
    labels = dataset.splits["train"].labels
    labels = train["label"] if labels is None else np.asarray(labels)
    if labels.ndim == 2:
        return labels.sum(0, dtype=np.float64).tolist()
    return np.bincount(labels, minlength=dataset.num_classes).astype(float).tolist()


def measure_order(bench: SanityBench) -> dict[str, float]:
    """Returns how mixed the classes of the training batches are: the mean number of classes in a
    batch, and the mean number if examples were drawn at random (the hypergeometric mean)."""
    dataset, config = bench.dataset, bench.config.data
    if dataset.task != "classes":
        return {}
    if not dataset.in_memory and dataset.splits["train"].labels is not None:
        return {}  # the package's own loader shuffles, and decoding takes long
    stream: Any = train_batches(dataset, config, seed=bench.config.seed)
    try:
        batches = [np.asarray(b["label"]) for b in itertools.islice(stream, BATCHES)]
    finally:
        stream.close()
    batches = [b.argmax(1) if b.ndim == 2 else b for b in batches]
    size, labels = len(batches[0]), np.concatenate(batches)
    shares = np.bincount(labels) / len(labels)
    return {
        "batch_size": size,
        "classes": float(np.mean([len(np.unique(batch)) for batch in batches])),
        "expected": float((1 - (1 - shares) ** size).sum()),
    }


def count_duplicates(dataset: Any, train: HostBatch, validation: HostBatch | None) -> dict:
    """Returns how many validation images are training images too, and how many training images
    have a copy with another label. In-memory splits are compared whole."""

    def read(role: str, sample: HostBatch | None) -> tuple[list[bytes], list[bytes]]:
        split = dataset.splits.get(role)
        if split is None or sample is None:
            return [], []
        whole = split.images is not None and split.labels is not None
        images: Any = split.images if whole else sample["image"]
        labels = np.asarray(split.labels if whole else sample["label"])
        rows = (np.ascontiguousarray(images[i]).tobytes() for i in range(len(images)))
        hashes = [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
        return hashes, [label.tobytes() for label in labels]

    of_train, labels = read("train", train)
    of_validation, _ = read("validation", validation)
    found: dict[bytes, set[bytes]] = {}
    for key, label in zip(of_train, labels):
        found.setdefault(key, set()).add(label)
    return {
        "compared": [len(of_train), len(of_validation)],
        "in_both": sum(key in found for key in of_validation),
        "contradicting": sum(len(found[key]) > 1 for key in of_train),
    }


def shrink(images: np.ndarray) -> np.ndarray:
    """Averages images [N H W C] down to sides of at most about `SIDE`: f32 [N D]."""
    n, height, width, channels = images.shape
    down, across = max(height // SIDE, 1), max(width // SIDE, 1)
    h, w = height // down, width // across
    cut = images[:, : h * down, : w * across].reshape(n, h, down, w, across, channels)
    return cut.mean((2, 4)).reshape(n, -1)


def measure_information(
    train: np.ndarray,
    train_labels: np.ndarray,
    validation: np.ndarray | None,
    validation_labels: np.ndarray | None,
    task: str,
) -> dict[str, Any]:
    """Returns how well the nearest training image tells an image's label.

    "train" leaves each image out of its own neighbors; "validation" is absent without that split.
    Each has the share of right labels, the mean share if the labels were shuffled (`chance`), and
    p, the share of `PERMUTATIONS` shuffles that do at least as well (counting the given order).
    "renumbered" is the share of right validation labels after the best renumbering of classes.
    """

    def as_classes(labels: np.ndarray) -> np.ndarray:
        return labels.argmax(1) if labels.ndim == 2 and task == "classes" else labels

    known = as_classes(train_labels)
    found: dict[str, Any] = {}
    nearest = known[find_nearest_rows(train, train, own=True)]
    found["train_neighbors"] = compare_labels(nearest, known)
    if validation is not None and validation_labels is not None:
        true = as_classes(validation_labels)
        guessed = known[find_nearest_rows(validation, train)]
        found["validation_neighbors"] = compare_labels(guessed, true)
        if task == "classes":
            classes = int(max(guessed.max(), true.max())) + 1
            table = np.zeros((classes, classes))
            np.add.at(table, (guessed, true), 1)
            rows, columns = linear_sum_assignment(-table)
            found["renumbered"] = float(table[rows, columns].sum() / len(true))
    return found


def find_nearest_rows(points: np.ndarray, others: np.ndarray, *, own: bool = False) -> np.ndarray:
    """Returns the index of the nearest row of `others` [M D] for each row of `points` [N D].

    `own`: the two are the same rows, and a row is not its own neighbor.
    """
    center = others.mean(0)
    a, b = (np.asarray(x - center, np.float32) for x in (points, others))
    distances = (b**2).sum(1)[None] - 2 * a @ b.T
    if own:
        np.fill_diagonal(distances, np.inf)
    return distances.argmin(1)


def compare_labels(guessed: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Returns the share of equal labels, that of shuffled labels, and the permutation test's p."""
    rng = np.random.default_rng(0)
    right = float((guessed == true).mean())
    shuffled = np.array(
        [(guessed == true[rng.permutation(len(true))]).mean() for _ in range(PERMUTATIONS)]
    )
    p = (1 + (shuffled >= right).sum()) / (1 + PERMUTATIONS)
    return {
        "right": right,
        "chance": float(shuffled.mean()),
        "p": float(p),
        "images": len(true),
    }
