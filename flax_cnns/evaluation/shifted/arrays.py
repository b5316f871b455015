"""Shifted sets of arrays: CIFAR-10.1, CIFAR-10-C, CIFAR-100-C."""

from __future__ import annotations

import os
import pathlib
from functools import partial

import numpy as np

from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import Split
from flax_cnns.errors import UserError
from flax_cnns.evaluation.shifted.folders import order_corruptions
from flax_cnns.evaluation.shifted.opened import (
    NetworkClasses,
    OpenedSet,
    SetCell,
    describe_missing,
)
from flax_cnns.evaluation.shifted.rows import CIFAR10, CIFAR100, SETS, SEVERITIES


def open_cifar_1(name: str, folder: str, classes: NetworkClasses) -> OpenedSet:
    """Opens CIFAR-10.1: one file of images, one of labels."""
    version = "v4" if name.endswith("v4") else "v6"
    images_path = os.path.join(folder, f"cifar10.1_{version}_data.npy")
    labels_path = os.path.join(folder, f"cifar10.1_{version}_labels.npy")
    for path in (images_path, labels_path):
        if not os.path.isfile(path):
            has_file = partial(_has_file, os.path.basename(path))
            raise UserError(f"{describe_missing(name, folder, has_file)}; {path} is missing")
    labels = _read_labels(labels_path, name, folder, classes)
    images = _read_images(images_path, len(labels))
    open_all = partial(_open_rows, images, labels, slice(None), name)
    return OpenedSet(name, SETS[name], folder, (SetCell(open_all),), np.unique(labels), len(labels))


def open_cifar_c(name: str, folder: str, classes: NetworkClasses) -> OpenedSet:
    """Opens CIFAR-10-C or CIFAR-100-C: each file has its images at severity 1, then at 2, ... 5."""
    names = {file.stem for file in pathlib.Path(folder).glob("*.npy")}
    if "labels" not in names or len(names) == 1:
        raise UserError(describe_missing(name, folder, partial(_has_file, "labels.npy")))
    labels = _read_labels(os.path.join(folder, "labels.npy"), name, folder, classes)
    if len(labels) % len(SEVERITIES):
        raise UserError(
            f"{folder}/labels.npy: expected the labels of five severities, which is a multiple of"
            f" 5; got {len(labels):,}"
        )
    n = len(labels) // len(SEVERITIES)
    cells = []
    for corruption in order_corruptions(names - {"labels"}, folder):
        images = _read_images(os.path.join(folder, f"{corruption}.npy"), len(labels))
        for severity in SEVERITIES:
            rows = slice((severity - 1) * n, severity * n)
            title = f"{name} {corruption} {severity}"
            cells.append(
                SetCell(partial(_open_rows, images, labels, rows, title), corruption, severity)
            )
    return OpenedSet(name, SETS[name], folder, tuple(cells), np.unique(labels), n)


def _has_file(name: str, folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _open_rows(
    images: np.ndarray,
    labels: np.ndarray,
    rows: slice,
    name: str,
    image_shape: tuple[int, int, int],
) -> Split:
    """Returns some rows as a split: in memory if they have the network's shape."""
    some, some_labels = np.array(images[rows]), labels[rows]
    if some.shape[1:] == image_shape:
        return Split(some_labels, images=some)
    return Split(some_labels, source=ArraySource(some, some_labels, name))


def _read_labels(path: str, name: str, folder: str, classes: NetworkClasses) -> np.ndarray:
    """Returns the labels i32 [N] as the network's classes."""
    names = CIFAR100 if SETS[name].classes == "cifar100" else CIFAR10
    numbers = tuple(map(str, range(len(names))))
    if tuple(classes.names) == numbers:
        place = np.arange(len(names))
    else:
        place = classes.match(names, f"--set={name}")
    labels = _load(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{path}: expected labels [N] of integers, got {_describe_array(labels)}")
    if labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f"{path}: expected labels from 0 to {len(names) - 1}")
    return place[labels].astype(np.int32)


def _read_images(path: str, count: int) -> np.ndarray:
    """Returns the images u8 [count 32 32 3], which stay in the file until they are used."""
    images = _load(path)
    if images.dtype != np.uint8 or images.shape != (count, 32, 32, 3):
        expected = f"uint8 [{count} 32 32 3], as many images as labels"
        raise UserError(f"{path}: expected {expected}; got {_describe_array(images)}")
    return images


def _load(path: str) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path} as a .npy file: {error}") from None
    return found


def _describe_array(array: np.ndarray) -> str:
    return f"{array.dtype} [{' '.join(map(str, array.shape))}]"
