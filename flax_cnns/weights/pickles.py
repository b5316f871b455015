"""Reads the tensors of PyTorch files without running code in them."""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.weights.common import ChooseWeights, Tensors, read_member

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
_BYTES = "UntypedStorage"  # bytes, for tensors that name their dtype themselves
_DTYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}


class _Storage(NamedTuple):
    """A flat array of numbers; tensors are views of it."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers, not bytes


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *strides))
    known = isinstance(storage, _Storage) and len(shape) == len(strides) <= 64  # NumPy's limit
    if not known or not whole:
        raise ValueError("a tensor has no valid shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _typed_tensor(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, *others: Any
) -> _Tensor:
    """A tensor in a storage of bytes; `others` are requires_grad, hooks, the dtype, metadata."""
    dtype = others[2]
    if not isinstance(storage, _Storage) or dtype not in _DTYPES:
        raise ValueError("a tensor has an unknown dtype")
    dtype = np.dtype(_DTYPES[dtype])
    storage = storage._replace(dtype=dtype, size=storage.size // dtype.itemsize)
    return _tensor(storage, offset, shape, strides)


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


class _Dict(collections.OrderedDict):
    """Ignores attributes: a small pickle can give many attributes to many objects."""

    def __setstate__(self, state: Any) -> None:
        del state


class _TensorsOnly(pickle.Unpickler):
    """Unpickler for PyTorch that knows tensors and dicts, and refuses everything else."""

    ALLOWED = {  # noqa: RUF012
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor"): _tensor,  # before PyTorch 0.4
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): tuple,
        # In checkpoints of torchvision's training script, next to the weights; not used.
        ("argparse", "Namespace"): _Dict,
        ("collections", "Counter"): _Dict,
        ("torch.storage", _BYTES): _BYTES,
        **{("torch", name): name for name in (*_STORAGES, *_DTYPES)},
    }

    def __init__(self, data: bytes | memoryview):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.storages: dict[str, _Storage] = {}
        self.given: dict[tuple[str, str], Any] = {}
        # How many entries calls may copy: a normal pickle spells each of them out.
        self.room = len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise _CodeError(f"{module}.{name}")
        allowed: Any = self.ALLOWED[module, name]
        if name == "Namespace" or isinstance(allowed, str):  # used as a value, never called
            return allowed
        if (module, name) not in self.given:  # a wrapper, since a pickle may set attributes on it
            self.given[module, name] = lambda *arguments: self._call(allowed, arguments)
        return self.given[module, name]

    def _call(self, make: Any, arguments: tuple) -> Any:
        if not isinstance(make, types.FunctionType):
            self.room -= sum(map(len, arguments))
            if self.room < 0:
                raise ValueError("the pickle copies its content over and over")
        return make(*arguments)

    def persistent_load(self, reference: Any) -> _Storage:
        kind, name, key, _, size, *view = reference
        # Errors print none of these: a few bytes can be lists of lists of lists, whose text would
        # fill the memory.
        if kind != "storage" or name not in (*_STORAGES, _BYTES) or any(view):
            raise ValueError("a storage is of an unknown kind")
        if type(key) is not str or type(size) is not int:
            raise ValueError("a storage has no valid size")
        storage = _Storage(key, np.dtype(_STORAGES.get(name, np.uint8)), size)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two storages have the name {key!r}")
        return storage


class _CodeError(Exception):
    """A pickle needs something that is neither a tensor nor a dict."""


def _unpickle(stream: io.BytesIO, path: Path) -> tuple[Any, dict[str, _Storage]]:
    """The content of the next pickle of a stream, and its storages by key."""
    begin, puts = stream.tell(), 0
    for op, argument, _ in pickletools.genops(stream):
        # An unpickler allocates as many entries as the highest index that it meets; a pickler
        # numbers the entries consecutively.
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            puts += 1
            if int(argument or 0) > 1000 + 2 * puts:
                raise ValueError("the pickle declares far too many entries")
    unpickler = _TensorsOnly(stream.getbuffer()[begin : stream.tell()])
    try:
        return unpickler.load(), unpickler.storages
    except _CodeError as needed:
        raise UserError(
            f"{path} is refused: it needs {needed}, and code in files is never run; save only the"
            " weights, with torch.save(model.state_dict(), path)"
        ) from None


def read_torch_zip(
    path: Path, archive: zipfile.ZipFile, folder: str, choose: ChooseWeights
) -> Tensors:
    """The tensors of the zip file that torch.save writes; `folder` is the prefix of its members."""
    tree, _ = _unpickle(io.BytesIO(read_member(archive, f"{folder}data.pkl")), path)
    tensors = _state_dict(choose(tree), path)
    order = b"little"
    if f"{folder}byteorder" in archive.namelist():
        order = read_member(archive, f"{folder}byteorder")
    keys = {tensor.storage.key for tensor in tensors.values()}
    data = {key: read_member(archive, f"{folder}data/{key}") for key in keys}
    return _views(tensors, data, order.decode())


def read_stream(path: Path, choose: ChooseWeights) -> Tensors:
    """The tensors of a file that torch.save wrote before PyTorch 1.6.

    The file has five pickles, then the storages in the order that the fifth pickle gives.
    """
    stream = io.BytesIO(path.read_bytes())
    if any(_unpickle(stream, path)[0] != n for n in (0x1950A86A20F9469CFC6C, 1001)):
        raise UserError(f"{path} is a pickle, but not one of PyTorch")
    system, _ = _unpickle(stream, path)
    tree, storages = _unpickle(stream, path)
    tensors = _state_dict(choose(tree), path)
    order: Literal["little", "big"] = "little" if system["little_endian"] else "big"
    data = {}
    for key in map(str, _unpickle(stream, path)[0]):
        length = int.from_bytes(stream.read(8), order) * storages[key].dtype.itemsize
        data[key] = stream.getbuffer()[stream.tell() : stream.tell() + length]
        stream.seek(length, io.SEEK_CUR)
    return _views(tensors, data, order)


def _state_dict(tree: Any, path: Path) -> dict[str, _Tensor]:
    """The tree, if it maps names to tensors; raises UserError otherwise."""
    if not isinstance(tree, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in tree.items()
    ):
        held = f"a {type(tree).__name__.lstrip('_')}"
        if isinstance(tree, Mapping):
            held = ", ".join([n[:60] for n in tree if isinstance(n, str)][:5]) or "no names"
        raise UserError(
            f"{path} holds {held}; expected tensors by name, at the top or under 'state_dict' or"
            " 'model'"
        )
    return dict(tree)


def _views(tensors: Mapping[str, _Tensor], data: Mapping[str, Any], order: str) -> Tensors:
    """The tensors as views of their storages' bytes."""
    views = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        dtype, size = storage.dtype, storage.size
        if len(data[storage.key]) != size * dtype.itemsize:
            raise ValueError(
                f"{name} has {len(data[storage.key]):,} bytes, expected {size * dtype.itemsize:,}"
            )
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
        count = math.prod(shape)
        if count > size or (count and last >= size):
            raise ValueError(f"{name} declares the shape {list(shape)} but has {size:,} numbers")
        if order == "big" and dtype.itemsize > 1:
            dtype = dtype.newbyteorder(">")
        numbers = np.frombuffer(data[storage.key], dtype)[offset:]
        steps = [stride * dtype.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)
        views[name] = view
    return views
