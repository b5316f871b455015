"""Checks that a run's processes fit together, before machines are paid for.

    srun python -m flax_cnns.launch --check
    srun python -m flax_cnns.launch --check -- python -m experiments.train --workdir=... ...

Every process runs the check. Process 0 prints one line for each fact and a summary. The exit code
is 0, or 2 if a fact differs or a check failed; the line names the process. Nothing waits longer
than `SECONDS_VARIABLE` says (60 s). With a command, `flax_cnns.runs.preflight` also checks its
config, its data and one training step.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from flax_cnns.errors import EXIT_USER_ERROR, UserError
from flax_cnns.files import check_local
from flax_cnns.runtime import cluster, launch, output
from flax_cnns.runtime.meeting import Meeting

SECONDS_VARIABLE = "FLAX_CNNS_CHECK_SECONDS"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def read_seconds(environment: Mapping[str, str]) -> float:
    """Returns the timeout of each check. Raises UserError if the variable is not a number."""
    text = environment.get(SECONDS_VARIABLE, "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{SECONDS_VARIABLE}: expected a number of seconds, got {text!r}")
    return seconds


class Preflight:
    """The checks of one process, and what all processes said. Use it as a context manager.

    Raises UserError if a process does not come, or goes away.
    """

    def __init__(self, *, seconds: float):
        self.seconds = seconds
        self.failed: list[str] = []
        self.facts = 0
        self.address, self.count, self.index = find_processes(seconds)
        self.meeting = Meeting(self.address, self.count, self.index, seconds=seconds)
        hosts = self.meeting.exchange({"host": socket.gethostname()})
        self.hosts = [each["host"] for each in hosts]
        where = f" at {self.address}" if self.count > 1 else ""
        self.say("processes", f"{self.count} of {self.count} came{where}: {_join(self.hosts)}")

    def __enter__(self) -> Preflight:
        return self

    def __exit__(self, *_: object) -> None:
        self.meeting.close()

    def name(self, index: int) -> str:
        """Returns "process 1 (on vm2)"."""
        return f"process {index} (on {self.hosts[index]})"

    def say(self, fact: str, text: str, *, good: bool = True) -> None:
        """Prints the line of a fact, on process 0, and counts it."""
        self.facts += 1
        if not good:
            self.failed.append(f"{fact}: {text}")
        if self.index == 0:
            print(f"{'ok' if good else 'FAILED':8}{fact:18}{text}", flush=True)

    def compare(self, facts: Mapping[str, str]) -> None:
        """Compares facts that must be equal on all processes."""
        everyone = self.meeting.exchange(dict(facts))
        for fact in facts:
            values = [each.get(fact) for each in everyone]
            groups: dict[Any, list[int]] = {}
            for index, value in enumerate(values):
                groups.setdefault(value, []).append(index)
            if len(groups) == 1:
                self.say(fact, f"{values[0]}{self._on_all()}")
                continue
            common = max(groups, key=lambda value: len(groups[value]))  # of equals: process 0's
            others = [
                f"{self.name(i)} has {values[i]}" for i in range(self.count) if values[i] != common
            ]
            first = self.name(groups[common][0])
            text = f"{_join(others)}; {first} has {common}"
            self.say(fact, text, good=False)

    def gather(self, fact: str, check: Callable[[], str], *, seconds: float | None = None) -> bool:
        """Runs a check on all processes. Returns whether it passed on all of them.

        `check` returns what to print for success, or raises UserError.
        """
        mine: dict[str, Any]
        try:
            with self._limit(fact, seconds):
                mine = {"text": check()}
        except UserError as error:
            mine = {"error": str(error)}
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            mine = {"error": f"{type(error).__name__}: {first}"}
        limit = self.seconds if seconds is None else seconds
        everyone = self.meeting.exchange(mine, seconds=limit + self.seconds)
        bad = [
            f"{self.name(i)}: {each['error']}" for i, each in enumerate(everyone) if "error" in each
        ]
        if bad:
            self.say(fact, "; ".join(dict.fromkeys(bad)), good=False)
        else:
            texts = [each["text"] for each in everyone]
            same = len(set(texts)) == 1
            self.say(fact, f"{texts[0]}{self._on_all()}" if same else _join(texts))
        return not bad

    def finish(self) -> int:
        """Prints the summary and returns the exit code."""
        sys.stdout.flush()
        if self.failed:
            more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            print(f"error: preflight: {self.failed[0]}{more}", file=sys.stderr, flush=True)
        elif self.index == 0:
            print(f"preflight: all {self.facts} passed", flush=True)
        return EXIT_USER_ERROR if self.failed else 0

    def _on_all(self) -> str:
        return f" on all {self.count}" if self.count > 1 else ""

    @contextlib.contextmanager
    def _limit(self, fact: str, seconds: float | None) -> Iterator[None]:
        """Ends this process with one line if the block takes too long: JAX's calls cannot be
        interrupted."""
        limit = self.seconds if seconds is None else seconds

        def end() -> None:
            text = f"error: {self.name(self.index)}: {fact}: no end after {limit:g} s"
            os.write(2, f"{text}\n".encode())
            os._exit(EXIT_USER_ERROR)

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def find_processes(seconds: float) -> tuple[str, int, int]:
    """Returns (address of process 0, number of processes, index of this one).

    `launch.initialize` will find the same. Raises UserError if the cluster does not say them.
    """
    if given := cluster.read_settings(None, None, None, os.environ):
        return given
    name = cluster.find_cluster(os.environ)
    if name is None:
        return "", 1, 0
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize asks it the same

    # The method is None: JAX asks the cluster's variables, or its metadata server.
    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(seconds)
    )
    if address is None or count is None or index is None:
        raise UserError(
            f"{name} does not say how its processes connect; set the variables"
            f" {cluster.COORDINATOR}, {cluster.NUM_PROCESSES}, {cluster.PROCESS_ID}"
        )
    return address, count, index


def find_versions() -> dict[str, str]:
    """Returns what must be equal on all processes: Python, packages, and the code of flax_cnns."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {**versions, "flax_cnns (code)": digest.hexdigest()[:12]}


