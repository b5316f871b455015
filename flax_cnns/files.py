"""Checks of paths and hosts before they are read, and atomic writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import stat
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from flax_cnns.errors import UserError

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular_file(path: str | os.PathLike) -> None:
    """Raises `UserError` if `path` is a pipe, a socket or a device: reading it might never end.

    Folders and missing files pass.
    """
    try:
        file_type = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return
    if file_type in _SPECIAL:
        raise UserError(
            f"{os.fspath(path)} is {_SPECIAL[file_type]}; expected a file: copy its content into"
            " a file"
        )


def check_writable(path: str | os.PathLike) -> None:
    """Raises `UserError` if no file can be written at `path`, before the work that ends there."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: the folder {path.parent} is not writable")


_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib turns gs:// into gs:/


def check_local(path: str | os.PathLike, flag: str = "", *, writes: bool = False) -> None:
    """Raises `UserError` if `path` is the address of a bucket or another URL, such as gs://b/x.

    As a path, it would name a local folder `gs:`. Messages name `flag`. `writes`: whether the
    caller writes runs there, which need more from a mount than data do (docs/accelerators.md).
    """
    text = os.fspath(path)
    if not (match := _ADDRESS.match(text)):
        return
    cure = (
        "mount it, for example with gcsfuse, mountpoint-s3 or SkyPilot, and give the mount's path"
    )
    if writes:
        cure = (
            "runs need locks, renames and appends, which buckets lack; mount a shared file system"
            " such as NFS, and give the mount's path (docs/accelerators.md)"
        )
    elif match[1].lower() in ("http", "https", "ftp"):
        cure = "download it, and give the file's path"
    raise UserError(f"{flag}{flag and ': '}{text} is an address, not a path: {cure}")


# ---- atomic writes


@contextlib.contextmanager
def replace_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path to write to. At the end of the block, its file replaces `path`.

    If the block or the replacement fails, `path` stays as it was and the error is raised. The
    temporary file is named like `path` with .tmp appended. A killed process leaves it behind.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8 atomically. Raises `UserError` if it cannot be written."""
    try:
        with replace_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a JSON file atomically, with null for NaN and infinities. Raises `UserError` if it
    cannot be written."""
    write_text(path, json.dumps(replace_nonfinite(content), indent=2, allow_nan=False) + "\n")


def replace_nonfinite(content: Any) -> Any:
    """Returns `content` with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: replace_nonfinite(value) for key, value in content.items()}
    return (
        [replace_nonfinite(value) for value in content]
        if isinstance(content, list | tuple)
        else content
    )


# ---- hosts

CONNECT_TIMEOUT = 4.0  # seconds


def find_host(url: str) -> str:
    """Returns the `host` or `host:port` to connect to for a URL; the proxy's if one is set."""
    parts = urlparse(url)
    host = parts.netloc
    if not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(parts.scheme, "")  # may start with http://
        host = proxy.rpartition("://")[2].partition("/")[0] or host
    return host.split("@")[-1]


def is_reachable(host: str, seconds: float = CONNECT_TIMEOUT) -> bool:
    """Whether `host` or `host:port` accepts a connection within `seconds`.

    The attempt runs in a thread, because resolving a name can hang for minutes.
    """
    name, _, port = host.partition(":")
    answers: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((name, int(port or 443)), timeout=seconds).close()
            answers.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)
