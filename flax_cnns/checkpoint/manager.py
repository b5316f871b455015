"""Checkpoints through Orbax's `CheckpointManager`; the only module that knows Orbax.

On disk: `<run>/checkpoints/<step>/` with the items `state` (the arrays), `host` (JSON:
counters), `manifest` (JSON: shape, dtype and CRC32 of every leaf) and `metrics` (JSON).
Stacks of blocks (`pytree.stack_blocks`) are written block by block, under their names, and read
back from there: a checkpoint does not show whether its run had `model.scan`.
What Orbax does not do and this does: notice flipped bits, pass over a damaged step, keep NaN from
being the best, refuse a checkpoint of another network before it is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from flax_cnns.checkpoint.manifest import (
    Manifest,
    crc32,
    make_manifest,
    place,
    shape_and_dtype,
    to_host,
)
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.pytree import flatten, members, unstack_blocks
from flax_cnns.types import PyTree

# Orbax logs the traceback of every error up to five times before it raises it; what matters is
# raised.
absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
# Likewise the reads that were under way when the first one failed.
logging.getLogger("asyncio").addFilter(lambda record: "OCDBT" not in record.getMessage())


def _drop_late_callbacks() -> None:
    """Where one array of a checkpoint cannot be read or written, Orbax closes its event loop, and
    TensorStore's threads report the closed loop for every other array, a traceback each. What
    matters is raised; these are dropped, and all else goes where it went."""
    before = sys.unraisablehook
    if getattr(before, "drops_late_callbacks", False):
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    hook.drops_late_callbacks = True
    sys.unraisablehook = hook


Metadata = dict[str, tuple[tuple[int, ...], np.dtype]]


BEST_BY = "validation/accuracy"


class DamagedError(UserError):
    """A checkpoint that cannot be what was written."""


# ---- finding: nothing here creates or changes anything


def steps(run: str | os.PathLike) -> list[int]:
    """The steps that are whole on disk, ascending, of a run directory or of its `checkpoints`
    folder.
    """
    directory = _checkpoints_of(run)
    if not directory.is_dir():
        return []
    # An unfinished save has another name until it is complete (`120.orbax-checkpoint-tmp`).
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def latest_step(run: str | os.PathLike) -> int | None:
    """The newest step on disk, or None."""
    return max(steps(run), default=None)


def best_step(run: str | os.PathLike) -> int | None:
    """The step with the best metric, the newest of equals; the latest step where none has a
    (finite) metric.
    """
    scores = {step: read_metrics(run, step).get("score") for step in steps(run)}
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else latest_step(run)


def read_metrics(run: str | os.PathLike, step: int) -> dict[str, float]:
    """The metrics saved with a step; {} where there are none or they are damaged."""
    try:
        return _read_json(_checkpoints_of(run) / str(step) / "metrics" / "metrics")
    except DamagedError:
        return {}


def resolve(source: str | os.PathLike) -> Path:
    """The folder of arrays that is meant by RUN, RUN@best, RUN@latest, RUN@1200, or an Orbax
    checkpoint's path.

    RUN alone means RUN@best, which is RUN@latest for a run that validated nothing. Raises
    `UserError` where there is no such run or step; it names those there are.
    """
    text, at, which = os.fspath(source).rpartition("@")
    if not at or Path(source).exists() or "/" in which:
        text, which = os.fspath(source), ""
    path = Path(os.path.abspath(text))
    if not path.is_dir():
        parent = path.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise UserError(f"there is no checkpoint or run {text!r}{did_you_mean(path.name, near)}")
    if unfinished := [name for name in path.parts if ".orbax-checkpoint-tmp" in name]:
        raise UserError(f"{text} is no whole checkpoint: saving {unfinished[0]} was never finished")
    if known := steps(path):
        named = {"": best_step, "best": best_step, "latest": latest_step}
        step = named[which](path) if which in named else int(which) if which.isdigit() else which
        if step not in known:
            raise UserError(
                f"{text} has no checkpoint {which!r}; it has best, latest,"
                f" {', '.join(map(str, known))}"
            )
        path = _checkpoints_of(path) / str(step)
    elif which:
        raise UserError(f"{text} has no checkpoint {which!r}: it is no run with checkpoints")
    if (path / "_METADATA").is_file():
        return path
    items = sorted(p.name for p in path.iterdir() if (p / "_METADATA").is_file())
    for name in ("state", "default", *(items if len(items) == 1 else ())):
        if name in items:
            return path / name
    if items:
        raise UserError(f"{path} holds {', '.join(items)}: name one of these folders")
    if known:
        raise DamagedError(f"{path} is damaged: it holds no arrays")
    raise UserError(f"{text} holds no checkpoint (yet): neither a run's nor an Orbax one")


def _checkpoints_of(run: str | os.PathLike) -> Path:
    path = Path(os.path.abspath(run))
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


# ---- reading


def read_metadata(source: str | os.PathLike) -> Metadata:
    """`{path: (shape, dtype)}` of what `resolve(source)` holds, without reading an array.

    Raises `DamagedError` where it cannot be read or contradicts the manifest.
    """
    path = resolve(source)
    stored = {name: shape_and_dtype(leaf) for name, leaf in flatten(_metadata_tree(path)).items()}
    if (manifest := _manifest_of(path)) is not None:
        with _damage(path):
            written = {k: (tuple(v["shape"]), v["dtype"]) for k, v in manifest.items()}
        if written != {name: (shape, dtype.name) for name, (shape, dtype) in stored.items()}:
            raise DamagedError(f"{path} is damaged: its leaves are not those of its manifest")
    return stored


def has_checksums(source: str | os.PathLike) -> bool:
    """Whether reading what `resolve(source)` holds notices a flipped bit: where it has our manifest
    of CRCs. Orbax's own formats do not.
    """
    return _manifest_of(resolve(source)) is not None


def read_about(source: str | os.PathLike) -> dict[str, Any]:
    """What `write_tree` was told about `resolve(source)`; {} for other checkpoints."""
    file = resolve(source).parent / "about.json"
    return _read_json(file) if file.is_file() else {}


def read_leaves(source: str | os.PathLike, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Reads these leaves, and only these, of what `resolve(source)` holds as host arrays.

    Raises `DamagedError` where a leaf cannot be read, its CRC32 is not that of the manifest (where
    there is one), or the arrays are declared so large that the files cannot hold them. A path that
    is not there is a KeyError.
    """
    path, wanted = resolve(source), set(paths)
    _drop_late_callbacks()
    tree = _metadata_tree(path)
    leaves = flatten(tree)
    if missing := wanted - leaves.keys():
        raise KeyError(f"{path} has no {sorted(missing)}")
    if not wanted:
        return {}
    _check_plausible(path, {name: shape_and_dtype(leaves[name]) for name in wanted})

    def choose(key_path: tuple, _: Any) -> Any:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return np.zeros(0) if name in wanted else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(choose, tree)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with _damage(path):
        # The handler by itself: a Checkpointer would wait for the other processes, and damage may
        # strike just one.
        restored = ocp.PyTreeCheckpointHandler().restore(
            epath.Path(path), args=ocp.args.PyTreeRestore(item=item, restore_args=args)
        )
    leaves = {name: leaf for name, leaf in flatten(restored).items() if name in wanted}
    for name, entry in (_manifest_of(path) or {}).items():
        if name in wanted and crc32(leaves[name]) != entry["crc32"]:
            raise DamagedError(
                f"{path} is damaged: {name} has the CRC32 {crc32(leaves[name]):08x},"
                f" {entry['crc32']:08x} was written"
            )
    return leaves


