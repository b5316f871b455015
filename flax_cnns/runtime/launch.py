"""One process or many: how a process finds the others, and how to start several on one machine.

    python -m flax_cnns.launch --local=2 --devices=2 -- python -m experiments.train --workdir=runs/x

starts two processes of two fake CPU devices each. On a cluster its own launcher starts the
processes (see `experiments/launch/`), and each of them calls `initialize`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flax_cnns.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    UserError,
)
from flax_cnns.runtime import output

# JAX and NumPy are imported where they are used: the launcher itself needs neither.

COORDINATOR = "FLAX_CNNS_COORDINATOR"  # host:port of process 0
NUM_PROCESSES = "FLAX_CNNS_NUM_PROCESSES"
PROCESS_ID = "FLAX_CNNS_PROCESS_ID"
GRACE_SECONDS = 5.0  # for the other processes to end after one has failed


# ---- in every process


def keep_memory() -> bool:
    """Lets the C library keep the memory that this process frees, until it ends.

    XLA takes the scratch memory of a training step anew for every step on a CPU, hundreds of MB
    that the system hands out page by page: with the system's own way a step of MobileNet v2 (16
    images of 96 pixels, 2 cores) took 143 ms, with this 91 ms. To be called before JAX's first
    operation. False where the C library is not glibc, or its settings come by the environment.

    python -m experiments.benchmark vs-torch --block=mobilenet_v2 --batch=16 --size=96 --rounds=9
    and the same with --memory=system
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # <malloc.h>
    # One heap for all threads, no mapping of its own for any block, nothing given back.
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
    """Joins this process to the others, before JAX's first operation; does nothing for one alone.

    Who the others are: the arguments, else the environment (FLAX_CNNS_COORDINATOR=host:port,
    FLAX_CNNS_NUM_PROCESSES, FLAX_CNNS_PROCESS_ID), else what JAX finds out by itself under SLURM,
    Open MPI, on TPU pods and in an indexed Kubernetes job, else nobody. The timeouts, in seconds:
    how long to wait for all to come, until a silent process counts as dead, and how long the first
    to end waits for the last. Raises `UserError` for settings that are incomplete or make no sense.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    timeouts = {
        "initialization_timeout": initialization_timeout,
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "shutdown_timeout_seconds": shutdown_timeout,
    }
    if given := _settings(coordinator, num_processes, process_id, os.environ):
        if given[1] > 1:
            jax.distributed.initialize(*given, cluster_detection_method="deactivate", **timeouts)
    elif find_cluster(os.environ):
        try:
            jax.distributed.initialize(**timeouts)
        except ValueError as error:
            if "should be defined" not in str(error):
                raise
            return  # it looked like a cluster, but not to JAX
    if jax.distributed.is_initialized():
        sys.excepthook = _leave_at_once


def _settings(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> tuple[str, int, int] | None:
    """What is said explicitly; None where nothing is."""
    values = {COORDINATOR: coordinator, NUM_PROCESSES: num_processes, PROCESS_ID: process_id}
    given = {
        name: environment.get(name) or None if value is None else value
        for name, value in values.items()
    }
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) == len(given):
            return None
        raise UserError(f"several processes: {', '.join(missing)} missing; set all three or none")
    address, count, index = given.values()
    try:
        count, index = int(count), int(index)
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count or not re.fullmatch(r".+:\d+", address):
        raise UserError(
            f"several processes: expected {COORDINATOR}=host:port and {PROCESS_ID} from 0 to"
            f" {NUM_PROCESSES} - 1; got {', '.join(f'{k}={v}' for k, v in given.items())}"
        )
    return address, count, index


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """The name of what started this process among others, where JAX should ask it for the rest.

    Stricter than JAX, which joins up with itself in a single task, and fails in a Kubernetes pod
    that is no part of a job.
    """
    several = lambda name: int(environment.get(name) or 1) > 1  # noqa: E731
    slurm = ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")
    if all(f"SLURM_{name}" in environment for name in slurm) and several("SLURM_NTASKS"):
        return "SLURM"
    if several("OMPI_COMM_WORLD_SIZE"):
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return "Open MPI"
        raise UserError(
            f"Open MPI started {environment['OMPI_COMM_WORLD_SIZE']} processes but does not say"
            f" where the first one is (version 5 does not); set {COORDINATOR}, {NUM_PROCESSES} and"
            f" {PROCESS_ID} for each, or use version 4"
        )
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or several("MEGASCALE_NUM_SLICES"):
        return "TPU"
    # A TPU VM's environment says nothing; its metadata server, which JAX asks, does.
    chips = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return "TPU" if chips and importlib.util.find_spec("libtpu") else None


def exit_if_distributed(code: int) -> None:
    """Ends this process at once where there are several; returns where it is alone.

    An ordinary exit waits for the others, who wait for this process inside their step.
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
    """JAX's message, in one line, if JAX failed because another process of this run has died; ""
    for any other error."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return ""
    text = str(error).strip()
    jaxs = isinstance(error, RuntimeError | ValueError) and not isinstance(error, UserError)
    return text.partition("\n")[0] if jaxs and _PEER_LOST.search(text) else ""


_PEER_LOST = re.compile(r"(?i)gloo|nccl|by peer|socket closed|heartbeat|coordination service")


def check_processes_agree(text: str, *, what: str, cure: str) -> None:
    """Raises `UserError`, on every process, where the processes hold different texts.

    `what` the text is about ("the config") and the `cure` go into the message.
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
            f"the hosts disagree about {what}: process {', '.join(map(str, others))} of"
            f" {len(digests)} has another than process 0; {cure}"
        )


