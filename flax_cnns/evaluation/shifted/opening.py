"""Test sets that are shifted from a network's training data, by their official layouts.

    opened = open_set("imagenet_a", "/data/imagenet-a", NetworkClasses(...))
    for cell in opened.cells:
        split = cell.open((224, 224, 3))  # images with labels

`rows.SETS` has a row for each set. Files are found and classes are matched when a set is opened, so
that a wrong folder is noticed at once. Images are read when they are needed.
"""

from __future__ import annotations

import os
import pathlib

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation.shifted import arrays, folders
from flax_cnns.evaluation.shifted.opened import NetworkClasses, OpenedSet, list_folders
from flax_cnns.evaluation.shifted.rows import SETS

_OPENERS = {
    "imagenet_real": folders.open_real,
    "imagenet_c": folders.open_imagenet_c,
    "cifar10_1": arrays.open_cifar_1,
    "cifar10_1_v4": arrays.open_cifar_1,
    "cifar10_c": arrays.open_cifar_c,
    "cifar100_c": arrays.open_cifar_c,
}


def open_set(name: str, folder: str | os.PathLike, classes: NetworkClasses) -> OpenedSet:
    """Finds the images of a set in its folder, and matches its classes with the network's.

    Raises UserError if the set is unknown, if the folder is not as the set is published, and if
    the network does not have the set's classes.
    """
    folder = check_folder(name, folder)
    return _OPENERS.get(name, folders.open_class_folders)(name, folder, classes)


def check_folder(name: str, folder: str | os.PathLike) -> str:
    """Returns the path of the set's folder, without a network. Raises UserError if the set is
    unknown or the folder does not exist."""
    if name not in SETS:
        raise UserError(f"--set: there is no set {name!r}{did_you_mean(name, SETS)}")
    path = pathlib.Path(folder).expanduser()
    if not path.is_dir():
        near = did_you_mean(path.name, list_folders(path.parent))
        url = f" ({SETS[name].title}: {SETS[name].url})" if SETS[name].url else ""
        raise UserError(f"--set-dir={folder} is not a folder{url}{near}")
    return str(path)
