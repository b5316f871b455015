"""The persistent compilation cache: what XLA compiled once, a later process reads from disk.

JAX's own, a file an executable, turned on before JAX's first operation. Its key holds the program,
the compiler's version and options, and for a CPU its name and instruction sets (so machines of
several types may share a home directory). Its content is a zlib stream, whose checksum finds what
is cut off or altered; JAX then compiles anew, and this module removes the damaged file, which JAX
never would. Whoever can write into the folder can run code as you: keep it your own.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

OFF = "off"
MAX_BYTES = 4 * 2**30  # bytes; beyond, what was not read for longest goes
_PROBLEM = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(\w+)': (.*)"
)


def find_default_folder(environment: Mapping[str, str]) -> str:
    """JAX_COMPILATION_CACHE_DIR, else flax_cnns/xla under XDG_CACHE_HOME or ~/.cache."""
    if folder := environment.get("JAX_COMPILATION_CACHE_DIR"):
        return folder
    base = environment.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else "~/.cache"  # the standard: a relative one is ignored
    return os.path.join(base, "flax_cnns", "xla")


def enable(where: str = "") -> str:
    """Turns the cache on; returns its folder, "" where it is off.

    `where`: a folder, "off", or "" for `find_default_folder`. Call this before JAX's first
    operation.
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is kept where it is set. A folder that cannot be
    written costs a line on stderr and the cache.
    """
    import jax

    if where == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    name = where or find_default_folder(os.environ)
    if "://" in name:  # a bucket: JAX's business
        jax.config.update("jax_compilation_cache_dir", name)
        return name
    folder = Path(os.path.abspath(os.path.expanduser(name)))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _warn(
            f"no compilation cache, for {folder} cannot be written ({error.strerror});"
            " --compilation-cache=DIR names another folder, off does without"
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    prune(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _mend(folder)
    return str(folder)


def prune(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes the least recently read entries until `max_bytes` are left.

    JAX's own limit (jax_compilation_cache_max_size) takes one more package and a lock a read.
    """
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process prunes too
            found = path.stat()
            entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _mend(folder: Path) -> None:
    """Removes the entries that JAX warns it cannot read, so that they are written again; its
    warnings become one line each."""
    show, said = warnings.showwarning, set()

    def mend(message, category, filename, lineno, file=None, line=None) -> None:
        problem = _PROBLEM.match(str(message))
        if problem is None:
            show(message, category, filename, lineno, file, line)
            return
        doing, function, why = problem.groups()
        if doing == "reading":  # which of the function's entries it was, the warning does not say
            for path in folder.glob(f"{function}-*-cache"):
                with contextlib.suppress(OSError):
                    path.unlink()
            _warn(f"the compilation cache held a damaged {function}; it is compiled anew ({why})")
        elif "writing" not in said:
            said.add("writing")
            _warn(f"cannot write into the compilation cache {folder}: {why}")

    warnings.showwarning = mend


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
