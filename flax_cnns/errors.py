"""Errors for users, exit codes, and hints such as "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Exit codes of all commands; 0 is success.
EXIT_FAULT = 1  # a bug in flax_cnns, or a process that this one needs has died
EXIT_USER_ERROR = 2  # an error that the user can fix
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the run saved after a signal; the same command continues it
EXIT_INTERRUPTED = 130  # stopped by Ctrl-C: a scheduler should not restart the process
# A run in a child process diverged (runs/child.py). The parent does not retry it.
EXIT_DIVERGED = 3


class UserError(ValueError):
    """An error that the user can fix. Commands print its message as one line and exit with
    `EXIT_USER_ERROR`."""


class ProcessLost(Exception):
    """A process that this one needs has died. Commands print the message as one line and exit with
    `EXIT_FAULT`. The same command continues the run."""


class Interrupted(Exception):
    """Raised by an evaluation that stops early because the run was asked to stop."""


class Diverged(UserError):
    """Raised after too many steps in a row with values that are not finite. A retry would diverge
    again."""


def describe_out_of_memory(error: BaseException) -> str:
    """Returns a message if an error of Python, NumPy or XLA says that memory ran out; "" for other
    errors."""
    first = (str(error).strip().splitlines() or [""])[0]
    from_xla = "RESOURCE_EXHAUSTED" in first and "memory" in first.lower()
    if not isinstance(error, MemoryError) and not from_xla:
        return ""
    return (
        f"out of memory{first and ': '}{first}; use less memory (a smaller data.batch_size,"
        " data.in_memory=no, model.remat) or a machine with more"
    )


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Returns `"; did you mean 'resnet50', 'resnet18'?"` with at most `most` similar names. If no
    name is similar, lists the known names instead; "" if there are none."""
    known = sorted(set(known) - {name})
    containing = [other for other in known if str(name) and str(name) in other]
    # Names that start with `name` come first. For lenet: lenet5, then googlenet.
    containing.sort(key=lambda other: not other.startswith(str(name)))
    near = containing[:most] or difflib.get_close_matches(str(name), known, n=most, cutoff=0.55)
    if near:
        return "; did you mean " + ", ".join(repr(n) for n in near) + "?"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (f", … ({len(known)} in all)" if len(known) > 12 else "")
    return f"; known: {shown}"
