"""Reads checkpoints, ours and those of other Orbax users, whole or in part.

Unlike Orbax, this module notices flipped bits. Before it reads, it refuses a checkpoint of another
network, and a checkpoint that declares more than its files can hold.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from flax_cnns.checkpoint.finding import (
    DamagedError,
    crc_of_json,
    explain_damage,
    find_arrays,
    parse_step,
    read_json,
    read_metrics,
)
from flax_cnns.checkpoint.locations import orbax_alias
from flax_cnns.checkpoint.manifest import Manifest, crc32, place_like, shape_and_dtype
from flax_cnns.errors import UserError
from flax_cnns.tree import expand_stack, flatten
from flax_cnns.types import PyTree

Metadata = dict[str, tuple[tuple[int, ...], np.dtype]]
_CHUNK = 1 << 20  # bytes; chunks of at most this size may be larger than their array
MAX_PORTION_BYTES = 1 << 28  # how much a verification reads at once

# Orbax logs the traceback of an error up to five times before it raises the error. The raised error
# is enough.
absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
# asyncio logs the reads that were in progress when the first one failed.
logging.getLogger("asyncio").addFilter(lambda record: "OCDBT" not in record.getMessage())


def drop_late_callbacks() -> None:
    """Silences tracebacks about a closed event loop; the first error is raised anyway.

    If one array of a checkpoint cannot be read or written, Orbax closes its event loop. The threads
    of TensorStore then report the closed loop for each other array, with a traceback. Other
    unraisable errors are reported as before.
    """
    if not isinstance(sys.unraisablehook, _DropLateCallbacks):
        sys.unraisablehook = _DropLateCallbacks(sys.unraisablehook)


class _DropLateCallbacks:
    def __init__(self, previous: Callable[[Any], Any]):
        self.previous = previous

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self.previous(unraisable)


def read_metadata(source: str | os.PathLike) -> Metadata:
    """`{path: (shape, dtype)}` of the leaves in `find_arrays(source)`, without reading an array.

    Raises `DamagedError` if the metadata cannot be read or contradict the manifest.
    """
    path = find_arrays(source)
    stored = {name: shape_and_dtype(leaf) for name, leaf in flatten(_metadata_tree(path)).items()}
    if (manifest := _manifest_of(path)) is not None:
        with explain_damage(path):
            written = {k: (tuple(v["shape"]), v["dtype"]) for k, v in manifest.items()}
        if written != {name: (shape, dtype.name) for name, (shape, dtype) in stored.items()}:
            raise DamagedError(f"{path} is damaged: its leaves differ from its manifest")
    return stored


def has_checksums(source: str | os.PathLike) -> bool:
    """Whether `find_arrays(source)` has our manifest of CRC32s: reading then notices a flipped bit.

    Orbax's own formats have no checksums.
    """
    return _manifest_of(find_arrays(source)) is not None


def read_about(source: str | os.PathLike) -> dict[str, Any]:
    """The `about` that `write_tree` saved with `find_arrays(source)`; {} for other checkpoints."""
    file = find_arrays(source).parent / "about.json"
    return read_json(file) if file.is_file() else {}


def read_leaves(source: str | os.PathLike, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Reads the leaves `paths` of `find_arrays(source)` into host arrays, and no others.

    Raises `DamagedError` if a leaf cannot be read, if its CRC32 differs from the manifest (if there
    is one), or if the arrays are declared larger than the files can hold. Raises KeyError for a
    path that the checkpoint lacks.
    """
    path, wanted = find_arrays(source), set(paths)
    drop_late_callbacks()
    tree = _metadata_tree(path)
    leaves = flatten(tree)
    if missing := wanted - leaves.keys():
        raise KeyError(f"{path} has no {sorted(missing)}")
    if not wanted:
        return {}
    _check_plausible(path, {name: shape_and_dtype(leaves[name]) for name in wanted})
    for name in sorted(wanted):
        _check_chunks(path, name, leaves[name])

    def choose(key_path: tuple, _: Any) -> Any:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return np.zeros(0) if name in wanted else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(choose, tree)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with explain_damage(path), orbax_alias(path) as alias:
        # A Checkpointer would wait for the other processes, which may meet no damage.
        restored = ocp.PyTreeCheckpointHandler().restore(
            alias, args=ocp.args.PyTreeRestore(item=item, restore_args=args)
        )
    leaves = {name: leaf for name, leaf in flatten(restored).items() if name in wanted}
    for name, entry in (_manifest_of(path) or {}).items():
        if name in wanted and crc32(leaves[name]) != entry["crc32"]:
            raise DamagedError(
                f"{path} is damaged: {name} has the CRC32 {crc32(leaves[name]):08x}, expected"
                f" {entry['crc32']:08x}"
            )
    return leaves


def split_into_portions(leaves: Metadata) -> Iterator[list[str]]:
    """Yields groups of paths of at most `MAX_PORTION_BYTES`, so that reading needs little memory.

    A larger leaf is a group of its own.
    """
    group: list[str] = []
    room = MAX_PORTION_BYTES
    for path, leaf in leaves.items():
        size = count_bytes({path: leaf})
        if size > room and group:
            yield group
            group, room = [], MAX_PORTION_BYTES
        group.append(path)
        room -= size
    yield group


