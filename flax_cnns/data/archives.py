"""The files as their authors publish them, in a folder: MNIST's four IDX files and CIFAR's tar.gz.

CIFAR's are pickles, which may hold any code. They are read by an unpickler that knows NumPy arrays
and refuses everything else.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct

from flax_cnns.data.datasets import KNOWN, Raw
from flax_cnns.data.images import ArraySource
from flax_cnns.errors import UserError, did_you_mean

CIFAR = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError, struct.error)


def find(name: str, directory: str) -> bool:
    """Whether the archives of data set `name` lie in `directory`: all that isn't CIFAR is IDX."""
    if name in CIFAR:
        return (Path(directory).expanduser() / CIFAR[name]).exists()
    return _idx_file(directory, IDX["train"][0]) is not None


def read(name: str, directory: str, labels: str) -> Raw:
    """Both splits, in memory. `labels`: for cifar100 "fine" (default) or "coarse". Raises
    UserError."""
    if name in CIFAR:
        return _read_cifar(name, Path(directory).expanduser() / CIFAR[name], labels)
    if labels not in ("", "label"):
        raise UserError(f"{name} has no labels {labels!r}; leave data.labels empty")
    return _read_idx(name, directory)


# ---- IDX (http://yann.lecun.com/exdb/mnist)


def _idx_file(directory: str, stem: str) -> Path | None:
    folder = Path(directory).expanduser()
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.exists()), None)


def _read_idx(name: str, directory: str) -> Raw:
    sources, most = {}, 0
    for split, stems in IDX.items():
        files = [_idx_file(directory, stem) for stem in stems]
        for stem, file in zip(stems, files):
            if file is None:
                raise UserError(f"{directory!r} holds no {stem}.gz, nor {stem}")
        images, labels = (idx_array(file, ndim) for file, ndim in zip(files, (3, 1)))
        if len(images) != len(labels):
            raise UserError(
                f"{files[0]} holds {len(images)} images, but {files[1]} {len(labels)} labels"
            )
        sources[split] = ArraySource(images[..., None], labels.astype(np.int32), f"{name} {split}")
        most = max(most, int(labels.max(initial=0)))
    known = KNOWN.get(name)
    if known and most >= known.classes:
        raise UserError(f"{files[1]} holds label {most}; {name} has {known.classes} classes")
    names = known.class_names if known else tuple(str(i) for i in range(most + 1))
    return Raw(sources, len(names), names, sources["train"].images.shape[1:])


def idx_array(file: Path, ndim: int) -> np.ndarray:
    """The uint8 array of `ndim` dimensions in an IDX file, gzipped or not. Raises UserError."""
    try:
        data = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
        zeros, kind, dims = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{ndim}I", data, 4) if dims == ndim else ()
    except _DAMAGE as why:
        raise UserError(f"{file} is damaged: {why}; get it again") from why
    if zeros or kind != 8 or dims != ndim:
        raise UserError(f"{file} is no IDX file of bytes in {ndim} dimensions")
    start = 4 + 4 * ndim
    if len(data) - start != math.prod(shape):
        raise UserError(
            f"{file} is damaged: it declares {math.prod(shape)} bytes and holds {len(data) - start}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# ---- CIFAR (https://www.cs.toronto.edu/~kriz/cifar.html)


def _read_cifar(name: str, file: Path, labels: str) -> Raw:
    ten = name == "cifar10"
    if ten:
        keys = {"": "labels", "label": "labels"}
        parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        meta, names_key = "batches.meta", "label_names"
    else:
        keys = {"": "fine_labels", "fine": "fine_labels", "coarse": "coarse_labels"}
        parts = {"train": ["train"], "test": ["test"]}
        meta, names_key = "meta", "coarse_label_names" if labels == "coarse" else "fine_label_names"
    if labels not in keys:
        raise UserError(
            f"{name} has no labels {labels!r}{did_you_mean(labels, filter(None, keys))}"
        )
    wanted = {meta, *parts["train"], *parts["test"]}
    found = _unpickle_members(file, wanted)
    if missing := sorted(wanted - set(found)):
        raise UserError(f"{file} is not {name}'s archive: it lacks {', '.join(missing)}")
    try:
        names = tuple(str(text) for text in found[meta][names_key])
        sources = {}
        for split, members in parts.items():
            images = np.concatenate([found[m]["data"] for m in members]).astype(np.uint8)
            # Rows of 3072: all red, all green, all blue.
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            targets = np.concatenate([found[m][keys[labels]] for m in members]).astype(np.int32)
            if len(targets) != len(images) or not np.all((targets >= 0) & (targets < len(names))):
                raise ValueError("images, labels and class names don't agree")
            sources[split] = ArraySource(np.ascontiguousarray(images), targets, f"{name} {split}")
    except (KeyError, ValueError, TypeError) as why:
        raise UserError(f"{file} is not {name}'s archive: {why!r}") from why
    return Raw(sources, len(names), names, (32, 32, 3))


def _unpickle_members(file: Path, wanted: set[str]) -> dict[str, dict]:
    """The wanted members of a tar.gz, by their last name."""
    found = {}
    try:
        with tarfile.open(file, "r:gz") as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in wanted:
                    found[name] = _unpickle(tar.extractfile(member).read(), f"{file}: {name}")
            while tar.fileobj.read(2**20):  # to the end, where gzip's checksum is
                pass
    except FileNotFoundError as why:
        raise UserError(f"there is no {file}; data.dir names the folder that holds it") from why
    except _DAMAGE as why:
        raise UserError(f"{file} is damaged: {why}; get it again") from why
    return found


def _encode(text: str, encoding: str) -> bytes:
    """What Python 2's byte strings become in later pickles; no codec but this one."""
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def _unpickle(data: bytes, where: str) -> dict:
    try:
        value = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as why:  # a broken pickle raises whatever its bytes happen to say
        raise UserError(
            f"{where} is refused: {why}; CIFAR's own files hold arrays, lists and text only"
        ) from why
    if not isinstance(value, dict):
        raise UserError(f"{where} is no CIFAR file: a {type(value).__name__}, not a dict")
    return value
