"""Turns on JAX's persistent compilation cache: later processes read compiled programs from disk.

The cache has one file for each executable. The file's key covers the program, the compiler's
version and options, and for a CPU its name and instruction sets, so different machines may share a
home directory. A file is a zlib stream, whose checksum detects truncated or altered files. (If the
package zstandard is installed, or with Python 3.14, JAX writes zstd frames, by default without a
checksum.) JAX compiles the program of a damaged file again but keeps the file; this module removes
it. Anyone who can write into the folder can run code as you, so keep the folder private.
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
from typing import TextIO

from flax_cnns.runtime import output

OFF = "off"
MAX_BYTES = 4 * 2**30  # above this size, the least recently read entries are removed
_PROBLEM = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(\w+)': (.*)"
)


def find_default_folder(environment: Mapping[str, str]) -> str:
    """Returns JAX_COMPILATION_CACHE_DIR if it is set; otherwise flax_cnns/xla under XDG_CACHE_HOME
    or ~/.cache."""
    if folder := environment.get("JAX_COMPILATION_CACHE_DIR"):
        return folder
    base = environment.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else "~/.cache"  # XDG: relative paths are ignored
    return os.path.join(base, "flax_cnns", "xla")


def enable(where: str = "") -> str:
    """Turns the cache on and returns its folder, or "" if the cache is off.

    `where` is a folder, "off", or "" for `find_default_folder`. Call this before JAX's first
    operation. If the folder cannot be written, prints a warning and turns the cache off.
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is respected if it is set.
    """
    with output.without_driver_noise():
        import jax

    if where == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    name = where or find_default_folder(os.environ)
    if "://" in name:  # a bucket, which JAX checks itself
        jax.config.update("jax_compilation_cache_dir", name)
        return name
    folder = Path(os.path.abspath(os.path.expanduser(name)))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _warn(
            f"no compilation cache: {folder} cannot be written ({error.strerror}); choose another"
            " folder with --compilation-cache=DIR, or turn the cache off with"
            " --compilation-cache=off"
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    prune(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _handle_warnings(folder)
    return str(folder)


def prune(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes the least recently read entries until at most `max_bytes` are left.

    JAX's own limit (jax_compilation_cache_max_size) needs another package and takes a lock for each
    read.
    """
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process may prune too
            info = path.stat()
            entries.append((max(info.st_atime, info.st_mtime), info.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _handle_warnings(folder: Path) -> None:
    """Installs a warnings handler that prints JAX's warnings about the cache as one line each. The
    handler also removes entries that JAX cannot read, so that they are written again."""
    show, warned_of = warnings.showwarning, set()

    def handle(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        problem = _PROBLEM.match(str(message))
        if problem is None:
            show(message, category, filename, lineno, file, line)
            return
        operation, function, reason = problem.groups()
        if operation == "reading":  # the warning does not say which of the function's entries
            for path in folder.glob(f"{function}-*-cache"):
                with contextlib.suppress(OSError):
                    path.unlink()
            _warn(f"damaged {function} in the compilation cache; compiling it again ({reason})")
        elif "writing" not in warned_of:
            warned_of.add("writing")
            _warn(f"cannot write into the compilation cache {folder}: {reason}")

    warnings.showwarning = handle


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
