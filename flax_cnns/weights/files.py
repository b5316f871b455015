"""Files of other libraries' tensors as `{name: array}`; nothing that is in them is run.

What a file is shows in its first bytes, whatever it is called: safetensors; PyTorch's `.pth`, the
zip of today and the stream of before 1.6; NumPy's `.npz`; Keras's `.h5`, `.weights.h5` and
`.keras`. PyTorch's are pickles, which may hold any code: here an unpickler reads them that knows
tensors and dicts and refuses everything else. Keras's are read by HDF5's own library. A file that
was made to can still keep either busy forever, or crash it; it cannot make them run anything.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import pickletools
import re
import stat
import types
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.weights import safetensors, wrappers

Tensors = dict[str, np.ndarray]
Choose = Callable[[Any], Any]  # what a pickle holds -> the weights in it


class Contents(NamedTuple):
    """What a file holds."""

    tensors: Tensors
    notes: tuple[str, ...]  # what was chosen or renamed


def read(path: str | os.PathLike, *, averaged: bool = False) -> Tensors:
    """The tensors of a file under the names that `weights.convert` takes, in the file's order.

    Of a training checkpoint it takes those under "state_dict" or "model" (`wrappers.TRAINED`); with
    `averaged`, or if there are no others, the running averages (`wrappers.AVERAGED`). It removes
    the prefixes that wrappers put before all names ("module." and others). Arrays may be read-only
    views. Raises `UserError` for a file that is missing, damaged, of another kind, that asks for
    code, declares more than it holds, or lacks averaged weights.
    """
    return read_contents(path, averaged=averaged).tensors


def read_contents(path: str | os.PathLike, *, averaged: bool = False) -> Contents:
    """What `read` does, with notes on what was chosen or renamed."""
    path, notes = Path(path).expanduser(), []
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # opening would wait
            raise UserError(f"{path} is a pipe or a device; expected a file of weights")
        with open(path, "rb") as file:
            head = file.read(64)
        reader = _reader(path, head)
        _check_size(path, path.stat().st_size)
        if reader in (_read_zip, _read_stream):
            tensors = reader(path, partial(wrappers.choose, averaged=averaged, notes=notes))
        else:
            tensors = reader(path)
        if averaged and not notes:
            wrappers.choose({}, averaged=True, notes=notes)
    except UserError as error:
        said = str(error)
        raise error if str(path) in said else UserError(f"{path}: {said}") from None
    except MemoryError:
        raise UserError(
            f"reading {path}, of {path.stat().st_size:,} bytes, takes more memory than there is"
        ) from None
    except safetensors.UnsupportedError as error:
        raise UserError(f"{path}: {error}, which is not supported; convert it to float32") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {str(path)!r}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected a file of weights") from None
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # of a broken file, whatever its bytes happen to say
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged: {said[:200]}; get it again") from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return Contents(wrappers.unwrap(tensors, notes), tuple(notes))


def _reader(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK\x03\x04"):
        return _read_zip
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_hdf5
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # pickle's protocols
        return _read_stream
    if head[8:9] == b"{":  # behind the length of a header in JSON
        return safetensors.read
    what = "is empty" if not head else "is no file of weights"
    if head.lstrip()[:1] == b"<":
        what = "is a web page, not a file of weights"
    elif head.startswith(b"version https://git-lfs"):
        what = "is Git LFS's pointer to a file of weights: git lfs pull gets the file itself"
    raise UserError(
        f"{path} {what}; expected .safetensors, PyTorch's .pth, .npz or Keras's .h5 or .keras"
    )


def _check_size(path: Path, declared: int) -> None:
    """Weights are all but random: they do not compress twentyfold, nor are they full of holes."""
    found = path.stat()
    blocks = 512 * getattr(found, "st_blocks", 0)  # what a sparse file really takes, where known
    size = min(found.st_size, blocks) if blocks else found.st_size
    if declared > (1 << 26) + 20 * size:
        raise UserError(f"{path} is refused: its {size:,} bytes declare {declared:,} of arrays")


def _package(name: str, path: Path) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"reading {path} takes {name}: pip install -e '.[weights]'") from None


# ---- zip: PyTorch's, NumPy's, Keras's


def _read_zip(path: Path, choose: Choose) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info.file_size for info in archive.infolist()}
        _check_size(path, sum(members.values()))
        if "model.weights.h5" in members:
            return _read_hdf5(path, _member(archive, "model.weights.h5"))
        if pickles := [name for name in members if re.fullmatch(r"[^/]*/data\.pkl", name)]:
            return _read_torch_zip(path, archive, pickles[0].removesuffix("data.pkl"), choose)
        if members and all(name.endswith(".npy") for name in members):
            return {n.removesuffix(".npy"): _read_npy(path, _member(archive, n)) for n in members}
    raise UserError(
        f"{path} is a zip file of {', '.join(sorted(members)[:3]) or 'nothing'}; expected PyTorch's"
        " .pth, NumPy's .npz or Keras's .keras"
    )


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a member. Raises ValueError if they are not as many as the directory says.

    `archive.read` unpacks first and counts later: a wrong directory would fill the memory.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name[:60]} is compressed by method {info.compress_type}")
    with archive.open(info) as member:
        data = member.read(info.file_size)
        if len(data) != info.file_size or member.read(1):
            raise ValueError(f"{name[:60]} does not hold the {info.file_size:,} bytes declared")
    return data


def _read_npy(path: Path, data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        header = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise UserError(f"{path} is refused: it holds Python objects, and code is never run")
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"{dtype}{list(shape)} is not of {len(data) - stream.tell()} bytes")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")


# ---- PyTorch

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
_BYTES = "UntypedStorage"  # the storage of tensors that name their own dtype
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
    """A row of numbers that tensors are views of."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *strides))
    known = isinstance(storage, _Storage) and len(shape) == len(strides) <= 64  # NumPy's limit
    if not known or not whole:
        raise ValueError("a tensor without a sensible shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _typed_tensor(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, *others: Any
) -> _Tensor:
    """Of a storage of bytes; `others` are requires_grad, hooks, the dtype, metadata."""
    dtype = others[2]
    if not isinstance(storage, _Storage) or dtype not in _DTYPES:
        raise ValueError("a tensor of an unknown dtype")
    dtype = np.dtype(_DTYPES[dtype])
    storage = storage._replace(dtype=dtype, size=storage.size // dtype.itemsize)
    return _tensor(storage, offset, shape, strides)


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


class _Dict(collections.OrderedDict):
    """Takes no attributes: a small pickle may give many attributes to many objects."""

    def __setstate__(self, state: Any) -> None:
        del state


class _TensorsOnly(pickle.Unpickler):
    """Of PyTorch's pickles: knows tensors and dicts, and refuses all else."""

    ALLOWED = {  # noqa: RUF012
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor"): _tensor,  # of before 0.4
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): tuple,
        # Beside the weights in the checkpoints of torchvision's own training script; unused.
        ("argparse", "Namespace"): _Dict,
        ("collections", "Counter"): _Dict,
        ("torch.storage", _BYTES): _BYTES,
        **{("torch", name): name for name in (*_STORAGES, *_DTYPES)},
    }

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.storages: dict[str, _Storage] = {}
        self.given: dict[tuple[str, str], Any] = {}
        self.room = len(data)  # entries that calls may copy: an honest pickle spells out each

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise _CodeError(f"{module}.{name}")
        found = self.ALLOWED[module, name]
        if name == "Namespace" or isinstance(found, str):  # used as it is, and not called
            return found
        if (module, name) not in self.given:  # wrapped: a pickle may set attributes on it
            self.given[module, name] = lambda *arguments: self._call(found, arguments)
        return self.given[module, name]

    def _call(self, make: Any, arguments: tuple) -> Any:
        if not isinstance(make, types.FunctionType):
            self.room -= sum(map(len, arguments))
            if self.room < 0:
                raise ValueError("a pickle that copies what it holds over and over")
        return make(*arguments)

    def persistent_load(self, reference: Any) -> _Storage:
        kind, name, key, _, size, *view = reference
        # None of it is printed: a few bytes may be lists of lists of lists, which fill all memory
        # as a text.
        if kind != "storage" or name not in (*_STORAGES, _BYTES) or any(view):
            raise ValueError("an unknown kind of storage")
        if type(key) is not str or type(size) is not int:
            raise ValueError("a storage without a sensible size")
        storage = _Storage(key, np.dtype(_STORAGES.get(name, np.uint8)), size)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two storages called {key!r}")
        return storage


