"""Runs a config in a child process, so that a crash or an out-of-memory kill stays in that process.

    with lock_log(log) as out:
        process = start(config, workdir, out, slot)
    ... process.poll() ...
    read_outcome(code, log)

The child reads its job from standard input. Its standard input closes when the parent ends for any
reason; the child then saves and exits as after SIGTERM. Until it exits it holds the lock on its
log, which keeps other processes from starting the same run.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from flax_cnns.errors import (
    EXIT_DIVERGED,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    Diverged,
    ProcessLost,
    UserError,
    describe_out_of_memory,
)
from flax_cnns.names import escape_unencodable
from flax_cnns.runtime import compilation_cache, launch, output


class DeviceSlot(NamedTuple):
    """The devices of this machine that one run at a time may use."""

    environment: dict[str, str] = {}  # noqa: RUF012 (never changed) selects the GPU
    cores: tuple[int, ...] = ()  # the run's CPU cores; (): all


class ChildOutcome(NamedTuple):
    """How a child process ended."""

    status: str  # complete, diverged, failed, interrupted
    error: str = ""  # one line
    should_retry: bool = False  # whether another attempt may succeed


def make_device_slots(number: int | None = None) -> list[DeviceSlot]:
    """Divides this machine into `number` slots: one GPU each, or equal parts of the CPU cores.

    `number=None` makes one slot for each GPU, or one slot on a CPU or TPU. The chips of a TPU
    belong to one process and form one slot. Raises UserError if there are fewer devices.
    """
    platform, count = _devices()
    if platform == "cpu":
        number = number or 1
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if number == 1 or not cores:
            return [DeviceSlot()] * number
        if number > len(cores):
            return [DeviceSlot(cores=(cores[i % len(cores)],)) for i in range(number)]
        cuts = [i * len(cores) // number for i in range(number + 1)]
        return [DeviceSlot(cores=tuple(cores[a:b])) for a, b in itertools.pairwise(cuts)]
    if platform != "gpu":
        count = 1
    if number is not None and number > count:
        raise UserError(
            f"--jobs: {number} at once, but this machine has {platform.upper()} slots for {count}"
        )
    if platform != "gpu":
        return [DeviceSlot()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = visible.split(",")[: number or count]
    return [DeviceSlot({"CUDA_VISIBLE_DEVICES": name}) for name in names]


def _devices() -> tuple[str, int]:
    """Returns (platform, number of devices), such as ("gpu", 4). Another process counts them,
    because a process that opens a GPU keeps its memory."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu", 1
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise UserError(f"JAX finds no device: {result.stderr.strip().splitlines()[-1]}")
    platform, count = result.stdout.split()[-2:]
    return platform, int(count)


def lock_log(log: pathlib.Path) -> IO[bytes] | None:
    """Opens the log of a run for appending and locks it; None if another process holds the lock.

    The lock lasts until the file is closed both here and in the child that inherited it.
    """
    out = log.open("ab")
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        out.close()
        return None
    except OSError:  # the file system has no locks
        pass
    return out


def start(
    config: Any,
    workdir: pathlib.Path,
    out: IO[bytes],
    slot: DeviceSlot,
    *,
    accept_changed_data: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a process that runs `config` in `workdir` and prints to `out`."""
    import jax

    flags: Any = jax.config
    cache = flags.jax_enable_compilation_cache and flags.jax_compilation_cache_dir
    job = {
        "config": config,
        "workdir": str(workdir),
        "accept_changed_data": accept_changed_data,
        "cores": slot.cores,
        "path": sys.path,  # where to import the user's own parts from
        "cache": cache or compilation_cache.OFF,
    }
    ours = str(pathlib.Path(__file__).resolve().parents[2])  # needs no installed package
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "flax_cnns.runs.child"],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **slot.environment},
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # the terminal's Ctrl-C reaches the child once, through the parent
    )
    assert process.stdin is not None  # it is a pipe
    with contextlib.suppress(BrokenPipeError):  # the child has ended; its exit code says why
        pickle.dump(job, process.stdin)
        process.stdin.flush()
    return process


def read_outcome(code: int, log: pathlib.Path, since: int = 0) -> ChildOutcome:
    """Interprets the exit code of a child.

    The error is the last line "error: ..." in its log after byte `since`.
    """
    if code == 0:
        return ChildOutcome("complete")
    stopped = (-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT)
    if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED, *stopped):
        return ChildOutcome("interrupted")
    if code < 0:
        name = signal.Signals(-code).name
        why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return ChildOutcome("failed", f"killed by {name}{why}", should_retry=True)
    lines = log.read_bytes()[since:].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    error = errors[-1] if errors else f"exit code {code}"
    if code == EXIT_DIVERGED:
        return ChildOutcome("diverged", error)
    return ChildOutcome("failed", error, should_retry=code != EXIT_USER_ERROR)


# ---- in the child process


def set_import_path(path: Sequence[str]) -> None:
    """Makes imports search `path` first, so that a name means the same module as in the parent."""
    sys.path[:] = [*path, *(other for other in sys.path if other not in path)]


@output.safe()
def main() -> int:
    """Runs the job on standard input. Returns the exit code."""
    job = pickle.load(sys.stdin.buffer)
    set_import_path(job["path"])
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if job["cores"]:
        os.sched_setaffinity(0, job["cores"])
    launch.keep_memory()
    escape_unencodable()
    compilation_cache.enable(job["cache"])
    try:
        from flax_cnns.runs.train import run  # its threads inherit the CPU cores set above

        accept = job["accept_changed_data"]
        run(job["config"], job["workdir"], accept_changed_data=accept)
    except UserError as error:
        print(f"error: {error}")
        return EXIT_DIVERGED if isinstance(error, Diverged) else EXIT_USER_ERROR
    except ProcessLost as error:
        print(f"error: {error}")
        return EXIT_FAULT
    except Exception as error:
        if line := describe_out_of_memory(error):
            print(f"error: {line}")
            return EXIT_FAULT  # another process may have held the memory, so a retry may succeed
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"error: {type(error).__name__}: {first}")
        return EXIT_FAULT
    return 0


def _exit_with_parent() -> None:
    # Reads the file descriptor: a thread must not hold the lock of sys.stdin at interpreter exit.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
