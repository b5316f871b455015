"""One process at a time writes into a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from pathlib import Path

from flax_cnns.errors import UserError


class DirectoryLock:
    """Holds `<workdir>/.lock`, for two processes that save one step commit a mix of both.

    The kernel lets go of the lock when the process ends, however it ends, so there are no stale
    ones; the file stays and means nothing by itself. A context manager; makes the directory where
    it is missing. Raises `UserError` where another process holds the lock, or the directory cannot
    be written.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = Path(workdir)
        self._file: int | None = None
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            # Again where the directory was cleared away meanwhile, and the locked file with it.
            while not self._is_held():
                self.release()
                # Not inheritable (Python's default): a child that outlives us does not hold it.
                self._file = os.open(self.workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
                self._take()
        except OSError as error:
            self.release()
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"cannot write into {workdir}: {reason}; choose another --workdir"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 1000, 0).decode(errors="replace").strip()
            self.release()
            raise UserError(
                f"{self.workdir} is in use by {holder or 'another process'};"
                " wait until it ends, stop it, or choose another --workdir"
            ) from None
        except OSError as error:  # some network file systems are mounted without locks
            print(
                f"warning: {self.workdir} cannot be locked ({error.strerror}):"
                " let only one process use it",
                file=sys.stderr,
            )

    def _is_held(self) -> bool:
        path = self.workdir / ".lock"
        if self._file is None or not path.exists():
            return False
        return os.path.samestat(os.fstat(self._file), path.stat())

    def release(self) -> None:
        """Lets go of the lock; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


lock = DirectoryLock
