"""What a file is, before it is opened."""

from __future__ import annotations

import os
import stat

from flax_cnns.errors import UserError

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike) -> None:
    """Raises `UserError` where `path` is a pipe, a socket or a device: reading it might never end.

    Folders and missing files are left to the caller.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return
    if kind in _SPECIAL:
        raise UserError(
            f"{os.fspath(path)} is {_SPECIAL[kind]}; expected a file: copy what it gives into one"
        )
