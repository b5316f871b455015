"""Reads from the environment which process of a run this is, and how the processes connect."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from flax_cnns.errors import UserError

COORDINATOR = "FLAX_CNNS_COORDINATOR"  # host:port of process 0
NUM_PROCESSES = "FLAX_CNNS_NUM_PROCESSES"
PROCESS_ID = "FLAX_CNNS_PROCESS_ID"
# The same numbers as the launchers of clusters give them.
_INDICES = (
    *(PROCESS_ID, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"),
    *("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "SKYPILOT_NODE_RANK"),
)


def read_settings(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> tuple[str, int, int] | None:
    """Returns (address, number of processes, index); None if none of them is set explicitly."""
    values = {COORDINATOR: coordinator, NUM_PROCESSES: num_processes, PROCESS_ID: process_id}
    given: dict[str, str | int | None] = {
        name: environment.get(name) or None if value is None else value
        for name, value in values.items()
    }
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) == len(given):
            return None
        raise UserError(f"several processes: {', '.join(missing)} missing; set all three or none")
    address, *numbers = map(str, given.values())
    try:
        count, index = map(int, numbers)
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count or not re.fullmatch(r".+:\d+", address):
        raise UserError(
            f"several processes: expected {COORDINATOR}=host:port and {PROCESS_ID} from 0 to"
            f" {NUM_PROCESSES} - 1; got {', '.join(f'{k}={v}' for k, v in given.items())}"
        )
    return address, count, index


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """Returns the name of the cluster system whose processes JAX can connect, or None.

    This is stricter than JAX's own detection. JAX's also connects a single task to itself, and
    fails in a Kubernetes pod that does not belong to a job. Raises `UserError` for Open MPI 5.
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
            f" {PROCESS_ID} for each process, or use version 4"
        )
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    if _names_tpu_hosts(environment):
        return "TPU"
    # A TPU VM has no such variables. JAX asks its metadata server instead.
    chips = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return "TPU" if chips and importlib.util.find_spec("libtpu") else None


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several, as far as the environment says.

    JAX is not asked, as it would open the devices. A TPU VM without the variables of a pod does not
    say it; `jax.process_count()` knows.
    """
    if environment.get(COORDINATOR):
        return environment.get(NUM_PROCESSES, "") != "1"
    cluster = find_cluster(environment)
    return _names_tpu_hosts(environment) if cluster == "TPU" else cluster is not None


def _names_tpu_hosts(environment: Mapping[str, str]) -> bool:
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1


def find_host_name(environment: Mapping[str, str]) -> str:
    """Returns "host3" for the run's process 3; this machine's name if its index is unknown."""
    for name in _INDICES:
        if (value := environment.get(name, "")).isdecimal():
            return f"host{value}"
    return socket.gethostname()
