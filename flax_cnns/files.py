"""What kind a file is, before it is opened; files written whole or not at all; and hosts, before
they are asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
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


# ---- whole or not at all


@contextlib.contextmanager
def replace_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes its place at the end of the block. Where
    the block fails, or the file cannot be moved, `path` stays as it was and the error goes on.

    A process that is killed leaves `path` with .tmp behind its name.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes all of it or nothing, as UTF-8. Raises `UserError`."""
    try:
        with replace_atomically(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes all of it or nothing, with null for what is not finite. Raises `UserError`."""
    write_text(path, json.dumps(replace_nonfinite(content), indent=2, allow_nan=False) + "\n")


def replace_nonfinite(content: Any) -> Any:
    """`content` for JSON: with None in place of NaN and infinities, which JSON lacks."""
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

CONNECT_TIMEOUT = 4.0


def find_host(url: str) -> str:
    """`host` or `host:port` that must be reached for a URL: the proxy where there is one."""
    plain = urlparse(url)
    host = plain.netloc
    if not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(plain.scheme, "")  # with http:// before it or not
        host = proxy.rpartition("://")[2].partition("/")[0] or host
    return host.split("@")[-1]


def is_reachable(host: str, seconds: float = CONNECT_TIMEOUT) -> bool:
    """Whether `host` or `host:port` answers in that time. A resolver can hang for minutes: it is
    left behind, in a thread."""
    name, _, port = host.partition(":")
    answers = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((name, int(port or 443)), timeout=seconds).close()
            answers.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)
