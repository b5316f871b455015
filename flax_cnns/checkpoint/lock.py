"""A lock: only one process at a time writes into a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from pathlib import Path

from flax_cnns.errors import UserError


class DirectoryLock:
    """Holds a lock on `<workdir>/.lock`, as a context manager.

    Without the lock, two processes that save the same step would write a mix of both. The kernel
    releases the lock when the process ends for any reason, so no lock is left over; the file stays,
    and its existence means nothing. A missing directory is created. Raises `UserError` if
    another process holds the lock, or the directory cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = Path(workdir)
        self._file: int | None = None
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            # Repeated if the directory was deleted meanwhile, with the locked file in it.
            while not self._is_held():
                self.release()
                # Python opens files as not inheritable: a child that outlives us holds no lock.
                self._file = os.open(self.workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
                self._take(self._file)
        except OSError as error:
            self.release()
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"cannot write into {workdir}: {reason}; choose another --workdir"
            ) from None
        assert self._file is not None  # the loop ends when the file is locked
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)

    def _take(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
            self.release()
            raise UserError(
                f"{self.workdir} is in use by {holder or 'another process'}; wait for the end of"
                " that process, stop it, or choose another --workdir"
            ) from None
        except OSError as error:  # network file systems may be mounted without locks
            print(
                f"warning: {self.workdir} cannot be locked ({error.strerror}); let only one process"
                " use it",
                file=sys.stderr,
            )

    def _is_held(self) -> bool:
        path = self.workdir / ".lock"
        if self._file is None or not path.exists():
            return False
        return os.path.samestat(os.fstat(self._file), path.stat())

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