# ---- the file system


def check_mount(preflight: Preflight, workdir: str) -> bool:
    """Checks that all processes see the folder of process 0, and that it has locks, renames and
    appends. Returns whether it has. Leaves nothing behind."""
    check_local(workdir, "--workdir", writes=True)
    path = Path(workdir).absolute()
    # The run's directory may not exist yet; then the nearest folder above it is tried.
    base = next(parent for parent in (path, *path.parents) if parent.is_dir())
    folder = Path()
    with contextlib.ExitStack() as stack:

        def write() -> str:
            nonlocal folder
            try:
                folder = Path(tempfile.mkdtemp(prefix=".flax_cnns-preflight-", dir=base))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                (folder / "token").write_text("first")
                (folder / "log").write_text("one\n")
                (folder / "step.tmp").mkdir()
                (folder / "step.tmp" / "array").write_text("saved")
                stack.enter_context(open(folder / "lock", "w"))
            except OSError as error:
                raise UserError(f"cannot write into {base}: {error.strerror}") from None
            return str(folder)

        primary = preflight.index == 0
        mine: dict[str, Any] = {}
        if primary:
            try:
                mine = {"folder": write()}
            except UserError as error:
                mine = {"error": str(error)}
        first = preflight.meeting.exchange(mine)[0]
        if "error" in first:
            preflight.say("workdir", f"{preflight.name(0)}: {first['error']}", good=False)
            return False
        folder = Path(first["folder"])

        def see() -> str:
            _wait(
                lambda: (folder / "token").read_text() == "first",
                preflight.seconds / 2,
                f"does not see the files that process 0 writes into {base}",
            )
            return f"{base} is seen"

        good = preflight.gather("workdir", see)
        held = None
        if primary:
            with contextlib.suppress(OSError):
                held = os.open(folder / "lock", os.O_RDWR)
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                (folder / "token.tmp").write_text("second")
                os.replace(folder / "token.tmp", folder / "token")
                os.rename(folder / "step.tmp", folder / "step")
                with open(folder / "log", "a") as log:
                    log.write("two\n")
        preflight.meeting.exchange({})
        if good:
            good &= preflight.gather("locks", lambda: _check_lock(folder / "lock"))
            good &= preflight.gather(
                "renames", lambda: _check_renames(folder, preflight.seconds / 2)
            )
            good &= preflight.gather(
                "appends", lambda: _check_appends(folder, preflight.seconds / 2)
            )
        if held is not None:
            os.close(held)
    return good


