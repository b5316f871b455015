"""Connects the processes of a run, and launches several processes on one machine.

    python -m flax_cnns.launch --local=2 --devices=2 -- python -m experiments.train --workdir=runs/x

starts two processes with two simulated CPU devices each. On a cluster, the cluster's launcher
starts the processes (see `experiments/launch/`), and each of them calls `initialize`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flax_cnns.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    UserError,
)
from flax_cnns.files import check_local
from flax_cnns.runtime import output
from flax_cnns.runtime.cluster import (
    COORDINATOR,
    NUM_PROCESSES,
    PROCESS_ID,
    find_cluster,
    find_host_name,
    read_settings,
)
from flax_cnns.runtime.logs import HostLog

# JAX and NumPy are imported where they are used, because the launcher itself needs neither.

GRACE_SECONDS = 5.0  # the time that the other processes have to end after one has failed


# ---- called in every process


def keep_memory() -> bool:
    """Makes the C library keep the memory that this process frees. Returns whether that worked.

    On a CPU, XLA allocates the scratch memory of every training step again: hundreds of MB that the
    system hands out page by page. A step of MobileNet v2 (16 images of 96 pixels, 2 cores) took 143
    ms with the system's settings and 91 ms with these. Call this function before JAX's first
    operation. Returns False if the C library is not glibc, or if the environment sets its options.

    To repeat the measurement, run this command with and without --memory=system:
    python -m experiments.benchmark vs-torch --block=mobilenet_v2 --batch=16 --size=96 --rounds=9
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # <malloc.h>
    # One heap for all threads, no separate mapping for large blocks, no memory returned.
    settings = ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 60,
    shutdown_timeout: int = 120,
) -> None:
    """Connects this process to the run's other processes, before JAX's first operation.

    An argument that is None is read from the environment: FLAX_CNNS_COORDINATOR=host:port,
    FLAX_CNNS_NUM_PROCESSES, FLAX_CNNS_PROCESS_ID. If none of the three is set, JAX detects the
    other processes: under SLURM and Open MPI, on TPU pods, and in an indexed Kubernetes job. Does
    nothing for a single process.

    The timeouts are in seconds. `initialization_timeout`: how long to wait for all processes to
    connect. `heartbeat_timeout`: after how long a silent process counts as dead.
    `shutdown_timeout`: how long the first process to end waits for the last. Raises `UserError` if
    the settings are incomplete or invalid.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    timeouts: dict[str, Any] = {
        "initialization_timeout": initialization_timeout,
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "shutdown_timeout_seconds": shutdown_timeout,
    }
    if given := read_settings(coordinator, num_processes, process_id, os.environ):
        if given[1] > 1:
            jax.distributed.initialize(*given, cluster_detection_method="deactivate", **timeouts)
    elif find_cluster(os.environ):
        try:
            jax.distributed.initialize(**timeouts)
        except ValueError as error:
            if "should be defined" not in str(error):
                raise
            return  # JAX does not recognize the cluster
    if jax.distributed.is_initialized():
        sys.excepthook = _leave_at_once


def exit_if_distributed(code: int) -> None:
    """Ends this process at once if it is one of several; returns if it is the only one.

    An ordinary exit would wait for the other processes, which wait for this one inside their step.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_at_once(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.__excepthook__(kind, error, trace)
    exit_if_distributed(EXIT_INTERRUPTED if issubclass(kind, KeyboardInterrupt) else EXIT_FAULT)


def describe_lost_peer(error: BaseException | None) -> str:
    """Returns JAX's message in one line if JAX failed because another process of this run has died;
    "" for any other error."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return ""
    text = str(error).strip()
    from_jax = isinstance(error, RuntimeError | ValueError) and not isinstance(error, UserError)
    return text.partition("\n")[0] if from_jax and _PEER_LOST.search(text) else ""


_PEER_LOST = re.compile(r"(?i)gloo|nccl|by peer|socket closed|heartbeat|coordination service")


def check_processes_agree(text: str, *, what: str, fix: str) -> None:
    """Raises `UserError` on every process if the processes hold different texts.

    The message says `what` the processes disagree about ("the config"), and how to `fix` it.
    """
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(
        hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), np.uint32
    )
    digests = multihost_utils.process_allgather(digest)
    others = [i for i, other in enumerate(digests) if (other != digests[0]).any()]
    if others:
        raise UserError(
            f"the processes disagree about {what}: process {', '.join(map(str, others))} of"
            f" {len(digests)} differs from process 0; {fix}"
        )


# ---- several processes on this machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code (see `run_local`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m flax_cnns.launch",
        usage="%(prog)s [--local=N [--devices=M]] [--logs=DIR] [--check] -- command ...",
    )
    parser.add_argument(
        "--local",
        type=int,
        help="start this number of processes on this machine; without it, one"
        " process, which a cluster's launcher connects to others",
    )
    parser.add_argument(
        "--devices", type=int, help="number of simulated CPU devices of each process, for trials"
    )
    parser.add_argument(
        "--logs",
        help="folder for the output of each process (host0.log ...); failures are in errors/",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check what the command needs, on all processes;"
        " without a command, check versions and devices, and --workdir",
    )
    parser.add_argument("--workdir", default="", help="with --check: the folder of runs to check")
    parser.add_argument("--timeout", type=float, default=60.0, help="with --check: seconds to wait")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if options.check:
        os.environ["FLAX_CNNS_CHECK_SECONDS"] = str(options.timeout)
        given = [f"--workdir={options.workdir}"] if options.workdir else []
        if command and given:
            parser.error("--workdir belongs to the command")
        check = [sys.executable, "-m", "flax_cnns.runtime.preflight", *given]
        command = [*command, "--check"] if command else check
    elif options.workdir:
        parser.error("--workdir belongs to the command, or to --check without a command")
    if not command:
        parser.error("the command is missing: --local=2 -- python -m experiments.train ...")
    if any(n is not None and n < 1 for n in (options.local, options.devices)):
        parser.error("--local and --devices must be at least 1")
    if options.local is None and not (options.check or options.logs):
        parser.error("one of these is required: --local, --check, --logs")
    try:
        check_local(options.logs or "", "--logs", writes=True)
        logs = Path(options.logs) if options.logs else None
        return run_local(command, options.local, devices=options.devices, logs=logs)
    except UserError as error:
        with output.safe():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def make_local_environment(
    environment: Mapping[str, str], port: int, count: int | None, index: int, devices: int | None
) -> dict[str, str]:
    """Returns the environment of process `index` of `count`; they connect at a local `port`.

    If `count` is None, the environment already says how they connect.
    """
    ours = {"PYTHONUNBUFFERED": "1"}
    if count is not None:
        ours |= {
            COORDINATOR: f"127.0.0.1:{port}",
            NUM_PROCESSES: str(count),
            PROCESS_ID: str(index),
            "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # not reachable from the network
        }
    if devices is not None:
        flag = "--xla_force_host_platform_device_count"
        others = re.sub(rf"{flag}=\S*", "", environment.get("XLA_FLAGS", ""))
        ours |= {"XLA_FLAGS": f"{others} {flag}={devices}".strip(), "JAX_PLATFORMS": "cpu"}
    return {**environment, **ours}


@output.safe()
def run_local(
    command: Sequence[str],
    count: int | None,
    *,
    devices: int | None = None,
    logs: Path | None = None,
) -> int:
    """Runs `count` processes of a command to their end, and prefixes their output with "[1] ".

    If `count` is None, runs one process in the environment as it is, without a prefix: one of the
    processes that a cluster's launcher starts. `logs`: a folder for the output (runtime/logs.py).

    SIGTERM, SIGINT and SIGUSR1 are passed on to all processes. If a process fails, the others have
    `GRACE_SECONDS` to end before they are killed. The last line printed is then the "error: ..."
    line of the failed process; if it printed none, the line says how it ended. After a second
    SIGINT, all processes have `GRACE_SECONDS` to end.

    Returns the exit code of the first process that failed (128 + n for signal n). If none failed,
    returns 130 or 75 if a process ended with that code, otherwise 0. Exit code 130 counts as a
    failure only if this process got no SIGINT.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[subprocess.Popen] = []
    writing = threading.Lock()
    threads: list[threading.Thread] = []
    errors: dict[int, str] = {}  # the first "error: ..." line of each process
    names = [find_host_name(os.environ)] if count is None else [f"host{i}" for i in range(count)]
    hosts = [HostLog(logs, name, command) for name in names] if logs is not None else []

    def copy(index: int, pipe: TextIO, out: TextIO) -> None:
        for line in pipe:
            if line.startswith("error: "):
                errors.setdefault(index, line.rstrip())
            line = line if line.endswith("\n") else f"{line}\n"
            with writing:
                if hosts:
                    hosts[index].write(line)
                print(line if count is None else f"[{index}] {line}", end="", file=out, flush=True)

    def send_to_all(number: int) -> None:
        for child in children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)

    interrupts: list[float] = []  # times of SIGINT

    def pass_on(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            interrupts.append(time.monotonic())
        send_to_all(number)

    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        for index in range(len(names)):
            environment = make_local_environment(os.environ, port, count, index, devices)
            try:
                child = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # so that Ctrl-C reaches it once, through this process
                )
            except OSError as error:
                raise UserError(f"cannot start {command[0]!r}: {error.strerror}") from None
            children.append(child)
            for pipe, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                assert pipe is not None  # both are subprocess.PIPE
                threads.append(threading.Thread(target=copy, args=(index, pipe, out), daemon=True))
                threads[-1].start()
        code, first, how = _wait(children, send_to_all, writing, interrupts)
    finally:
        send_to_all(signal.SIGKILL)
        for child in children:
            child.wait()
        for thread in threads:
            thread.join(timeout=1)  # a grandchild may hold the pipe open
        for number, handler in before.items():
            signal.signal(number, handler)
    for index, host in enumerate(hosts):
        status = children[index].returncode
        good = status in _get_good_codes(interrupts)
        host.end("" if good else _describe_end(status), errors.get(index, ""))
    if hosts and first is not None:
        print(f"[launch] the errors are in {logs}/errors", file=sys.stderr, flush=True)
    if len(names) > 1 and first is not None:
        reason = f": {errors[first]}" if first in errors else f" failed first, {how}"
        print(f"[launch] process {first}{reason}", file=sys.stderr, flush=True)
    return code