class _CodeError(Exception):
    """A pickle asks for something that is neither a tensor nor a dict."""


def _unpickle(stream: io.BytesIO, path: Path) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of a stream, and the storages that it speaks of, by their keys."""
    begin, puts = stream.tell(), 0
    for op, argument, _ in pickletools.genops(stream):
        # An unpickler makes room for as many entries as the highest number that it meets; a
        # pickler counts them.
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            puts += 1
            if int(argument) > 1000 + 2 * puts:
                raise ValueError("a pickle with an absurd number of entries")
    unpickler = _TensorsOnly(stream.getbuffer()[begin : stream.tell()])
    try:
        return unpickler.load(), unpickler.storages
    except _CodeError as asked:
        raise UserError(
            f"{path} is refused: it asks for {asked}, and code is never run; save the weights"
            " alone, with torch.save(model.state_dict(), path)"
        ) from None


def _read_torch_zip(path: Path, archive: zipfile.ZipFile, folder: str, choose: Choose) -> Tensors:
    tree, _ = _unpickle(io.BytesIO(_member(archive, f"{folder}data.pkl")), path)
    tensors = _state_dict(choose(tree), path)
    order = b"little"
    if f"{folder}byteorder" in archive.namelist():
        order = _member(archive, f"{folder}byteorder")
    keys = {tensor.storage.key for tensor in tensors.values()}
    data = {key: _member(archive, f"{folder}data/{key}") for key in keys}
    return _views(tensors, data, order.decode())


def _read_stream(path: Path, choose: Choose) -> Tensors:
    """torch.save's of before 1.6: five pickles, then the storages in the order of the fifth."""
    stream = io.BytesIO(path.read_bytes())
    if any(_unpickle(stream, path)[0] != n for n in (0x1950A86A20F9469CFC6C, 1001)):
        raise UserError(f"{path} is a pickle, but none of PyTorch's")
    system, _ = _unpickle(stream, path)
    tree, storages = _unpickle(stream, path)
    tensors = _state_dict(choose(tree), path)
    order = "little" if system["little_endian"] else "big"
    data = {}
    for key in map(str, _unpickle(stream, path)[0]):
        length = int.from_bytes(stream.read(8), order) * storages[key].dtype.itemsize
        data[key] = stream.getbuffer()[stream.tell() : stream.tell() + length]
        stream.seek(length, io.SEEK_CUR)
    return _views(tensors, data, order)


