"""Checks that a batch fits into a CPU's memory, before XLA aborts the process.

Accelerators raise an error by themselves.
"""

from __future__ import annotations

import pathlib
import resource
from collections.abc import Callable
from typing import Any

from flax_cnns.errors import UserError

GIB = 2**30


def available() -> int | None:
    """Returns the bytes that this process may still allocate; None if they are unknown.

    The machine, the control group and the process each have a limit; the smallest one counts.
    """
    limits = []
    machine = _table("/proc/meminfo")
    if "MemAvailable" in machine:
        limits.append((machine["MemAvailable"] + machine.get("SwapFree", 0)) * 1024)
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        group_limit = (group / "memory.max").read_text().strip()
        if group_limit != "max":
            limits.append(int(group_limit) - _table(group / "memory.stat")["anon"])
    except (OSError, ValueError, KeyError):
        pass
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        limits.append(limit - _table("/proc/self/status").get("VmSize", 0) * 1024)
    return max(0, min(limits)) if limits else None


def _table(file: str | pathlib.Path) -> dict[str, int]:
    """Returns {name: number} from a file with lines "name number"; {} if it cannot be read."""
    try:
        text = pathlib.Path(file).read_text()
    except OSError:
        return {}
    lines = [line.replace(":", " ").split() for line in text.splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def needed(step: Callable, *arguments: Any) -> int:
    """Returns the bytes that a compiled step needs on one device in addition to its arguments.

    Returns 0 if XLA does not report them. Compiles the step; the step's first call does not compile
    it again.
    """
    if not hasattr(step, "lower"):
        return 0
    stats = step.lower(*arguments).compile().memory_analysis()
    if stats is None:
        return 0
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def fits(need: float) -> bool:
    """Whether `need` bytes are available."""
    free = available()
    return free is None or need <= free


def check_fits(need: float, *, what: str) -> None:
    """Raises `UserError` if `need` bytes are not available; `what` is the field with its value."""
    if not fits(need):
        free = available() or 0
        raise UserError(
            f"{what}: a batch of this size needs {need / GIB:.1f} GiB of memory, but only "
            f"{free / GIB:.1f} GiB are free; choose a smaller batch"
        )
