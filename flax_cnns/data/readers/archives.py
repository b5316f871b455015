"""Archives as their authors publish them: MNIST's four IDX files and CIFAR's tar.gz.

CIFAR's archives hold pickles, which may run any code. A restricted unpickler reads them: it makes
only lists, strings and numbers, keeps the descriptions of arrays, and refuses everything else. The
memory for reading is bounded by the size of the file, whatever its headers declare.
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
from typing import IO, Any, cast

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
# A file of n bytes may declare _FREE_BYTES + _MAX_RATIO * n bytes of data. Photos hardly compress,
# digits compress to a fifth, drawings further; a zip bomb compresses to a thousandth.
_MAX_RATIO, _FREE_BYTES = 100, 1 << 26


def exists(name: str, directory: str) -> bool:
    """Returns whether `directory` holds the archives of data set `name`. For names other than
    CIFAR's, these are IDX files."""
    if name in CIFAR_FILES:
        return (Path(directory).expanduser() / CIFAR_FILES[name]).exists()
    return _find_idx_file(directory, IDX_FILES["train"][0]) is not None


def read(name: str, directory: str, labels: str) -> RawDataset:
    """Reads both splits into memory. For cifar100, `labels` is "fine" (default) or "coarse". Raises
    UserError if a file is missing, damaged or does not fit."""
    if name in CIFAR_FILES:
        return _read_cifar(name, Path(directory).expanduser() / CIFAR_FILES[name], labels)
    if labels not in ("", "label"):
        raise UserError(f"{name} has no labels {labels!r}; leave data.labels empty")
    return _read_idx(name, directory)


# ---- IDX (http://yann.lecun.com/exdb/mnist)


def _find_idx_file(directory: str, stem: str) -> Path | None:
    folder = Path(directory).expanduser()
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.exists()), None)


def _read_idx(name: str, directory: str) -> RawDataset:
    sources, largest = {}, {}
    known = KNOWN_DATASETS.get(name)
    for split, stems in IDX_FILES.items():
        files = []
        for stem in stems:
            file = _find_idx_file(directory, stem)
            if file is None:
                raise UserError(f"{directory!r} holds neither {stem}.gz nor {stem}")
            files.append(file)
        images, labels = (read_idx_array(file, ndim) for file, ndim in zip(files, (3, 1)))
        if len(images) != len(labels):
            raise UserError(
                f"{files[0]} holds {len(images)} images, but {files[1]} {len(labels)} labels"
            )
        sources[split] = ArraySource(images[..., None], labels.astype(np.int32), f"{name} {split}")
        largest[split] = int(labels.max(initial=0))
        # Unknown data sets have the classes of their train split.
        classes = known.classes if known else largest["train"] + 1
        if largest[split] >= classes:
            raise UserError(
                f"{files[1]} holds label {largest[split]}, but {name} has {classes} classes"
            )
    names = known.class_names if known else tuple(str(i) for i in range(classes))
    height, width, channels = sources["train"].images.shape[1:]
    return RawDataset(sources, len(names), names, (height, width, channels))


