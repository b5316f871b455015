"""Printing that never ends a run.

If the disk is full, the terminal is closed, or a reader such as `head -1` ends, only output is
lost:

with output.safe():
    ...  # print, rich and tracebacks drop what cannot be written

Writing to other files still raises errors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, TextIO


class _Safe:
    """Wraps a stream and drops what the stream cannot write."""

    def __init__(self, stream: Any, name: str):  # a TextIO, or what took its place in sys
        self._stream, self._name, self._has_failed = stream, name, False

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def reconfigure(self, **options: Any) -> None:
        with self._dropping():  # reconfigure flushes
            self._stream.reconfigure(**options)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stream.closed:
                raise  # not an error of writing
            # A reader that closed the pipe, such as head, needs no warning.
            is_pipe = isinstance(error, BrokenPipeError)
            if not self._has_failed and self._name == "stdout" and not is_pipe:
                reason = getattr(error, "strerror", None) or error
                print(f"warning: standard output cannot be written: {reason}", file=sys.stderr)
            self._has_failed = True

    def empty_buffer(self) -> None:
        """Empties the stream's buffer, so that the interpreter's final flush cannot fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.flush()  # prints the warning
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()


@contextlib.contextmanager
def safe() -> Iterator[None]:
    """A context in which writing to standard output and standard error never raises an error, not
    even when the interpreter exits. Output to a closed stream is lost.

    If standard output is lost, one warning is printed to standard error, except if the reader of a
    pipe has closed it.
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


# What CUDA's plugin of JAX says on a machine without a driver. No environment variable stops it.
_DRIVER_NOISE = re.compile(
    rb"Could not find cuda drivers on your machine|All log messages before absl::InitializeLog"
)


@contextlib.contextmanager
def without_driver_noise() -> Iterator[None]:
    """A context in which CUDA's plugin does not say that this machine has no driver.

    The plugin writes to the file descriptor of the standard error, whenever one of its libraries is
    loaded. Everything else that is written there appears at the end of the context.
    """
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            saved = os.dup(2)
        except OSError:  # the standard error is closed
            yield
            return
        stack.callback(os.close, saved)
        kept = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            kept.seek(0)
            with contextlib.suppress(OSError):
                for line in kept:
                    if not _DRIVER_NOISE.search(line):
                        os.write(2, line)