def _state_dict(tree: Any, path: Path) -> dict[str, _Tensor]:
    if not isinstance(tree, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in tree.items()
    ):
        held = f"a {type(tree).__name__.lstrip('_')}"
        if isinstance(tree, Mapping):
            held = ", ".join([n[:60] for n in tree if isinstance(n, str)][:5]) or "no names"
        raise UserError(
            f"{path} holds {held}; expected tensors by name, or such under 'state_dict' or 'model'"
        )
    return dict(tree)


def _views(tensors: Mapping[str, _Tensor], data: Mapping[str, Any], order: str) -> Tensors:
    """The tensors as views of their storages' bytes."""
    found = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        dtype, size = storage.dtype, storage.size
        if len(data[storage.key]) != size * dtype.itemsize:
            raise ValueError(f"{name} is not of {size} numbers: {len(data[storage.key])} bytes")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if math.prod(shape) > size or (math.prod(shape) and last >= size):
            raise ValueError(f"{name} declares {list(shape)}, and {size} numbers are there")
        if order == "big" and dtype.itemsize > 1:
            dtype = dtype.newbyteorder(">")
        numbers = np.frombuffer(data[storage.key], dtype)[offset:]
        steps = [stride * dtype.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)
        found[name] = view
    return found


# ---- Keras's HDF5

