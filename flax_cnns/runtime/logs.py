"""Files with the output of each process of a run: `host0.log`, and `errors/host0.txt` if it failed.

On a cluster, each host's launcher writes its own files into one shared folder. If the folder
`errors` is empty, no process failed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from flax_cnns.errors import UserError
from flax_cnns.names import open_log

SHOWN = 30  # lines of output in errors/host0.txt


class HostLog:
    """The log of one process. Output of later starts is appended.

    Raises `UserError` if the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, name: str, command: Sequence[str]):
        self._error = Path(folder) / "errors" / f"{name}.txt"
        self._last: collections.deque[str] = collections.deque(maxlen=SHOWN)
        try:
            self._error.parent.mkdir(parents=True, exist_ok=True)
            self._error.unlink(missing_ok=True)  # of an earlier start
            self._file = open_log(Path(folder) / f"{name}.log")
        except OSError as error:
            raise UserError(f"--logs: cannot write into {folder}: {error.strerror}") from None
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        self._title = f"==== {began} on {socket.gethostname()}: {shlex.join(command)}"
        self.write(f"{self._title}\n")

    def write(self, line: str) -> None:
        """Appends a line, and sends it to the file system at once."""
        self._last.append(line)
        # A full disk, or a thread that outlives the process, must not end the run.
        with contextlib.suppress(OSError, ValueError):
            self._file.write(line)
            self._file.flush()

    def end(self, failure: str, error: str) -> None:
        """Closes the log. `failure`: how the process ended, "" if well; `error`: its error line."""
        if failure:
            text = "".join(
                [f"{self._title}\n", f"ended {failure}\n", f"{error}\n" if error else ""]
            )
            text += f"\nits last lines:\n{''.join(self._last)}"
            with contextlib.suppress(OSError):
                self._error.write_text(text, encoding="utf-8", errors="backslashreplace")
        with contextlib.suppress(OSError):
            self._file.close()