# ---- several processes on this machine


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: that of the process that failed first."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m flax_cnns.launch",
        usage="%(prog)s --local=N [--devices=M] -- command ...",
    )
    parser.add_argument("--local", type=int, required=True, help="processes on this machine")
    parser.add_argument(
        "--devices", type=int, help="fake CPU devices of each, for trying things out"
    )
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    if not command:
        parser.error("the command is missing: --local=2 -- python -m experiments.train ...")
    if options.local < 1 or (options.devices is not None and options.devices < 1):
        parser.error("--local and --devices are numbers from 1")
    try:
        return run_local(command, options.local, devices=options.devices)
    except UserError as error:
        with output.safe():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def make_local_environment(
    environment: Mapping[str, str], port: int, count: int, index: int, devices: int | None
) -> dict[str, str]:
    """The environment of process `index` of `count` that meet at a port of this machine."""
    ours = {
        COORDINATOR: f"127.0.0.1:{port}",
        NUM_PROCESSES: str(count),
        PROCESS_ID: str(index),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # not for the network to see
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        flag = "--xla_force_host_platform_device_count"
        others = re.sub(rf"{flag}=\S*", "", environment.get("XLA_FLAGS", ""))
        ours |= {"XLA_FLAGS": f"{others} {flag}={devices}".strip(), "JAX_PLATFORMS": "cpu"}
    return {**environment, **ours}


@output.safe()
def run_local(command: Sequence[str], count: int, *, devices: int | None = None) -> int:
    """Runs `count` processes of a command to their end, each line of output preceded by "[1] ".

    SIGTERM, SIGINT and SIGUSR1 are passed on to all. When one fails, the others have a few seconds
    before they are killed. Its "error: ..." line, or how it ended, is printed again as the last
    line. Returns the exit code of the first that failed (128 + n for signal n); else 130 or 75 if
    one has it; else 0. After SIGINT 130 is no failure. After a second SIGINT all have the same few
    seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[subprocess.Popen] = []
    writing = threading.Lock()
    threads = []
    errors: dict[int, str] = {}  # of each process the first

    def copy(index: int, pipe: TextIO, out: TextIO) -> None:
        for line in pipe:
            if line.startswith("error: "):
                errors.setdefault(index, line.rstrip())
            with writing:
                print(
                    f"[{index}] {line}",
                    end="" if line.endswith("\n") else "\n",
                    file=out,
                    flush=True,
                )

    def send(number: int) -> None:
        for child in children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)

    interrupts: list[float] = []  # times of SIGINT

    def pass_on(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            interrupts.append(time.monotonic())
        send(number)

    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        for index in range(count):
            try:
                child = subprocess.Popen(
                    command,
                    env=make_local_environment(os.environ, port, count, index, devices),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # so that the terminal's Ctrl-C comes once, through us
                )
            except OSError as error:
                raise UserError(f"cannot start {command[0]!r}: {error.strerror}") from None
            children.append(child)
            for pipe, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                threads.append(threading.Thread(target=copy, args=(index, pipe, out), daemon=True))
                threads[-1].start()
        code, first, how = _wait(children, send, writing, interrupts)
    finally:
        send(signal.SIGKILL)
        for child in children:
            child.wait()
        for thread in threads:
            thread.join(timeout=1)  # a grandchild may hold the pipe
        for number, handler in before.items():
            signal.signal(number, handler)
    if count > 1 and first is not None:
        said = f": {errors[first]}" if first in errors else f" failed first, {how}"
        print(f"[launch] process {first}{said}", file=sys.stderr, flush=True)
    return code


def _wait(
    children: Sequence[subprocess.Popen],
    send: Any,
    writing: threading.Lock,
    interrupts: Sequence[float],
) -> tuple[int, int | None, str]:
    """(exit code, which process failed first, how)."""
    running, good, deadline = dict(enumerate(children)), 0, float("inf")
    failed, first, how = 0, None, ""
    while running:
        time.sleep(0.02)
        ended = {index: child.poll() for index, child in running.items()}
        ended = {index: code for index, code in ended.items() if code is not None}
        # One that was killed comes before those that failed because of it.
        for index, code in sorted(ended.items(), key=lambda item: item[1] != -signal.SIGKILL):
            del running[index]
            fine = (0, EXIT_PREEMPTED, EXIT_INTERRUPTED) if interrupts else (0, EXIT_PREEMPTED)
            if code in fine:
                good = max(good, code)
            elif not failed:
                failed, first, how = code if code > 0 else 128 - code, index, _ending(code)
                deadline = time.monotonic() + GRACE_SECONDS
                with writing:
                    # Before the others' coordination service blames whom it likes.
                    print(
                        f"[launch] process {index} failed first, {how}", file=sys.stderr, flush=True
                    )
        if len(interrupts) > 1:
            deadline = min(deadline, interrupts[1] + GRACE_SECONDS)
        if time.monotonic() > deadline:
            send(signal.SIGKILL)
    return failed or good, first, how


def _ending(code: int) -> str:
    if code > 0:
        return f"with exit code {code}"
    why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"by {signal.Signals(-code).name}{why}; the same command goes on from what is saved"


if __name__ == "__main__":
    sys.exit(main())
