"""Printing that ends nothing: a full disk, `| head -1` or a closed terminal costs lines, not a run.

with output.safe():
    ...  # print, rich and tracebacks lose what cannot be written

Files are another matter: one that cannot be written stays an error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Safe:
    """A stream that drops what its own cannot take, and otherwise is that stream."""

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
            # Who closed a pipe, as head does, knows it.
            if not self._said and self._name == "stdout" and not isinstance(error, BrokenPipeError):
                said = getattr(error, "strerror", None) or error
                print(f"warning: standard output cannot be written: {said}", file=sys.stderr)
            self._said = True

    def let_go(self) -> None:
        """Leaves nothing in the stream's buffer that would fail at the interpreter's end."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.flush()  # says it
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()


@contextlib.contextmanager
def safe() -> Iterator[None]:
    """While it lasts, and at the interpreter's end, standard output and standard error that cannot
    be written raise nothing. Where a stream is closed from the start, what goes there is lost.

    A lost standard output is said once on standard error, unless somebody closed the pipe.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stderr", "stdout"):  # left the other way round: a lost stdout is said
            before = getattr(sys, name)
            if not isinstance(before, _Safe):
                ours = _Safe(before or stack.enter_context(open(os.devnull, "w")), name)
                setattr(sys, name, ours)
                stack.callback(_restore, name, ours, before)
        yield


def _restore(name: str, ours: _Safe, before: TextIO | None) -> None:
    ours.let_go()
    if getattr(sys, name) is ours:
        setattr(sys, name, before)
