"""What a tired person reads at midnight: what was expected, what came, the near miss, the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Exit codes of all commands, beside 0.
EXIT_FAULT = 1  # a fault of ours, or a process that this one needs has died
EXIT_USER_ERROR = 2  # something that the user can mend
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, because it was asked to; the same command goes on
EXIT_INTERRUPTED = 130  # left because of Ctrl-C: no scheduler should start it again
# Of a run in a child process (runs/child.py), which the parent does not try again.
EXIT_DIVERGED = 3


class UserError(ValueError):
    """Something that the user can mend. Scripts print its message as one line and exit with
    `EXIT_USER_ERROR`."""


class ProcessLost(Exception):
    """A process that this one needs has died. Scripts print the message as one line and exit with
    `EXIT_FAULT`. The user need not change the command: the same one goes on."""


class Interrupted(Exception):
    """Raised by an evaluation that gave up half-way because the run is asked to stop."""


class Diverged(UserError):
    """Training whose gradients were not finite for too many steps: the same command, or a retry,
    would only diverge again."""


def describe_out_of_memory(error: BaseException) -> str:
    """A line if an error of Python, NumPy or XLA says that memory ran out; "" for other errors."""
    first = (str(error).strip().splitlines() or [""])[0]
    of_xla = "RESOURCE_EXHAUSTED" in first and "memory" in first.lower()
    if not isinstance(error, MemoryError) and not of_xla:
        return ""
    return (
        f"out of memory{first and ': '}{first}; ask for less (data.batch_size, data.in_memory=no,"
        " model.remat), or take a machine with more"
    )


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """`"; did you mean 'resnet50', 'resnet18'?"`, or the sorted names where nothing is near."""
    known = sorted(set(known) - {name})  # the name itself is no advice
    holding = [other for other in known if str(name) and str(name) in other]
    holding.sort(key=lambda other: not other.startswith(str(name)))  # lenet: lenet5, then googlenet
    near = holding[:most] or difflib.get_close_matches(str(name), known, n=most, cutoff=0.55)
    if near:
        return "; did you mean " + ", ".join(repr(n) for n in near) + "?"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (f", … ({len(known)} in all)" if len(known) > 12 else "")
    return f"; known: {shown}"