def bytes_of(leaves: Metadata) -> int:
    """The bytes of arrays of these shapes and dtypes in memory."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in leaves.values())


def bytes_on_disk(source: str | os.PathLike) -> int:
    """The bytes of the files of what `resolve(source)` holds."""
    return sum(file.stat().st_size for file in resolve(source).rglob("*") if file.is_file())


def _check_plausible(path: Path, leaves: Metadata) -> None:
    """A file of a kilobyte can declare arrays of any size, which reading would allocate. Arrays
    that are all zeros take no room on disk, hence the margin."""
    declared = bytes_of(leaves)
    if declared > 1 << 30 and declared > 1000 * (held := bytes_on_disk(path)):
        raise DamagedError(
            f"{path} declares arrays of {declared:,} bytes in files of {held:,} bytes: that is a"
            " damaged or a hostile checkpoint, and it is not read"
        )


def read_tree(source: str | os.PathLike, target: PyTree, *, exact: bool = False) -> PyTree:
    """Reads a tree like `target` (arrays or `ShapeDtypeStruct`s, which give the shardings) from
    `resolve(source)`.

    Only the target's leaves are read; with `exact` the checkpoint must hold no others. The target
    may have stacks of blocks. Raises `UserError` where names, shapes or dtypes differ (looked at
    before anything is read), `DamagedError` for a damaged checkpoint.
    """
    path = resolve(source)
    wanted: Metadata = {}
    for name, like in flatten(target).items():
        shape, dtype = shape_and_dtype(like)
        names = members(name)
        wanted |= dict.fromkeys(names, (shape if names == [name] else shape[1:], dtype))
    _check_same(path, wanted, read_metadata(path), exact=exact)
    leaves = read_leaves(path, wanted)

    def whole(name: str) -> np.ndarray:
        names = members(name)
        return leaves[name] if names == [name] else np.stack([leaves[n] for n in names])

    placed = [place(whole(name), like) for name, like in flatten(target).items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def _check_same(path: Path, wanted: Metadata, stored: Metadata, *, exact: bool) -> None:
    show = lambda entry: f"{entry[1]}{list(entry[0])}"  # noqa: E731
    differ = [
        f"{name} is {show(stored[name])} there and {show(wanted[name])} here"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    differ += [f"{name} is only here" for name in wanted if name not in stored]
    if exact:
        differ += [f"{name} is only there" for name in stored if name not in wanted]
    if differ:
        more = f", … ({len(differ)} differ)" if len(differ) > 3 else ""
        raise UserError(
            f"the checkpoint {path} is of another network or optimizer:"
            f" {', '.join(differ[:3])}{more}; use the config it was made with, another --workdir,"
            " or config.graft to take a part"
        )


def _metadata_tree(path: Path) -> PyTree:
    with _damage(path):
        return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree


def _manifest_of(path: Path) -> Manifest | None:
    """None for a checkpoint that was made elsewhere."""
    file = path.parent / "manifest" / "metadata"
    if path.name != "state" or not (file.exists() or (path.parent / "host").exists()):
        return None
    manifest = _read_json(file)
    with _damage(path):
        return {k: dict(v, crc32=int(v["crc32"])) for k, v in manifest["leaves"].items()}


def _crc_of_json(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _read_host(step: Path) -> dict:
    """The host JSON of a step; raises `DamagedError` where it is not what was written."""
    host = _read_json(step / "host" / "metadata")
    if _crc_of_json(host) != _read_json(step / "manifest" / "metadata").get("host_crc32"):
        raise DamagedError(f"{step / 'host'} is damaged: its CRC32 is not that of the manifest")
    return host


def _read_json(file: Path) -> dict:
    with _damage(file):
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value


@contextlib.contextmanager
def _damage(path: Path):
    """Makes a `DamagedError` of what reading raises, unless it says nothing about the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        text = str(error).partition("\n")[0]
        if (isinstance(error, OSError) and not missing) or "ermission denied" in text:
            raise UserError(f"cannot read {path}: {text}") from error
        raise DamagedError(f"{path} is damaged: {type(error).__name__}: {text[:200]}") from error


