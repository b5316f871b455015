"""Printing that ends no run: a full disk, `| head -1` or a closed terminal only loses lines.

with output.safe():
    ...  # print, rich and tracebacks lose what cannot be written

A file that cannot be written stays an error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Safe:
    """A stream like the one that it wraps, which drops what that one cannot write."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name, self._said = stream, name, False

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def reconfigure(self, **options: Any) -> None:
        with self._dropping():  # it flushes
            self._stream.reconfigure(**options)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stream.closed:
                raise  # not about writing
            # A reader that closed the pipe, such as head, needs no warning.
            if not self._said and self._name == "stdout" and not isinstance(error, BrokenPipeError):
                said = getattr(error, "strerror", None) or error
                print(f"warning: standard output cannot be written: {said}", file=sys.stderr)
            self._said = True

    def empty_buffer(self) -> None:
        """Leaves nothing in the stream's buffer that would fail at the interpreter's end."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.flush()  # prints the warning
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()


@contextlib.contextmanager
def safe() -> Iterator[None]:
    """A context in which standard output and standard error raise nothing if they cannot be
    written; nor do they at the interpreter's end. What goes to a stream that is closed is lost.

    One warning on standard error says that standard output is lost, unless a reader closed a pipe.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stderr", "stdout"):  # stdout is restored first: its warning needs stderr
            before = getattr(sys, name)
            if not isinstance(before, _Safe):
                ours = _Safe(before or stack.enter_context(open(os.devnull, "w")), name)
                setattr(sys, name, ours)
                stack.callback(_restore, name, ours, before)
        yield


def _restore(name: str, ours: _Safe, before: TextIO | None) -> None:
    ours.empty_buffer()
    if getattr(sys, name) is ours:
        setattr(sys, name, before)
