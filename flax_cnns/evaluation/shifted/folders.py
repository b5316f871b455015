"""Shifted sets of image files: folders of classes, ReaL, ImageNet-C."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from flax_cnns.data.readers.folder import SPLIT_NAMES, FileSource, find_class_files
from flax_cnns.data.types import Split
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation.shifted.opened import (
    NetworkClasses,
    OpenedSet,
    SetCell,
    describe_missing,
    list_folders,
)
from flax_cnns.evaluation.shifted.rows import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    GROUPS,
    SETS,
    SEVERITIES,
)

_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"0|[1-9]\d{0,2}")
_REAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def open_class_folders(name: str, folder: str, classes: NetworkClasses) -> OpenedSet:
    """Opens a set with one folder of images per class: folder, imagenet_v2, imagenet_sketch,
    imagenet_a, imagenet_r."""
    if name == "folder":
        _check_not_splits(folder)
    elif not _has_classes(name, folder):
        raise UserError(describe_missing(name, folder, partial(_has_classes, name)))
    files, left_out = find_class_files(folder)
    if name == "imagenet_v2":
        _check_numbers(list(files), folder)
        # In the order of the numbers: 10 comes after 9.
        files = dict(sorted(files.items(), key=lambda item: int(item[0])))
        wnids = [classes.wnids[int(each)] for each in files]
        labels = classes.match(wnids, f"--set-dir={folder}")
    else:
        labels = classes.match(list(files), f"--set-dir={folder}")
    source = _list_files(files, labels, name, folder)
    return OpenedSet(
        name,
        SETS[name],
        folder,
        (SetCell(lambda _: Split(source.labels, source=source)),),
        np.unique(labels),
        len(source),
        left_out=left_out,
    )


def _has_classes(name: str, folder: str) -> bool:
    """Whether a folder in `folder` is named as the set's classes are."""
    pattern = _NUMBER if name == "imagenet_v2" else _WNID
    return any(pattern.fullmatch(each) for each in list_folders(folder))


def _check_not_splits(folder: str) -> None:
    splits = [each for each in list_folders(folder) if each.lower() in SPLIT_NAMES]
    if splits:
        raise UserError(
            f"--set-dir={folder} holds splits, not classes: {', '.join(splits)}; did you mean"
            f" --set-dir={os.path.join(folder, splits[0])}?"
        )


def _check_numbers(names: Sequence[str], folder: str) -> None:
    """Raises UserError for a folder that is not named by the number of one of ImageNet's
    classes."""
    if strange := [each for each in names if not _NUMBER.fullmatch(each)]:
        raise UserError(
            f"--set-dir={folder}: expected {SETS['imagenet_v2'].expected}; found also"
            f" {', '.join(strange[:3])}"
        )


def _list_files(
    files: Mapping[str, Sequence[str]], labels: np.ndarray, name: str, folder: str
) -> FileSource:
    paths = tuple(path for images in files.values() for path in images)
    repeated = np.repeat(labels, [len(images) for images in files.values()])
    return FileSource(paths, repeated.astype(np.int32), name, folder)


# ---- ReaL