# ---- writing


def new_folder(folder: str | os.PathLike) -> Path:
    """The absolute path of a folder to be written. Raises `UserError` where it exists already."""
    path = Path(os.path.abspath(folder))
    if path.exists():
        raise UserError(f"{path} exists already; name a folder that does not")
    return path


def write_tree(folder: str | os.PathLike, tree: PyTree, about: Mapping[str, Any]) -> Path:
    """Writes a tree of host arrays as a checkpoint of no run, which `resolve(folder)` finds.

    It has a manifest as a run's has, and `about` (JSON-able) as `about.json`. The folder, which is
    returned, appears when it is whole. Raises `UserError` where it exists already or cannot be
    written.
    """
    folder = new_folder(folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    with _writing(folder.parent):
        try:
            try:
                (partial / "manifest").mkdir(parents=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
            ocp.PyTreeCheckpointer().save(partial / "state", tree)
            manifest = {"format": 1, "leaves": make_manifest(flatten(tree))}
            (partial / "manifest" / "metadata").write_text(json.dumps(manifest))
            (partial / "about.json").write_text(json.dumps(about, indent=1) + "\n")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax asks JAX's preemption service from its own thread, about a step that lies behind,
        # which can move the step at which the processes agree to stop. The training loop is the one
        # that asks.
        return False


class Checkpoints:
    """The checkpoints of one run, in `directory` (`<run>/checkpoints`), saved in the background.

    Keeps the newest `keep_latest` steps and the `keep_best` best by validation accuracy. Every
    process of a run makes one and calls the same methods with the same arguments; the caller holds
    the run's lock. A context manager: leaving it waits for the last save, and raises what that
    raised. `report` gets one line for each damaged checkpoint.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        report: Callable[[str], None] | None = None,
    ):
        if keep_latest < 1 or keep_best < 0:
            raise UserError(
                "checkpoints: keep_latest is at least 1 and keep_best at least 0;"
                f" got {keep_latest} and {keep_best}"
            )
        self.directory = Path(os.path.abspath(directory))
        self._report = report or (lambda line: print(line, file=sys.stderr))
        _drop_late_callbacks()
        self._manager: _Manager | None = None
        self._replaced = self.directory.with_name(f"{self.directory.name}.replaced")
        self._put_back()
        for step in steps(self.directory):  # Orbax stumbles over damaged metrics as it starts
            file, problem = self.directory / str(step) / "metrics" / "metrics", ""
            try:
                if file.exists() and not isinstance(_read_json(file).get("score"), float):
                    problem = f"{file} holds no score"
            except DamagedError as error:
                problem = str(error)
            self._skip_damaged(step, problem)
        policies = ocp.checkpoint_managers
        score = lambda metrics: metrics["score"]  # noqa: E731
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_latest),
                    policies.BestN(
                        get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            best_fn=score,  # without it Orbax does not write the metrics down
            cleanup_tmp_directories=True,  # what kill -9 left of a save
        )
        with _writing(self.directory):
            self._manager = _Manager(
                self.directory, options=options, item_names=("state", "host", "manifest")
            )

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        host: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copies the state to the host and returns; the files are written in the background.

        `state`: any pytree of replicated global arrays (or NumPy). `host`: JSON-able. `metrics`:
        without a finite number under `BEST_BY` the step is never the best. Saving
        the newest step again replaces it, and kill -9 at any moment leaves one of the two. Raises
        `UserError` where the disk is full or not writable, now or about the save before.
        """
        leaves = flatten(state)
        for leaf in leaves.values():
            if isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(
                leaf.dtype, jax.dtypes.prng_key
            ):
                leaf.addressable_data(0).copy_to_host_async()  # all of them at once
        arrays = [to_host(leaf) for leaf in leaves.values()]
        named = unstack_blocks(jax.tree.unflatten(jax.tree.structure(state), arrays))
        manifest = make_manifest(flatten(named))
        if (latest := self._manager.latest_step()) is not None and step < latest:
            raise RuntimeError(f"{self.directory} has step {latest}, which is after {step}")
        again = step == latest
        if again:
            self.wait()
            self._set_aside(step)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        value = metrics.get(BEST_BY, math.nan)
        scored = {**metrics, "score": value} if math.isfinite(value) else None
        with _writing(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(named),
                    host=ocp.args.JsonSave(dict(host)),
                    manifest=ocp.args.JsonSave(
                        {"format": 1, "leaves": manifest, "host_crc32": _crc_of_json(host)}
                    ),
                ),
                metrics=scored,
                force=True,  # when to save is the caller's decision
            )
        if again:
            self.wait()
            self._put_back()

    def restore(
        self, target: PyTree, step: int | None = None
    ) -> tuple[PyTree, dict[str, Any], int] | None:
        """`(state, host, step)` of the newest intact step, or of `step`; None where there is none.

        `target`: a pytree of arrays or of `ShapeDtypeStruct`s; what comes back has its dtypes and
        shardings, on whatever devices. A damaged step is reported and moved to
        `checkpoints.damaged/` beside the directory, and the one before is tried. Raises `UserError`
        for a checkpoint of another network, and where a `step` asked for is damaged or missing.
        """
        self.wait()
        known = steps(self.directory)
        if step is not None and step not in known:
            raise UserError(
                f"{self.directory} has no step {step};"
                f" it has {', '.join(map(str, known)) or 'none'}"
            )
        for candidate in [step] if step is not None else known[::-1]:
            path, problem = self.directory / str(candidate), None
            try:
                if not (path / "state" / "_METADATA").is_file():
                    raise DamagedError(f"{path} is damaged: its arrays are missing")
                state = read_tree(path / "state", target, exact=True)
                host = _read_host(path)
            except UserError as error:
                problem = error
            mendable = problem is None or (step is None and isinstance(problem, DamagedError))
            if _anywhere(not mendable):
                raise problem or UserError(f"another process cannot read {path}")
            if not self._skip_damaged(candidate, str(problem or "")):
                return state, host, candidate
        if known:
            self._report(f"no intact checkpoint is left in {self.directory}: starting at step 0")
        return None

    def steps(self) -> list[int]:
        """The steps that are whole on disk, ascending."""
        return steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest step on disk, or None."""
        return latest_step(self.directory)

    def best_step(self) -> int | None:
        """The best step on disk; the latest where none has a finite metric; None where there is no
        step.
        """
        return best_step(self.directory)

    def wait(self) -> None:
        """Waits for the save that is under way; raises `UserError` where it found the disk full or
        not writable.
        """
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and closes; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self.close()
        except Exception as problem:
            if error is None:
                raise
            self._report(str(problem))  # and what was under way goes on being raised

    def _set_aside(self, step: int) -> None:
        """Puts a step that is saved again where `_put_back` finds it, should this process die."""
        if jax.process_index() == 0:
            with _writing(self._replaced):
                self._replaced.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(self._replaced / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def _put_back(self) -> None:
        """Ends what `_set_aside` began: the new step counts if it is whole, the old one if not."""
        if jax.process_index() == 0 and self._replaced.is_dir():
            with _writing(self._replaced):
                for old in self._replaced.iterdir():
                    if (self.directory / old.name).exists():
                        shutil.rmtree(old)
                    else:
                        old.rename(self.directory / old.name)
                self._replaced.rmdir()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("put back")

    def _skip_damaged(self, step: int, problem: str) -> bool:
        """Whether some process has a problem with the step, which is then moved aside."""
        if not _anywhere(bool(problem)):
            return False
        problem = problem or "another process cannot read it"
        if jax.process_index() == 0:
            aside = self.directory.parent / f"{self.directory.name}.damaged"
            with _writing(aside):
                aside.mkdir(parents=True, exist_ok=True)
                name, n = str(step), 0
                while (aside / name).exists():
                    name, n = f"{step}.{n + 1}", n + 1
                (self.directory / str(step)).rename(aside / name)
            self._report(f"skipping checkpoint {step}, moved to {aside / name}: {problem}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moved checkpoint {step} aside")
        if self._manager is not None:
            self._manager.reload()
        return True


def _anywhere(holds: bool) -> bool:
    """Whether it holds on some process: what one raises alone, the others wait for."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.array(holds)).any())


_CANNOT_WRITE = (
    "No space left on device",
    "Disk quota exceeded",
    "Permission denied",
    "Read-only file system",
)


@contextlib.contextmanager
def _writing(directory: Path):
    """Makes one line of what a full or unwritable disk raises, from wherever Orbax raises it."""
    try:
        yield
    except Exception as error:
        for reason in _CANNOT_WRITE:
            if reason in str(error):
                raise UserError(
                    f"cannot write a checkpoint into {directory}: {reason.lower()};"
                    " what was saved before is whole: mend that and start the same command again"
                ) from error
        raise
