"""Files, before they are opened: what kind they are; and hosts, before they are asked."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import urllib.request
from urllib.parse import urlparse

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


SECONDS_TO_ANSWER = 4.0


def host_of(url: str) -> str:
    """`host` or `host:port` that must be reached for a URL: the proxy where there is one."""
    plain = urlparse(url)
    host = plain.netloc
    if not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(plain.scheme, "")  # with http:// before it or not
        host = proxy.rpartition("://")[2].partition("/")[0] or host
    return host.split("@")[-1]


def reachable(host: str, seconds: float = SECONDS_TO_ANSWER) -> bool:
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
