"""Lets the processes of a run talk before JAX connects them, with a timeout for everything.

JAX's own start gives no answer about who is missing, and processes with different versions of JAX
may not understand each other. Here every process connects to process 0 by TCP, at the address that
JAX will use afterwards, and they exchange lines of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from flax_cnns.errors import UserError

_GREETING = "flax_cnns meeting"


class Meeting:
    """The connection of one process to all others of its run. Use it as a context manager.

    Args:
      address: "host:port" of process 0.
      count: the number of processes.
      index: of this process.
      seconds: how long to wait for all processes, and for each exchange.

    Raises `UserError` if this process cannot open or reach the address, or if others do not come.
    With one process, nothing is opened.
    """

    def __init__(self, address: str, count: int, index: int, *, seconds: float = 60.0):
        self.address, self.count, self.index, self.seconds = address, count, index, seconds
        self._peers: dict[int, _Line] = {}  # by index; processes other than 0 have only 0
        if count > 1:
            try:
                self._open() if index == 0 else self._connect()
            except BaseException:
                self.close()
                raise

    def exchange(self, message: dict[str, Any], *, seconds: float | None = None) -> list[Any]:
        """Sends a message, and returns the messages of all processes by index.

        Raises `UserError`, on every process that is left, if a process does not answer in time.
        """
        if self.count == 1:
            return [message]
        deadline = time.monotonic() + (self.seconds if seconds is None else seconds)
        if self.index:
            self._peers[0].send(message)
            # Process 0 answers at its own deadline, which may be a little later.
            answer = self._peers[0].receive(deadline + 5)
            if answer is None:
                raise UserError(f"process 0 at {self.address} is gone")
        else:
            texts = [message, *(None for _ in range(1, self.count))]
            for index, line in self._peers.items():
                texts[index] = line.receive(deadline)
            answer = {"all": texts}
            for line in self._peers.values():
                line.send(answer)
        if missing := [i for i, text in enumerate(answer["all"]) if text is None]:
            raise UserError(f"{_name(missing)} ended or did not answer in time")
        return answer["all"]

    def close(self) -> None:
        """Closes the connections."""
        for line in self._peers.values():
            line.close()
        self._peers = {}

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        bind, _, port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")
        port = port or self.address.rpartition(":")[2]
        deadline = time.monotonic() + self.seconds
        try:
            listener = socket.create_server((bind, int(port)), backlog=self.count)
        except OSError as error:
            raise UserError(
                f"process 0 cannot open port {port}: {os.strerror(error.errno or 0)}; end what"
                " uses it, or choose another port"
            ) from None
        with listener:
            while len(self._peers) < self.count - 1 and time.monotonic() < deadline:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    line = _Line(listener.accept()[0])
                except OSError:  # nobody came
                    break
                hello = line.receive(min(deadline, time.monotonic() + 5))
                problem = self._check_hello(hello)
                if problem:
                    line.close()  # something else that scans ports, unless it greeted
                    if hello:
                        raise UserError(problem)
                    continue
                assert hello is not None
                self._peers[hello["index"]] = line
        missing = [i for i in range(1, self.count) if i not in self._peers]
        text = f"{_name(missing)} of {self.count} did not come to {self.address} within"
        text += f" {self.seconds:g} s"
        for line in self._peers.values():
            line.send({"problem": text} if missing else {})
        if missing:
            raise UserError(f"{text}; are all processes started, and can they reach this address?")

    def _check_hello(self, hello: Any) -> str:
        if not isinstance(hello, dict) or hello.get("greeting") != _GREETING:
            return "no greeting"
        index, count = hello["index"], hello["count"]
        if count != self.count:
            return f"process {index} says that there are {count} processes, process 0 {self.count}"
        if index in self._peers or not 0 < index < count:
            return f"two processes say that they are process {index} of {count}"
        return ""

    def _connect(self) -> None:
        host, _, port = self.address.rpartition(":")
        deadline = time.monotonic() + self.seconds
        reason = "no answer"
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = _Line(socket.create_connection((host, int(port)), timeout=left))
            except OSError as error:
                reason = (error.strerror or str(error) or "no answer").lower()
                time.sleep(min(0.2, left))
                continue
            line.send({"greeting": _GREETING, "index": self.index, "count": self.count})
            # Process 0 may have begun to wait later, so this process waits a little longer.
            answer = line.receive(deadline + self.seconds)
            self._peers[0] = line
            if answer is None:
                raise UserError(f"process 0 at {self.address} is gone; its own message says why")
            if "problem" in answer:
                raise UserError(answer["problem"])
            return
        raise UserError(
            f"process {self.index} (on {socket.gethostname()}): nobody answers at {self.address}"
            f" within {self.seconds:g} s ({reason}): process 0 does not run, the address is wrong,"
            " or a firewall closes the port"
        )


class _Line:
    """A socket that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        self._socket, self._rest = connection, b""

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.settimeout(10)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the other side is gone, which `receive` tells

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """Returns the next object; None at the deadline, or if the other side is gone."""
        try:
            while b"\n" not in self._rest:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
                if not (chunk := self._socket.recv(1 << 16)):
                    return None
                self._rest += chunk
            text, _, self._rest = self._rest.partition(b"\n")
            return json.loads(text)
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        self._socket.close()


def _name(indices: list[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