def read_idx_array(file: Path, ndim: int) -> np.ndarray:
    """Reads the uint8 array of an IDX file, gzipped or not. Raises UserError if the file is damaged
    or the array does not have `ndim` dimensions."""
    check_regular_file(file)
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            zeros, kind, dims = struct.unpack(">HBB", stream.read(4))
            if zeros or kind != 8 or dims != ndim:
                raise UserError(f"{file} is not an IDX file of bytes in {ndim} dimensions")
            shape = struct.unpack(f">{ndim}I", stream.read(4 * ndim))
            count = math.prod(shape)
            check_declared_size(file, count)
            data = stream.read(count + 1)  # one byte more, to notice data after the end
    except _DAMAGE as error:
        raise UserError(f"{file} is damaged: {error}; download it again") from error
    if len(data) != count:
        actual = "more" if len(data) > count else len(data)
        raise UserError(f"{file} is damaged: it declares {count} bytes, but holds {actual}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def check_declared_size(file: Path, declared: int) -> None:
    """Raises UserError if a file declares more data than a file of its size can hold."""
    size = file.stat().st_size
    if declared > _FREE_BYTES + _MAX_RATIO * size:
        raise UserError(
            f"{file} is not read: it has {size:,} bytes, but declares {declared:,} bytes of data"
        )


# ---- CIFAR (https://www.cs.toronto.edu/~kriz/cifar.html)


def _read_cifar(name: str, file: Path, labels: str) -> RawDataset:
    if name == "cifar10":
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
    contents = _unpickle_members(file, wanted)
    if missing := sorted(wanted - set(contents)):
        raise UserError(f"{file} is not {name}'s archive: it lacks {', '.join(missing)}")
    try:
        names = tuple(_strings(contents[meta][names_key]))
        sources = {}
        for split, members in parts.items():
            # Rows of 3072: red, then green, then blue.
            images = np.concatenate([_array(contents[m]["data"], (np.uint8,), 2) for m in members])
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            targets = np.concatenate([_integers(contents[m][keys[labels]]) for m in members])
            if len(targets) != len(images) or not np.all((targets >= 0) & (targets < len(names))):
                raise ValueError("images, labels and class names do not agree")
            sources[split] = ArraySource(
                np.ascontiguousarray(images), targets.astype(np.int32), f"{name} {split}"
            )
    except (LookupError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{file} is not {name}'s archive: {error!r}") from error
    return RawDataset(sources, len(names), names, (32, 32, 3))


def _unpickle_members(file: Path, wanted: set[str]) -> dict[str, dict]:
    """Returns the contents of the wanted members of a tar.gz, by file name without folder."""
    contents: dict[str, dict] = {}
    check_regular_file(file)
    try:
        with gzip.open(file) as unpacked:
            stream = _BoundedStream(unpacked, file)
            # tarfile calls only `read`.
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
                for member in tar:
                    name = member.name.rsplit("/", 1)[-1]
                    if not member.isfile() or name not in wanted:
                        continue
                    # A sparse member may declare any size without holding data.
                    if member.issparse() or name in contents:
                        problem = "is sparse" if member.issparse() else "occurs twice"
                        raise UserError(f"{file} is not CIFAR's archive: its {name} {problem}")
                    check_declared_size(file, member.size)
                    data = tar.extractfile(member)
                    assert data is not None  # a regular file
                    contents[name] = _unpickle(data.read(), f"{file}: {name}")
            while stream.read(2**20):  # to the end, which has gzip's checksum
                pass
    except FileNotFoundError as error:
        raise UserError(f"there is no {file}; set data.dir to the folder that holds it") from error
    except _DAMAGE as error:
        raise UserError(f"{file} is damaged: {error}; download it again") from error
    return contents


class _BoundedStream:
    """The unpacked stream of `file`. Reading raises UserError if the stream is too long for the
    file's size."""

    def __init__(self, stream: gzip.GzipFile, file: Path):
        self.stream, self.file, self.bytes_read = stream, file, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.bytes_read += len(data)
        check_declared_size(self.file, self.bytes_read)
        return data


class _Description:
    """The description of an object in a pickle: its arguments and state. The object itself is never
    made."""

    def __init__(self, *args: Any):
        self.args, self.state = args, cast(tuple, ())

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class _Array(_Description): ...


class _Dtype(_Description): ...


class _Encoded(_Description): ...  # bytes that Python 3 wrote for Python 2: a latin1 string


def _array(value: Any, kinds: Sequence[type], ndim: int) -> np.ndarray:
    """Returns the array that `value` describes. Raises ValueError if `value` is not an array of
    these `kinds` and dimensions, or if its bytes do not fill the shape."""
    if not isinstance(value, _Array):
        raise ValueError(f"expected an array, got a {type(value).__name__}")
    _, shape, dtype, fortran, data = value.state
    if not isinstance(dtype, _Dtype) or not re.fullmatch("[iu][1248]", dtype.args[0]):
        raise ValueError("expected an array of integers")
    kind = np.dtype(dtype.args[0]).newbyteorder(">" if ">" in dtype.state[1:2] else "<")
    if kind.type not in kinds or len(shape) != ndim:
        raise ValueError(f"expected {ndim} dimensions of {kinds[0].__name__}, got {kind} {shape}")
    data = data.args[0] if isinstance(data, _Encoded) else data
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")


def _integers(value: Any) -> np.ndarray:
    """Returns i64 [N] from an array or a list."""
    if isinstance(value, _Array):
        return _array(value, (np.int64, np.int32, np.uint8), 1).astype(np.int64)
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"expected a list of integers, got a {type(value).__name__}")
    return np.array(value, np.int64)


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"expected a list of strings, got a {type(value).__name__}")
    return value


class _RestrictedUnpickler(pickle.Unpickler):
    """Keeps the description of each object in a pickle, and never makes the object."""

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
            # An unpickler allocates as many memo entries as the highest index in the pickle.
            if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > (at or 0):
                raise pickle.UnpicklingError("it has an absurd number of entries")
        value = _RestrictedUnpickler(io.BytesIO(data), encoding="latin1").load()
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle may raise any error
        raise UserError(
            f"{where} is not read: {error}; CIFAR's own files hold only arrays, lists and strings"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a CIFAR file: expected a dict, got {type(value).__name__}")
    return value