def verify_step(step: Path) -> None:
    """Reads a whole step of a run. Raises `DamagedError` if it is not what was written."""
    for group in split_into_portions(read_metadata(step)):
        read_leaves(step, group)
    read_host(step)
    read_metrics(step.parent, int(step.name))


def count_bytes(leaves: Metadata) -> int:
    """How many bytes arrays of these shapes and dtypes take in memory."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves.values())


def count_bytes_on_disk(source: str | os.PathLike) -> int:
    """How many bytes the files in `find_arrays(source)` have."""
    return sum(file.stat().st_size for file in find_arrays(source).rglob("*") if file.is_file())


def _check_plausible(path: Path, leaves: Metadata) -> None:
    """Raises `DamagedError` for arrays that are far larger than the files that hold them.

    Reading would allocate the arrays, and a small file can declare arrays of any size. The margin
    is large because arrays of zeros take no room on disk.
    """
    declared = count_bytes(leaves)
    if declared > 1 << 30 and declared > 1000 * (held := count_bytes_on_disk(path)):
        raise DamagedError(
            f"{path} declares arrays of {declared:,} bytes in files of {held:,} bytes; this"
            " checkpoint is damaged or malicious, and is not read"
        )


def _check_chunks(path: Path, name: str, leaf: Any) -> None:
    """Raises `DamagedError` for chunks that are larger than their array, which Orbax never writes.

    TensorStore allocates whole chunks, and aborts the process if memory runs out.
    """
    shape, dtype = shape_and_dtype(leaf)
    chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None) or ()
    size = math.prod(chunk) * dtype.itemsize
    if size > max(math.prod(shape) * dtype.itemsize, _CHUNK):
        raise DamagedError(
            f"{path} declares chunks of {size:,} bytes for {name}, {dtype}{list(shape)}; this"
            " checkpoint is damaged or malicious, and is not read"
        )


def read_tree(source: str | os.PathLike, target: PyTree, *, exact: bool = False) -> PyTree:
    """Reads a tree like `target` from `find_arrays(source)`.

    `target` has arrays or `ShapeDtypeStruct`s, whose shardings are used, and may have stacks of
    blocks. Only its leaves are read; with `exact` the checkpoint must hold no others. Raises
    `UserError` if names, shapes or dtypes differ, before anything is read, and `DamagedError` for a
    damaged checkpoint.
    """
    path = find_arrays(source)
    wanted: Metadata = {}
    for name, like in flatten(target).items():
        shape, dtype = shape_and_dtype(like)
        names = expand_stack(name)
        wanted |= dict.fromkeys(names, (shape if names == [name] else shape[1:], dtype))
    _check_same(path, wanted, read_metadata(path), exact=exact)
    leaves = read_leaves(path, wanted)

    def whole(name: str) -> np.ndarray:
        names = expand_stack(name)
        return leaves[name] if names == [name] else np.stack([leaves[n] for n in names])

    placed = [place_like(whole(name), like) for name, like in flatten(target).items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def _check_same(path: Path, wanted: Metadata, stored: Metadata, *, exact: bool) -> None:
    show = lambda entry: f"{entry[1]}{list(entry[0])}"  # noqa: E731
    differ = [
        f"{name} is {show(stored[name])} in the checkpoint and {show(wanted[name])} in this run"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    differ += [f"{name} is only in this run" for name in wanted if name not in stored]
    if exact:
        differ += [f"{name} is only in the checkpoint" for name in stored if name not in wanted]
    if differ:
        more = f", … ({len(differ)} differ)" if len(differ) > 3 else ""
        raise UserError(
            f"the checkpoint {path} belongs to another network or optimizer:"
            f" {', '.join(differ[:3])}{more}; use the config of the checkpoint, another"
            " --workdir, or config.graft to load a part"
        )


def _metadata_tree(path: Path) -> PyTree:
    with explain_damage(path), orbax_alias(path) as alias:
        return ocp.PyTreeCheckpointHandler().metadata(alias).tree


def _manifest_of(path: Path) -> Manifest | None:
    """The manifest of a checkpoint; None for a checkpoint that other software wrote."""
    file = path.parent / "manifest" / "metadata"
    if path.name != "state" or not (file.exists() or (path.parent / "host").exists()):
        return None
    manifest = _manifest_json(path.parent)
    with explain_damage(path):
        return {k: dict(v, crc32=int(v["crc32"])) for k, v in manifest["leaves"].items()}


def _manifest_json(step: Path) -> dict:
    """The JSON of a step's manifest. Raises `DamagedError` if the folder names another step."""
    manifest, named = read_json(step / "manifest" / "metadata"), parse_step(step.name)
    if named is not None and (saved := manifest.get("step", named)) != named:
        raise DamagedError(
            f"{step} was saved as step {saved} and then renamed; rename it to {saved}"
        )
    return manifest


def read_host(step: Path) -> dict:
    """The host JSON of a step. Raises `DamagedError` if it is not what was written."""
    host = read_json(step / "host" / "metadata")
    if crc_of_json(host) != _manifest_json(step).get("host_crc32"):
        raise DamagedError(f"{step / 'host'} is damaged: its CRC32 differs from the manifest")
    return host
