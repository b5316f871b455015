"""Reads weight files of other libraries as `{name: array}`, without running code in them.

The first bytes of a file, not its name, decide its format: safetensors; PyTorch's `.pth`, as a zip
or as the stream that versions before 1.6 wrote; NumPy's `.npz`; Keras's `.h5`, `.weights.h5` and
`.keras`. PyTorch's files are pickles, which may hold any code. The unpickler here knows tensors and
dicts and refuses everything else. Keras's files are read by the HDF5 library. A malicious file can
still keep the unpickler or the HDF5 library busy forever, or crash it, but cannot make it run code.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.weights import safetensors, wrappers
from flax_cnns.weights.common import ChooseWeights, Tensors, check_size, read_member
from flax_cnns.weights.hdf5 import read_hdf5
from flax_cnns.weights.pickles import read_stream, read_torch_zip


class Contents(NamedTuple):
    """The tensors of a file, and notes on how they were found."""

    tensors: Tensors
    notes: tuple[str, ...]  # what was chosen or renamed


def read(path: str | os.PathLike, *, averaged: bool = False) -> Tensors:
    """Returns the tensors of a file in its order, under the names that `weights.convert` takes.

    From a training checkpoint these are the tensors under "state_dict" or "model"
    (`wrappers.TRAINED_KEYS`). With `averaged`, or if there are no others, they are the running
    averages (`wrappers.AVERAGED_KEYS`). Arrays may be read-only views.

    Raises `UserError` for a file that is missing, damaged or of another format, that needs code to
    run, declares more than it holds, or lacks the averaged weights asked for.
    """
    return read_contents(path, averaged=averaged).tensors


def read_contents(path: str | os.PathLike, *, averaged: bool = False) -> Contents:
    """Like `read`, with notes on what was chosen."""
    path = Path(path).expanduser()
    notes: list[str] = []
    try:
        # Opening a pipe could wait forever.
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise UserError(f"{path} is a pipe or a device; expected a weight file")
        with open(path, "rb") as file:
            head = file.read(64)
        reader = _reader(path, head)
        check_size(path, path.stat().st_size)
        if reader in (_read_zip, read_stream):
            tensors = reader(path, partial(wrappers.choose_weights, averaged=averaged, notes=notes))
        else:
            tensors = reader(path)
        if averaged and not notes:
            wrappers.choose_weights({}, averaged=True, notes=notes)
    except UserError as error:
        message = str(error)
        raise error if str(path) in message else UserError(f"{path}: {message}") from None
    except MemoryError:
        raise UserError(
            f"reading {path}, of {path.stat().st_size:,} bytes, needs more memory than there is"
        ) from None
    except safetensors.UnsupportedError as error:
        raise UserError(f"{path}: {error}, which is not supported; convert it to float32") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {str(path)!r}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected a weight file") from None
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a broken file can raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged: {reason[:200]}; download it again") from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return Contents(wrappers.remove_prefixes(tensors, notes), tuple(notes))


def _reader(path: Path, head: bytes) -> Callable[..., Tensors]:
    """The function that reads a file which begins with `head`. Raises UserError if none does."""
    if head.startswith(b"PK\x03\x04"):
        return _read_zip
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_hdf5
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # pickle protocols
        return read_stream
    if head[8:9] == b"{":  # after the length of a JSON header
        return safetensors.read
    what = "is empty" if not head else "is not a weight file"
    if head.lstrip()[:1] == b"<":
        what = "is a web page, not a weight file"
    elif head.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not a weight file; git lfs pull gets the file itself"
    raise UserError(
        f"{path} {what}; expected .safetensors, PyTorch's .pth, NumPy's .npz, or Keras's .h5 or"
        " .keras"
    )


# ---- zip files of PyTorch, NumPy and Keras


def _read_zip(path: Path, choose: ChooseWeights) -> Tensors:
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
        f"{path} is a zip file with {', '.join(sorted(members)[:3]) or 'nothing'} in it; expected"
        " PyTorch's .pth, NumPy's .npz or Keras's .keras"
    )


def _read_npy(path: Path, data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        header = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise UserError(f"{path} is refused: it holds Python objects, which could run code")
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(
            f"{dtype}{list(shape)} does not fit {len(data) - stream.tell():,} bytes of data"
        )
    array = np.frombuffer(data, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")