def open_real(name: str, folder: str, classes: NetworkClasses) -> OpenedSet:
    """Opens ReaL. The list in real.json is in the order of the validation images' names. Images
    without a label are left out."""
    path = os.path.join(folder, "real.json")
    if not os.path.isfile(path):
        has_list = lambda inner: os.path.isfile(os.path.join(inner, "real.json"))  # noqa: E731
        raise UserError(describe_missing(name, folder, has_list))
    listed = _read_answers(path)
    images = _find_validation_images(folder)
    missing = sorted(set(range(1, len(listed) + 1)) - set(images))
    if missing or len(images) != len(listed):
        first = f"; ILSVRC2012_val_{missing[0]:08d}.JPEG is missing" if missing else ""
        raise UserError(
            f"--set-dir={folder}: real.json has labels of {len(listed):,} images, but the folder"
            f" has {len(images):,} images ILSVRC2012_val_*.JPEG{first}"
        )
    place = classes.match(classes.wnids, f"--set-dir={folder}")
    kept = [number for number in sorted(images) if listed[number - 1]]
    if not kept:
        raise UserError(f"{path}: no image has a label")
    answers = tuple(frozenset(place[listed[number - 1]].tolist()) for number in kept)
    source = FileSource(
        tuple(images[number] for number in kept), np.arange(len(kept), dtype=np.int32), name, folder
    )
    skipped = len(listed) - len(kept)
    return OpenedSet(
        name,
        SETS[name],
        folder,
        (SetCell(lambda _: Split(source.labels, source=source)),),
        np.array(sorted({k for right in answers for k in right}), np.int64),
        len(listed),
        answers,
        {"images without a label in real.json": skipped} if skipped else {},
    )


def _read_answers(path: str) -> list[list[int]]:
    try:
        with open(path, encoding="utf-8") as file:
            listed = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(listed, list) or not all(
        isinstance(row, list) and all(isinstance(k, int) and 0 <= k < 1000 for k in row)
        for row in listed
    ):
        raise UserError(f"{path}: expected one list of classes, 0 to 999, for each image")
    return listed


def _find_validation_images(folder: str) -> dict[int, str]:
    """Returns {number of a validation image: its path}."""
    images: dict[int, str] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for file_name in sorted(names):
            if not (match := _REAL_FILE.fullmatch(file_name)):
                continue
            number, image = int(match[1]), os.path.join(parent, file_name)
            if number in images:
                raise UserError(f"{images[number]} and {image} are the same image; remove one")
            images[number] = image
    return images


# ---- ImageNet-C


def open_imagenet_c(name: str, folder: str, classes: NetworkClasses) -> OpenedSet:
    """Opens ImageNet-C: CORRUPTION/SEVERITY/WNID, also inside noise, blur, weather, digital and
    extra. The images of a cell are listed when it is opened."""
    found = _find_corruptions(folder)
    if not found:
        raise UserError(
            describe_missing(name, folder, lambda inner: bool(_find_corruptions(inner)))
        )
    cells, names = [], set()
    for corruption in order_corruptions(found, folder):
        for severity in SEVERITIES:
            path = os.path.join(found[corruption], str(severity))
            inner = [each for each in list_folders(path) if _WNID.fullmatch(each)]
            if not inner:
                raise UserError(f"{path}: expected {SETS[name].expected}; found no such folder")
            names |= set(inner)
            open_cell = partial(_open_severity, name, path, classes)
            cells.append(SetCell(open_cell, corruption, severity))
    labels = classes.match(sorted(names), f"--set-dir={folder}")
    return OpenedSet(name, SETS[name], folder, tuple(cells), np.unique(labels))


def _find_corruptions(folder: str) -> dict[str, str]:
    """Returns {corruption: its folder}: each folder that has a folder 1."""
    paths = [os.path.join(folder, each) for each in list_folders(folder)]
    paths += [
        os.path.join(path, each)
        for path in paths
        if os.path.basename(path) in GROUPS
        for each in list_folders(path)
    ]
    return {os.path.basename(path): path for path in paths if "1" in list_folders(path)}


def _open_severity(
    name: str, path: str, classes: NetworkClasses, image_shape: tuple[int, int, int]
) -> Split:
    files, _ = find_class_files(path)
    source = _list_files(files, classes.match(list(files), path), name, path)
    return Split(source.labels, source=source)


def order_corruptions(names: Mapping[str, object] | set[str], folder: str) -> list[str]:
    """Returns the corruptions in the paper's order. Raises UserError for an unknown one."""
    known = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    for each in sorted(names):
        if each not in known:
            raise UserError(
                f"--set-dir={folder}: {each!r} is no corruption{did_you_mean(each, known)}"
            )
    return [each for each in known if each in names]
