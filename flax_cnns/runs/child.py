"""A run in a process of its own: one that crashes, is killed for memory or diverges harms no other.

    with claim(log) as out:
        process = start(config, workdir, out, share)
    ... process.poll() ...
    outcome(code, log)

The child reads its job from its standard input, which stays open for as long as its parent lives:
when that ends, however it ends, the run saves and leaves as after SIGTERM. Until it has, it holds
its log, so that nobody starts the same run beside it.
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
    """Of this machine, for one run at a time."""

    environment: dict[str, str] = {}  # noqa: RUF012 (never changed) which GPU it sees
    cores: tuple[int, ...] = ()  # it runs on these; (): on all


class ChildOutcome(NamedTuple):
    status: str  # complete, diverged, failed, interrupted
    error: str = ""  # in one line
    should_retry: bool = False  # whether another attempt may succeed


def make_device_slots(number: int | None = None) -> list[DeviceSlot]:
    """So many shares of this machine: a GPU each, or an equal part of the CPU's cores. None: as
    many as there are GPUs, or one. A TPU's chips belong to one process and are one share.

    Raises `UserError` where there are fewer devices.
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
        raise UserError(f"--jobs: {number} at once, but there is a {platform} for {count} alone")
    if platform != "gpu":
        return [DeviceSlot()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = visible.split(",")[: number or count]
    return [DeviceSlot({"CUDA_VISIBLE_DEVICES": name}) for name in names]


def _devices() -> tuple[str, int]:
    """("gpu", 4): asked in another process, for one that has opened a GPU keeps its memory."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu", 1
    ask = "import jax; print(jax.default_backend(), jax.local_device_count())"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise UserError(f"JAX finds no device: {asked.stderr.strip().splitlines()[-1]}")
    platform, count = asked.stdout.split()[-2:]
    return platform, int(count)


def lock_log(log: pathlib.Path) -> IO[bytes] | None:
    """The log of a run, open for more; None while another process writes there. It is let go when
    it is closed here and in the child that got it."""
    out = log.open("ab")
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        out.close()
        return None
    except OSError:  # a file system without locks
        pass
    return out


def start(
    config: Any,
    workdir: pathlib.Path,
    out: IO[bytes],
    share: DeviceSlot,
    *,
    accept_changed_data: bool = False,
) -> subprocess.Popen[bytes]:
    """Runs `config` in `workdir`; `out` gets what it prints."""
    import jax

    on = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    job = {
        "config": config,
        "workdir": str(workdir),
        "accept_changed_data": accept_changed_data,
        "cores": share.cores,
        "path": sys.path,  # where the user's own parts are imported from
        "cache": on or compilation_cache.OFF,
    }
    ours = str(pathlib.Path(__file__).resolve().parents[2])  # works without installation too
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "flax_cnns.runs.child"],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **share.environment},
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that the terminal's Ctrl-C comes once, through the parent
    )
    with contextlib.suppress(BrokenPipeError):  # it has ended already; its code says how
        pickle.dump(job, process.stdin)
        process.stdin.flush()
    return process


def read_outcome(code: int, log: pathlib.Path, since: int = 0) -> ChildOutcome:
    """What the exit code of a child means; the words are the last that it said, from the byte
    `since` of its log on."""
    if code == 0:
        return ChildOutcome("complete")
    asked = (-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT)
    if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED, *asked):
        return ChildOutcome("interrupted")
    if code < 0:
        name = signal.Signals(-code).name
        why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return ChildOutcome("failed", f"killed by {name}{why}", should_retry=True)
    lines = log.read_bytes()[since:].decode(errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    error = said[-1] if said else f"exit code {code}"
    if code == EXIT_DIVERGED:
        return ChildOutcome("diverged", error)
    return ChildOutcome("failed", error, should_retry=code != EXIT_USER_ERROR)


# ---- in the child


def set_import_path(path: Sequence[str]) -> None:
    """Finds modules where the parent does, in its order: a name is the same module in both."""
    sys.path[:] = [*path, *(other for other in sys.path if other not in path)]


@output.safe()
def main() -> int:
    job = pickle.load(sys.stdin.buffer)
    set_import_path(job["path"])
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    if job["cores"]:
        os.sched_setaffinity(0, job["cores"])
    launch.keep_memory()
    escape_unencodable()
    compilation_cache.enable(job["cache"])
    try:
        from flax_cnns.runs.train import run  # after the cores, for its threads

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
            return EXIT_FAULT  # another process may have held the memory: a second try may succeed
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"error: {type(error).__name__}: {first}")
        return EXIT_FAULT
    return 0


def _leave_with_the_parent() -> None:
    # Not by sys.stdin, whose lock a thread must not hold when the interpreter ends.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
