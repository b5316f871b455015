"""Runs a step on all devices: `parallelize` maps it, `shard_batch` and `replicate` feed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
    axes: Mapping[str, int | None] | int = 0,
) -> Callable:
    """Maps `step(state, batch, key)` over all devices.

    State and key are replicated, and the batch is split. The mapped step takes a batch from
    `shard_batch(batch, mesh, mode)`, [N ...] or for pmap [devices N/devices ...], and a state from
    `replicate(state, mesh)`. `donate` donates the state's buffers; set False for evaluation.
    `axes`: which axis of the batch's arrays is split, one for all or by name; None: replicated.
    """
    donated = (0,) if donate else ()
    if mode == "pmap":
        mapped = jax.pmap(
            step,
            axis_name,
            # Split arrays have a first axis of devices, whichever axis it was taken from.
            in_axes=(
                None,
                jax.tree.map(lambda axis: None if axis is None else 0, axes, is_leaf=_is_none),
                None,
            ),
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
        step,
        mesh=mesh,
        in_specs=(P(), jax.tree.map(partial(_make_spec, axis_name), axes, is_leaf=_is_none), P()),
        out_specs=P(),
        check_vma=False,
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


def _is_none(x: Any) -> bool:
    return x is None


def _make_spec(axis_name: str, axis: int | None) -> P:
    """Returns the specification of an array that is split along an axis; None: replicated."""
    return P() if axis is None else P(*[None] * axis, axis_name)


def shard_batch(batch: Batch, mesh: Mesh, mode: str = "shard_map", axis: int = 0) -> Batch:
    """Makes the global batch [N ...] from this process's rows [n ...].

    For pmap, makes [devices n/devices ...]. `axis`: that of the rows, if it is not the first.
    Returns while the copies to the devices are still in progress.
    """
    name = mesh.axis_names[0]
    if mode == "pmap":
        mine = np.asarray(local_devices(mesh))
        sharding = NamedSharding(Mesh(mine, mesh.axis_names), P(name))
        pieces = {
            k: np.moveaxis(v.reshape(*v.shape[:axis], mine.size, -1, *v.shape[axis + 1 :]), axis, 0)
            for k, v in batch.items()
        }
        return jax.device_put(pieces, sharding)
    sharding = NamedSharding(mesh, _make_spec(name, axis))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def describe_batch(
    arrays: Mapping[str, tuple[tuple[int, ...], Any]],
    size: int,
    mesh: Mesh,
    mode: str = "shard_map",
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the global batch of `size` examples that `shard_batch` would make.

    arrays: for each array its shape without the axis of examples, and its dtype.
    """
    first: tuple[int, ...] = (size,)
    if mode == "pmap":
        mine = np.asarray(local_devices(mesh))
        first, mesh = (mine.size, size // mesh.devices.size), Mesh(mine, mesh.axis_names)
    sharding = NamedSharding(mesh, P(mesh.axis_names[0]))
    return {
        name: jax.ShapeDtypeStruct((*first, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in arrays.items()
    }
