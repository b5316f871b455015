"""The files as their authors publish them, in a folder: MNIST's four IDX files and CIFAR's tar.gz.

CIFAR's are pickles, which may hold any code. A restricted unpickler reads them: it makes lists,
texts and numbers, keeps the descriptions of arrays, and refuses everything else. Reading takes no
more memory than the size of the file justifies, whatever its headers declare.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import pickletools
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_cnns.data.known_datasets import KNOWN_DATASETS
from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import RawDataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.files import check_regular_file

CIFAR_FILES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError, struct.error)
# Photographs hardly compress, digits fivefold, drawings more; a bomb a thousandfold.
_RATIO, _FLOOR = 100, 1 << 26


def exists(name: str, directory: str) -> bool:
    """Whether the archives of data set `name` lie in `directory`: all that isn't CIFAR is IDX."""
    if name in CIFAR_FILES:
        return (Path(directory).expanduser() / CIFAR_FILES[name]).exists()
    return _idx_file(directory, IDX_FILES["train"][0]) is not None


def read(name: str, directory: str, labels: str) -> RawDataset:
    """Both splits, in memory. `labels`: for cifar100 "fine" (default) or "coarse". Raises
    UserError."""
    if name in CIFAR_FILES:
        return _read_cifar(name, Path(directory).expanduser() / CIFAR_FILES[name], labels)
    if labels not in ("", "label"):
        raise UserError(f"{name} has no labels {labels!r}; leave data.labels empty")
    return _read_idx(name, directory)


# ---- IDX (http://yann.lecun.com/exdb/mnist)


def _idx_file(directory: str, stem: str) -> Path | None:
    folder = Path(directory).expanduser()
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.exists()), None)


def _read_idx(name: str, directory: str) -> RawDataset:
    sources, most = {}, {}
    known = KNOWN_DATASETS.get(name)
    for split, stems in IDX_FILES.items():
        files = [_idx_file(directory, stem) for stem in stems]
        for stem, file in zip(stems, files):
            if file is None:
                raise UserError(f"{directory!r} holds no {stem}.gz, nor {stem}")
        images, labels = (read_idx_array(file, ndim) for file, ndim in zip(files, (3, 1)))
        if len(images) != len(labels):
            raise UserError(
                f"{files[0]} holds {len(images)} images, but {files[1]} {len(labels)} labels"
            )
        sources[split] = ArraySource(images[..., None], labels.astype(np.int32), f"{name} {split}")
        most[split] = int(labels.max(initial=0))
        # A data set that is not in KNOWN_DATASETS has the classes of its train split.
        classes = known.classes if known else most["train"] + 1
        if most[split] >= classes:
            raise UserError(f"{files[1]} holds label {most[split]}; {name} has {classes} classes")
    names = known.class_names if known else tuple(str(i) for i in range(classes))
    return RawDataset(sources, len(names), names, sources["train"].images.shape[1:])


