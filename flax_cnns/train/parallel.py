"""Runs a step on all devices: `parallelize` maps it, `shard_batch` and `replicate` feed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_cnns.errors import UserError
from flax_cnns.types import Batch, PyTree


def make_mesh(devices: list[Any] | None = None, *, axis_name: str = "batch") -> Mesh:
    """Makes a mesh with one axis over the devices of all processes, ordered by process."""
    devices = jax.devices() if devices is None else devices
    # A process feeds one contiguous slice of the global batch, so its devices must be adjacent.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (axis_name,))


def find_platform() -> str:
    """Returns the platform that the program which JAX is tracing will run on: cpu, gpu or tpu.

    In a step that `parallelize` maps, this is the platform of the mesh's devices, which may be
    another than this machine's (runtime/topologies.py). Elsewhere, it is JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].platform if device is None else device.platform


def is_on_this_machine(mesh: Mesh) -> bool:
    """Whether this machine has the devices of the mesh; False for compile-only devices."""
    return set(mesh.devices.flat) <= set(jax.devices())


def local_devices(mesh: Mesh) -> list[Any]:
    """Returns the devices of the mesh that belong to this process."""
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def parallelize(
    step: Callable,
    mesh: Mesh,
    *,
    axis_name: str = "batch",
    mode: str = "shard_map",
    donate: bool = True,
) -> Callable:
    """Maps `step(state, batch, key)` over all devices.

    State and key are replicated, and the batch is split. The mapped step takes a batch from
    `shard_batch(batch, mesh, mode)`, [N ...] or for pmap [devices N/devices ...], and a state from
    `replicate(state, mesh)`. `donate` donates the state's buffers; set False for evaluation.
    """
    donated = (0,) if donate else ()
    if mode == "pmap":
        mapped = jax.pmap(
            step,
            axis_name,
            in_axes=(None, 0, None),
            out_axes=None,
            devices=list(mesh.devices.flat),
            donate_argnums=donated,
        )
        if jax.process_count() == 1:
            return mapped
        # With several processes, pmap returns host-local arrays, which can neither be donated to
        # the next call nor saved. This makes them global again, without a copy.
        return lambda state, batch, key: replicate(mapped(state, batch, key), mesh)
    step = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(axis_name), P()), out_specs=P(), check_vma=False
    )  # check_vma=False, as in pmap: the step itself averages over the devices by pmean
    return jax.jit(step, donate_argnums=donated)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts the same values on every device, as global arrays without a device axis."""
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return multihost_utils.host_local_array_to_global_array(tree, mesh, P())


def check_batch(size: int, mesh: Mesh, *, what: str) -> None:
    """Raises `UserError` unless `size` is divisible by the number of devices of the mesh."""
    devices = mesh.devices.size
    if size % devices:
        near = [max(size // devices, 1) * devices, -(-size // devices) * devices]
        raise UserError(
            f"{what}: {size} examples cannot be split evenly over {devices} devices; "
            f"choose {' or '.join(str(n) for n in sorted(set(near)))}"
        )


def shard_batch(batch: Batch, mesh: Mesh, mode: str = "shard_map") -> Batch:
    """Makes the global batch [N ...] from this process's rows [n ...].

    For pmap, makes [devices n/devices ...]. Returns while the copies to the devices are still in
    progress.
    """
    axis = P(mesh.axis_names[0])
    if mode == "pmap":
        mine = np.asarray(local_devices(mesh))
        sharding = NamedSharding(Mesh(mine, mesh.axis_names), axis)
        pieces = {k: v.reshape(mine.size, -1, *v.shape[1:]) for k, v in batch.items()}
        return jax.device_put(pieces, sharding)
    sharding = NamedSharding(mesh, axis)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
