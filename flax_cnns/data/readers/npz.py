"""A file of NumPy arrays, FILE.npz, with the array names of Keras or MedMNIST."""

from __future__ import annotations

import dataclasses
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flax_cnns.data.readers.archives import check_declared_size
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.files import check_regular_file

# The names of images and labels by split. A file uses the names of Keras or those of MedMNIST.
KEYS = {
    "keras": {
        "train": ("x_train", "y_train"),
        "test": ("x_test", "y_test"),
        "validation": ("x_val", "y_val"),
    },
    "medmnist": {
        "train": ("train_images", "train_labels"),
        "test": ("test_images", "test_labels"),
        "validation": ("val_images", "val_labels"),
    },
}
CLASS_NAMES_KEY = "class_names"
_DAMAGE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError)


def find_file(name: str, directory: str) -> Path:
    """Returns the path of `name` in `directory`. Raises UserError if there is no such file."""
    path = Path(directory).expanduser() / Path(name).expanduser()
    if not path.exists():
        folder = path.parent
        near = [other.name for other in folder.glob("*.npz")] if folder.is_dir() else []
        raise UserError(f"there is no file {str(path)!r}{did_you_mean(path.name, near)}")
    check_regular_file(path)
    return path


def read(name: str, directory: str) -> Dataset:
    """Reads FILE.npz and makes a data set by `Dataset.from_arrays`. Raises UserError if the file is
    missing or damaged, or if its arrays do not fit."""
    path = find_file(name, directory)
    try:
        with zipfile.ZipFile(path) as file:
            members = {member.removesuffix(".npy"): member for member in file.namelist()}
            keys = _find_keys(path, set(members))
            wanted = [key for pair in keys.values() for key in pair]
            wanted += [CLASS_NAMES_KEY] if CLASS_NAMES_KEY in members else []
            arrays = {key: _read_array(path, file, members[key], key) for key in wanted}
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a file written by np.savez, or is damaged: {error}"
        ) from error
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} is damaged: {reason}; get another copy") from error
    class_names = arrays.pop(CLASS_NAMES_KEY, None)
    labels = [arrays[pair[1]] for pair in keys.values()]
    task = "multilabel" if any(map(_has_multiple_labels, labels)) else "classes"
    splits: dict[str, Any] = {split: (arrays[a], arrays[b]) for split, (a, b) in keys.items()}
    dataset = Dataset.from_arrays(
        **splits,
        class_names=None if class_names is None else class_names.reshape(-1).tolist(),
        task=task,
        name=name,
    )
    notes = list(dataset.notes)
    if task == "multilabel":
        notes.append(f"{path.name} has several labels per image: the task is multilabel")
    if unread := sorted(set(members) - set(wanted)):
        notes.append(f"{path.name} has arrays that are not read: {', '.join(unread[:8])}")
    return dataclasses.replace(dataset, notes=tuple(notes))


def _find_keys(path: Path, names: set[str]) -> dict[str, tuple[str, str]]:
    """Returns the names of images and labels of each split in the file, given the `names` of all
    its arrays. Raises UserError if one array of a pair is missing, or both of train."""
    for convention in KEYS.values():
        if not names & set(convention["train"]):
            continue
        keys = {split: pair for split, pair in convention.items() if names & set(pair)}
        for image, label in keys.values():
            if missing := {image, label} - names:
                raise UserError(f"{path} has no {missing.pop()}; it has: {_list_names(names)}")
        return keys
    expected = " or ".join(", ".join(keys["train"] + keys["test"]) for keys in KEYS.values())
    raise UserError(f"{path}: expected arrays called {expected}; it has: {_list_names(names)}")


def _list_names(names: set[str]) -> str:
    return ", ".join(sorted(names)[:12]) or "none"


def _read_array(path: Path, file: zipfile.ZipFile, member: str, key: str) -> np.ndarray:
    """Reads one array without unpickling. The memory is bounded by the size of the file."""
    info = file.getinfo(member)
    check_declared_size(path, info.file_size)
    with file.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{key} has the unknown format {version}")
        shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise UserError(
            f"{path}: {key} is a pickled array of objects, which is not read because a pickle may"
            " run any code; save numbers, or names as np.array(names, str)"
        )
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{key} declares {list(shape)} of {dtype} in {info.file_size} bytes")
    with file.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _has_multiple_labels(labels: np.ndarray) -> bool:
    """Returns whether labels are rows of 0 and 1, and some row does not have exactly one 1."""
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.dtype.kind not in "biu":
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) != 1).any())
