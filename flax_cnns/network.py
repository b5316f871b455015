"""Whether the network is there, known within seconds rather than minutes."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from urllib.parse import urlparse

SECONDS = 4.0


def host_of(url: str) -> str:
    """`host` or `host:port` that must be reached for a URL: the proxy where there is one."""
    plain = urlparse(url)
    host = plain.netloc
    if not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(plain.scheme, "")  # with http:// before it or not
        host = proxy.rpartition("://")[2].partition("/")[0] or host
    return host.split("@")[-1]


def reachable(host: str, seconds: float = SECONDS) -> bool:
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
