"""Helpers of the readers of weight files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_cnns.errors import UserError

Tensors = dict[str, np.ndarray]
ChooseWeights = Callable[[Any], Any]  # content of a pickle -> the weights in it


def check_size(path: Path, declared: int) -> None:
    """Raises `UserError` if a file declares far more bytes of arrays than it can hold.

    Weights are nearly random numbers: no compression makes them 20 times smaller, and their files
    are not sparse.
    """
    info = path.stat()
    blocks = 512 * getattr(info, "st_blocks", 0)  # bytes on disk, also of a sparse file; 0: unknown
    size = min(info.st_size, blocks) if blocks else info.st_size
    if declared > (1 << 26) + 20 * size:
        raise UserError(
            f"{path} is refused: it declares {declared:,} bytes of arrays but has only {size:,}"
        )


def import_package(name: str, path: Path) -> Any:
    """The package that reading `path` needs. Raises `UserError` if it is not installed."""
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"reading {path} needs {name}: pip install {name}") from None


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a member. Raises ValueError if the zip's directory declares another number.

    `archive.read` unpacks a whole member before it counts the bytes: a member that is larger than
    declared could fill the memory.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name[:60]} has the unknown compression method {info.compress_type}")
    with archive.open(info) as member:
        data = member.read(info.file_size)
        if len(data) != info.file_size or member.read(1):
            raise ValueError(f"{name[:60]} does not hold the declared {info.file_size:,} bytes")
    return data