def _wait(
    children: Sequence[subprocess.Popen],
    send_to_all: Callable[[int], None],
    writing: threading.Lock,
    interrupts: Sequence[float],
) -> tuple[int, int | None, str]:
    """Waits for all processes. Returns (exit code, index of the first process that failed or None,
    how it ended)."""
    running, good_code, deadline = dict(enumerate(children)), 0, float("inf")
    failure_code, first, how = 0, None, ""
    while running:
        time.sleep(0.02)
        codes = ((index, child.poll()) for index, child in running.items())
        ended = [(index, code) for index, code in codes if code is not None]
        # A killed process comes before the processes that failed because of it.
        for index, code in sorted(ended, key=lambda item: item[1] != -signal.SIGKILL):
            del running[index]
            if code in _get_good_codes(interrupts):
                good_code = max(good_code, code)
            elif not failure_code:
                failure_code = code if code > 0 else 128 - code
                first, how = index, _describe_end(code)
                deadline = time.monotonic() + GRACE_SECONDS
                with writing:
                    # Printed now, before JAX's coordination service can blame the wrong process.
                    line = f"[launch] process {index} failed first, {how}"
                    print(line, file=sys.stderr, flush=True)
        if len(interrupts) > 1:
            deadline = min(deadline, interrupts[1] + GRACE_SECONDS)
        if time.monotonic() > deadline:
            send_to_all(signal.SIGKILL)
    return failure_code or good_code, first, how


def _get_good_codes(interrupts: Sequence[float]) -> tuple[int, ...]:
    return (0, EXIT_PREEMPTED, EXIT_INTERRUPTED) if interrupts else (0, EXIT_PREEMPTED)


def _describe_end(code: int) -> str:
    if code > 0:
        return f"with exit code {code}"
    why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"by {signal.Signals(-code).name}{why}; the same command continues from a checkpoint"


if __name__ == "__main__":
    sys.exit(main())
