"""What the readers of weight files share."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_cnns.errors import UserError

Tensors = dict[str, np.ndarray]
Choose = Callable[[Any], Any]  # what a pickle holds -> the weights in it


def check_size(path: Path, declared: int) -> None:
    """Weights are all but random: they do not compress twentyfold, nor are they full of holes."""
    found = path.stat()
    blocks = 512 * getattr(found, "st_blocks", 0)  # what a sparse file really takes, where known
    size = min(found.st_size, blocks) if blocks else found.st_size
    if declared > (1 << 26) + 20 * size:
        raise UserError(f"{path} is refused: its {size:,} bytes declare {declared:,} of arrays")


def import_package(name: str, path: Path) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"reading {path} takes {name}: pip install {name}") from None


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
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