# The leaves of a layer in the order in which .weights.h5 numbers them.
_DENSE, _NORM = ("kernel", "bias"), ("gamma", "beta", "moving_mean", "moving_variance")
_LEAVES = {
    "conv2d": _DENSE,
    "depthwise_conv2d": _DENSE,
    "dense": _DENSE,
    "separable_conv2d": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "batch_normalization": _NORM,
    "layer_normalization": _NORM,
    "layer_scale": ("variable",),
    "normalization": ("mean", "variance", "count"),
}
# Keras 1's: the files that its successors still load.
_KERAS1 = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",  # which it is
    "depthwise_kernel": "depthwise_kernel",
    "pointwise_kernel": "pointwise_kernel",
}
_KERAS1_KINDS = {
    "convolution2d": "conv2d",
    "separableconvolution2d": "separable_conv2d",
    "batchnormalization": "batch_normalization",
}


def _read_hdf5(path: Path, content: bytes | None = None) -> Tensors:
    h5py = _package("h5py", path)
    with h5py.File(path if content is None else io.BytesIO(content), "r") as file:
        sets: dict[str, Any] = {}  # hard links only: others may lead into other files
        file.visititems(lambda name, item: sets.update({name: item}))
        arrays = {name: item for name, item in sets.items() if isinstance(item, h5py.Dataset)}
        if other := [name for name, item in arrays.items() if item.external or item.is_virtual]:
            raise UserError(f"{path} is refused: {other[0]} lies in another file")
        _check_size(path, sum(item.size * item.dtype.itemsize for item in arrays.values()))
        names = _numbered(arrays, sets) or _legacy(arrays, sets, file)
        return {ours: arrays[theirs][()] for ours, theirs in names.items()}


def _numbered(arrays: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, str]:
    """Of Keras 3's .weights.h5, which numbers the leaves of layers that it names after their
    class: `layers/conv2d_1/vars/0`. The layer's own name is an attribute."""
    names = {}
    for place in arrays:
        if not (found := re.fullmatch(r"(.*/)?layers/((\w+?)(?:_\d+)?)/vars/(\d+)", place)):
            continue
        layer, kind, number = found[2], found[3], int(found[4])
        vars_ = groups[place.rpartition("/")[0]]
        leaves = _LEAVES.get(kind, ())
        if kind == "batch_normalization" and len(vars_) == 3:  # without a scale, as Inception's
            leaves = leaves[1:]
        leaf = leaves[number] if number < len(leaves) else str(number)
        names[f"{vars_.attrs.get('name', layer)}/{leaf}"] = place
    return names


def _legacy(arrays: Mapping[str, Any], groups: Mapping[str, Any], file: Any) -> dict[str, str]:
    """Of .h5 as Keras 1 and 2 wrote it: a group for each layer, with the names of its weights."""
    prefix = "model_weights/" if "model_weights" in groups else ""
    group = groups["model_weights"] if prefix else file
    names = {}
    for layer in _texts(group.attrs, "layer_names"):
        for weight in _texts(groups[f"{prefix}{layer}"].attrs, "weight_names"):
            names[_keras_name(layer, weight)] = f"{prefix}{layer}/{weight}"
    return names


def _texts(attributes: Mapping[str, Any], name: str) -> list[str]:
    """Of an attribute, or of its parts `name0`, `name1` ..., where it is long."""
    parts = [name] if name in attributes else []
    while f"{name}{len(parts)}" in attributes:
        parts.append(f"{name}{len(parts)}")
    texts = [text for part in parts for text in attributes[part]]
    return [t.decode() if isinstance(t, bytes) else str(t) for t in texts]


def _keras_name(layer: str, weight: str) -> str:
    """`conv1_conv/kernel`, as Keras 3 says, whichever version's names."""
    weight = weight.removesuffix(":0")
    if weight.startswith(f"{layer}/") and weight.count("/") == layer.count("/") + 1:
        module, leaf = layer, weight.rpartition("/")[2]
    elif "/" in weight:  # a network inside the network
        *_, module, leaf = weight.split("/")
    else:
        found = re.fullmatch(rf"(?:.*_)?({'|'.join(_KERAS1)})(?:_\d+)?", weight)
        kind, _, number = layer.rpartition("_")
        module = f"{_KERAS1_KINDS[kind]}_{number}" if kind in _KERAS1_KINDS else layer
        leaf = _KERAS1[found[1]] if found else weight.lower()
    return f"{module.replace('/BatchNorm', '_bn').replace('/', '_')}/{leaf}"
