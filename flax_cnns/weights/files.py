"""Files of other libraries' tensors as `{name: array}`; nothing that is in them is run.

What a file is shows in its first bytes, whatever it is called: safetensors; PyTorch's `.pth`, the
zip of today and the stream of before 1.6; NumPy's `.npz`; Keras's `.h5`, `.weights.h5` and
`.keras`. PyTorch's are pickles, which may hold any code: here an unpickler reads them that knows
tensors and dicts and refuses everything else. Keras's are read by HDF5's own library. A file that
was made to can still keep either busy forever, or crash it; it cannot make them run anything.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.weights import safetensors, wrappers
from flax_cnns.weights.common import Choose, Tensors, check_size, read_member
from flax_cnns.weights.hdf5 import read_hdf5
from flax_cnns.weights.pickles import read_stream, read_torch_zip


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
        check_size(path, path.stat().st_size)
        if reader in (_read_zip, read_stream):
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
        return read_hdf5
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # pickle's protocols
        return read_stream
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


# ---- zip: PyTorch's, NumPy's, Keras's


def _read_zip(path: Path, choose: Choose) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info.file_size for info in archive.infolist()}
        check_size(path, sum(members.values()))
        if "model.weights.h5" in members:
            return read_hdf5(path, read_member(archive, "model.weights.h5"))
        if pickles := [name for name in members if re.fullmatch(r"[^/]*/data\.pkl", name)]:
            return read_torch_zip(path, archive, pickles[0].removesuffix("data.pkl"), choose)
        if members and all(name.endswith(".npy") for name in members):
            return {
                n.removesuffix(".npy"): _read_npy(path, read_member(archive, n)) for n in members
            }
    raise UserError(
        f"{path} is a zip file of {', '.join(sorted(members)[:3]) or 'nothing'}; expected PyTorch's"
        " .pth, NumPy's .npz or Keras's .keras"
    )


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
