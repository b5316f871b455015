"""Checks where checkpoints may lie, and gives Orbax a path that it reads correctly.

Orbax lists the files of a save with the whole path as a glob pattern: with `[`, `*` or `?` in the
path it finds nothing, or the files of another run. TensorStore turns backslashes into slashes, and
refuses names that are not UTF-8. A folder with such a path is passed to both as its descriptor,
/proc/self/fd/N.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from flax_cnns.checkpoint.finding import UNFINISHED_MARK
from flax_cnns.errors import UserError
from flax_cnns.files import check_local

_MISREAD = re.compile("[*?\\[\\\\\udc80-\udcff]")
_LONGEST_NAME = 255  # bytes, the limit of Linux
_LONGEST_PATH = 4000  # bytes; Linux allows 4,095, and a run adds names below the folder


@contextlib.contextmanager
def orbax_alias(path: Path) -> Iterator[epath.Path]:
    """Yields the absolute `path`, or another name for it if Orbax would misread `path`.

    The other name is valid only inside the context. The parent of `path` must exist. Raises
    `UserError` if the system has no other name for `path`.
    """
    if not _MISREAD.search(os.fspath(path)):
        yield epath.Path(path)
        return
    # The last name is kept if possible, because Orbax writes temporary folders next to it.
    kept = path.name if not _MISREAD.search(path.name) else ""
    folder = os.open(path.parent if kept else path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        alias = Path(f"/proc/self/fd/{folder}")
        if not alias.is_dir():
            raise UserError(_refusal(path))
        yield epath.Path(alias / kept)
    finally:
        os.close(folder)


def check_location(folder: str | os.PathLike, flag: str = "--workdir") -> None:
    """Raises `UserError` if checkpoints below `folder` could not be written or read back.

    `folder` need not exist, and nothing is written. Messages name `flag`.
    """
    check_local(folder, flag, writes=True)
    path = Path(os.path.abspath(folder))
    for name in path.parts:
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise UserError(
                f"{flag}: the name {name[:20]}… has {len(os.fsencode(name))} bytes; file systems"
                f" allow {_LONGEST_NAME}; choose a shorter name"
            )
        if UNFINISHED_MARK in name:
            raise UserError(
                f"{flag}: {name!r} contains {UNFINISHED_MARK}, which marks unfinished saves that"
                " Orbax deletes; choose another name"
            )
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UserError(
            f"{flag}: the path has {len(os.fsencode(path))} bytes; expected at most"
            f" {_LONGEST_PATH}; choose a shorter path"
        )
    if _MISREAD.search(os.fspath(path)) and not os.path.isdir("/proc/self/fd"):
        raise UserError(_refusal(path))


def _refusal(path: Path) -> str:
    """The message for a path that Orbax would misread and that has no other name."""
    misread = "".join(dict.fromkeys(_MISREAD.findall(os.fspath(path))))
    plain = _MISREAD.sub("_", os.fspath(path))
    return (
        f"{os.fspath(path)!r}: checkpoints cannot be kept below a name with {misread!r} on this"
        f" system, which has no /proc/self/fd; choose another name, such as {plain}"
    )