def read_idx_array(file: Path, ndim: int) -> np.ndarray:
    """The uint8 array of `ndim` dimensions in an IDX file, gzipped or not. Raises UserError."""
    check_regular_file(file)
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            zeros, kind, dims = struct.unpack(">HBB", stream.read(4))
            if zeros or kind != 8 or dims != ndim:
                raise UserError(f"{file} is no IDX file of bytes in {ndim} dimensions")
            shape = struct.unpack(f">{ndim}I", stream.read(4 * ndim))
            count = math.prod(shape)
            check_declared_size(file, count)
            data = stream.read(count + 1)  # no more, even if the gzip goes on
    except _DAMAGE as why:
        raise UserError(f"{file} is damaged: {why}; get it again") from why
    if len(data) != count:
        held = "more" if len(data) > count else len(data)
        raise UserError(f"{file} is damaged: it declares {count} bytes and holds {held}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def check_declared_size(file: Path, declared: int) -> None:
    """Raises UserError if a file declares more data than its size can hold."""
    held = file.stat().st_size
    if declared > _FLOOR + _RATIO * held:
        raise UserError(f"{file} is refused: its {held:,} bytes declare {declared:,} of data")


# ---- CIFAR (https://www.cs.toronto.edu/~kriz/cifar.html)


def _read_cifar(name: str, file: Path, labels: str) -> RawDataset:
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
        names = tuple(_texts(found[meta][names_key]))
        sources = {}
        for split, members in parts.items():
            # Rows of 3072: all red, all green, all blue.
            images = np.concatenate([_array(found[m]["data"], (np.uint8,), 2) for m in members])
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            targets = np.concatenate([_numbers(found[m][keys[labels]]) for m in members])
            if len(targets) != len(images) or not np.all((targets >= 0) & (targets < len(names))):
                raise ValueError("images, labels and class names don't agree")
            sources[split] = ArraySource(
                np.ascontiguousarray(images), targets.astype(np.int32), f"{name} {split}"
            )
    except (LookupError, ValueError, TypeError, OverflowError) as why:
        raise UserError(f"{file} is not {name}'s archive: {why!r}") from why
    return RawDataset(sources, len(names), names, (32, 32, 3))


def _unpickle_members(file: Path, wanted: set[str]) -> dict[str, dict]:
    """The wanted members of a tar.gz, by their last name."""
    found = {}
    check_regular_file(file)
    try:
        with gzip.open(file) as unpacked:
            stream = _Bounded(unpacked, file)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    name = member.name.rsplit("/", 1)[-1]
                    if not member.isfile() or name not in wanted:
                        continue
                    # A sparse member may declare any size, and hold nothing.
                    if member.issparse() or name in found:
                        why = "is sparse" if member.issparse() else "is there twice"
                        raise UserError(f"{file} is not CIFAR's archive: its {name} {why}")
                    check_declared_size(file, member.size)
                    found[name] = _unpickle(tar.extractfile(member).read(), f"{file}: {name}")
            while stream.read(2**20):  # to the end, where gzip's checksum is
                pass
    except FileNotFoundError as why:
        raise UserError(f"there is no {file}; data.dir names the folder that holds it") from why
    except _DAMAGE as why:
        raise UserError(f"{file} is damaged: {why}; get it again") from why
    return found


class _Bounded:
    """The unpacked stream of `file`; raises UserError if it is too long for the file's size."""

    def __init__(self, stream: gzip.GzipFile, file: Path):
        self.stream, self.file, self.given = stream, file, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.given += len(data)
        check_declared_size(self.file, self.given)
        return data


class _Described:
    """The description of an object in a pickle, its arguments and state. The object is never
    made."""

    def __init__(self, *args: Any):
        self.args, self.state = args, ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class _Array(_Described): ...


class _Dtype(_Described): ...


class _Encoded(_Described): ...  # bytes, as Python 3 writes them for Python 2: a text in latin1


def _array(value: Any, kinds: Sequence[type], ndim: int) -> np.ndarray:
    """The array that `value` describes. Raises ValueError if it describes none, or one of other
    kinds or dimensions, or if its bytes do not fill it."""
    if not isinstance(value, _Array):
        raise ValueError(f"expected an array, got a {type(value).__name__}")
    _, shape, dtype, fortran, data = value.state
    if not isinstance(dtype, _Dtype) or not re.fullmatch("[iu][1248]", dtype.args[0]):
        raise ValueError("expected an array of whole numbers")
    kind = np.dtype(dtype.args[0]).newbyteorder(">" if ">" in dtype.state[1:2] else "<")
    if kind.type not in kinds or len(shape) != ndim:
        raise ValueError(f"expected {ndim} dimensions of {kinds[0].__name__}, got {kind} {shape}")
    data = data.args[0] if isinstance(data, _Encoded) else data
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")


def _numbers(value: Any) -> np.ndarray:
    """i64 [N]"""
    if isinstance(value, _Array):
        return _array(value, (np.int64, np.int32, np.uint8), 1).astype(np.int64)
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"expected a list of whole numbers, got a {type(value).__name__}")
    return np.array(value, np.int64)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"expected a list of texts, got a {type(value).__name__}")
    return value


class _PlainOnly(pickle.Unpickler):
    """Makes no object that a pickle asks for, and keeps its description."""

    ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Encoded,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def _unpickle(data: bytes, where: str) -> dict:
    try:
        for op, argument, at in pickletools.genops(data):
            # An unpickler makes room for as many entries as the highest number that it meets.
            if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument) > at:
                raise pickle.UnpicklingError("it has an absurd number of entries")
        value = _PlainOnly(io.BytesIO(data), encoding="latin1").load()
    except MemoryError:
        raise
    except Exception as why:  # a broken pickle raises whatever its bytes happen to say
        raise UserError(
            f"{where} is refused: {why}; CIFAR's own files hold arrays, lists and text only"
        ) from why
    if not isinstance(value, dict):
        raise UserError(f"{where} is no CIFAR file: a {type(value).__name__}, not a dict")
    return value
