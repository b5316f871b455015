"""Where checkpoints may lie, and how Orbax is given a path that it would misread.

Orbax lists the files of a save with its whole path as a glob pattern, so `[`, `*` and `?` in it
find nothing, or another run's files; TensorStore makes slashes of backslashes, and takes no name
that is not UTF-8. They get such a folder as its descriptor, /proc/self/fd/N.
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

_MISREAD = re.compile("[*?\\[\\\\\udc80-\udcff]")
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes; Linux has 255 and 4,095, some are the run's own


@contextlib.contextmanager
def orbax_alias(path: Path) -> Iterator[epath.Path]:
    """The absolute `path`; if Orbax would misread it, another name of the same place, which is
    valid only inside the context. The parent of `path` must exist. Raises `UserError` if the system
    has no other name for it.
    """
    if not _MISREAD.search(os.fspath(path)):
        yield epath.Path(path)
        return
    # The last name is kept if possible: Orbax writes temporary folders next to it.
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
    """Raises `UserError` if checkpoints below `folder` could not be written or read back. `folder`
    need not exist, and nothing is written. Messages name `flag`."""
    path = Path(os.path.abspath(folder))
    for name in path.parts:
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise UserError(
                f"{flag}: the name {name[:20]}… has {len(os.fsencode(name))} bytes; file systems"
                f" take {_LONGEST_NAME} at most: choose a shorter one"
            )
        if UNFINISHED_MARK in name:
            raise UserError(
                f"{flag}: {name!r} contains the mark of Orbax's unfinished saves, which Orbax"
                f" deletes; choose a name without {UNFINISHED_MARK}"
            )
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UserError(
            f"{flag}: the path has {len(os.fsencode(path))} bytes; expected {_LONGEST_PATH} at"
            " most: choose a shorter one"
        )
    if _MISREAD.search(os.fspath(path)) and not os.path.isdir("/proc/self/fd"):
        raise UserError(_refusal(path))


def _refusal(path: Path) -> str:
    found = "".join(dict.fromkeys(_MISREAD.findall(os.fspath(path))))
    plain = _MISREAD.sub("_", os.fspath(path))
    return (
        f"{os.fspath(path)!r}: checkpoints cannot be kept below a name with {found!r} on this"
        f" system, which has no /proc/self/fd; choose another name, such as {plain}"
    )