def _wait(ready: Callable[[], bool], seconds: float, problem: str) -> None:
    """Waits until `ready()`, because a network file system may show a change late."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if ready():
                return
        if time.monotonic() > deadline:
            raise UserError(f"{problem} (waited {seconds:g} s)")
        time.sleep(0.05)


def _check_lock(path: Path) -> str:
    try:
        with open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "a lock of process 0 holds"
    except OSError as error:
        raise UserError(f"the file system has no locks ({error.strerror})") from None
    raise UserError("got a lock that process 0 holds, so two runs could write into one directory")


def _check_renames(folder: Path, seconds: float) -> str:
    def ready() -> bool:
        moved = (folder / "step" / "array").read_text() == "saved"
        return moved and (folder / "token").read_text() == "second"

    _wait(ready, seconds, "does not see the file and the folder that process 0 renamed")
    return "a file is replaced and a folder renamed"


def _check_appends(folder: Path, seconds: float) -> str:
    _wait(
        lambda: (folder / "log").read_text() == "one\ntwo\n",
        seconds,
        "does not see the line that process 0 appended",
    )
    return "a line is appended"


# ---- the devices


def check_devices(preflight: Preflight) -> bool:
    """Connects the processes by JAX, and sums a number over all their devices."""

    def connect() -> str:
        launch.initialize(initialization_timeout=max(int(preflight.seconds), 1))
        import jax

        kinds = {device.device_kind for device in jax.local_devices()}
        return f"{jax.local_device_count()} x {', '.join(sorted(kinds))}"

    if not preflight.gather("devices", connect, seconds=preflight.seconds * 2):
        return False

    def add() -> str:
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.asarray(jax.devices()), ("batch",))
        sharding = NamedSharding(mesh, PartitionSpec("batch"))
        ones = jax.make_array_from_callback(
            (mesh.size,), sharding, lambda index: np.ones(1, np.float32)
        )
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
        value = float(total.addressable_shards[0].data)
        if value != mesh.size:
            raise UserError(f"a sum of 1 over {mesh.size} devices gave {value:g}")
        return f"over {mesh.size} devices is right"

    return preflight.gather("sum", add, seconds=preflight.seconds * 2)


def _join(texts: Sequence[str]) -> str:
    """Joins texts with their counts: "a, 3 x b"."""
    counts = {text: texts.count(text) for text in texts}
    return ", ".join(f"{n} x {text}" if n > 1 else text for text, n in counts.items())


def check(workdir: str = "") -> int:
    """Checks the processes without a config. Returns the exit code. Raises UserError."""
    with Preflight(seconds=read_seconds(os.environ)) as preflight:
        preflight.compare(find_versions())
        if workdir:
            check_mount(preflight, workdir)
        if not preflight.failed:  # versions that differ may not connect
            check_devices(preflight)
        return preflight.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check without a command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m flax_cnns.launch --check")
    parser.add_argument("--workdir", default="", help="the folder of the runs to come")
    options = parser.parse_args(arguments)
    with output.safe():
        try:
            code = check(options.workdir)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_USER_ERROR
    launch.exit_if_distributed(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
