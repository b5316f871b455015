"""A file of NumPy arrays, FILE.npz, as Keras and MedMNIST name them."""

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

# The keys of images and labels by split, of which a file has either all of Keras's or MedMNIST's.
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
    """The file: in `directory` where it is given. Raises UserError."""
    path = Path(directory).expanduser() / Path(name).expanduser()
    if not path.exists():
        folder = path.parent
        near = [other.name for other in folder.glob("*.npz")] if folder.is_dir() else []
        raise UserError(f"there is no file {str(path)!r}{did_you_mean(path.name, near)}")
    check_regular_file(path)
    return path


def read(name: str, directory: str) -> Dataset:
    """The data set of FILE.npz, as `Dataset.from_arrays` makes it. Raises UserError."""
    path = find_file(name, directory)
    try:
        with zipfile.ZipFile(path) as file:
            found = {member.removesuffix(".npy"): member for member in file.namelist()}
            keys = _find_keys(path, set(found))
            wanted = [key for pair in keys.values() for key in pair]
            wanted += [CLASS_NAMES_KEY] if CLASS_NAMES_KEY in found else []
            arrays = {key: _array(path, file, found[key], key) for key in wanted}
    except UserError:
        raise
    except zipfile.BadZipFile as why:
        raise UserError(f"{path} is not a file that np.savez writes, or is damaged: {why}") from why
    except _DAMAGE as why:
        raise UserError(f"{path} is damaged: {why or type(why).__name__}; get it again") from why
    class_names = arrays.pop(CLASS_NAMES_KEY, None)
    labels = [arrays[pair[1]] for pair in keys.values()]
    task = "multilabel" if any(map(_has_several, labels)) else "classes"
    dataset = Dataset.from_arrays(
        **{split: (arrays[a], arrays[b]) for split, (a, b) in keys.items()},
        class_names=None if class_names is None else class_names.reshape(-1).tolist(),
        task=task,
        name=name,
    )
    notes = list(dataset.notes)
    if task == "multilabel":
        notes.append(f"{path.name} has several labels an image: the task is multilabel")
    if unread := sorted(set(found) - set(wanted)):
        notes.append(f"{path.name} has arrays that are not read: {', '.join(unread[:8])}")
    return dataclasses.replace(dataset, notes=tuple(notes))


def _find_keys(path: Path, found: set[str]) -> dict[str, tuple[str, str]]:
    """The keys of images and labels of each split that the file has. Raises UserError."""
    for names in KEYS.values():
        if not found & set(names["train"]):
            continue
        keys = {split: pair for split, pair in names.items() if found & set(pair)}
        for image, label in keys.values():
            if missing := {image, label} - found:
                raise UserError(f"{path} has no {missing.pop()}; it has: {_listed(found)}")
        return keys
    expected = " or ".join(", ".join(names["train"] + names["test"]) for names in KEYS.values())
    raise UserError(f"{path}: expected arrays called {expected}; it has: {_listed(found)}")


def _listed(found: set[str]) -> str:
    return ", ".join(sorted(found)[:12]) or "none"


def _array(path: Path, file: zipfile.ZipFile, member: str, key: str) -> np.ndarray:
    """One array; nothing is unpickled, and no more memory taken than the file's size justifies."""
    info = file.getinfo(member)
    check_declared_size(path, info.file_size)
    with file.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{key} is of the format {version}")
        shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise UserError(
            f"{path}: {key} is a pickled array of objects, which may hold any code and is not"
            " read; save numbers, or names as np.array(names, str)"
        )
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{key} declares {list(shape)} of {dtype} in {info.file_size} bytes")
    with file.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _has_several(labels: Any) -> bool:
    """Whether rows of 0 and 1 have another number of ones than one."""
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.dtype.kind not in "biu":
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) != 1).any())
