"""Writes checkpoints with Orbax's `CheckpointManager`, and restores them.

On disk a checkpoint is `<run>/checkpoints/<step>/` with the items `state` (the arrays), `host`
(JSON: counters), `manifest` (JSON: shape, dtype and CRC32 of each leaf) and `metrics` (JSON).
Stacks of blocks (`tree.stack_blocks`) are written and read block by block under their names, so a
checkpoint does not depend on `model.scan`. Unlike Orbax, this module skips a damaged step, and
never lets a step with a metric of NaN be the best.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_cnns.checkpoint import finding, reading
from flax_cnns.checkpoint.finding import DamagedError, crc_of_json, crc_of_metrics
from flax_cnns.checkpoint.locations import check_location, orbax_alias
from flax_cnns.checkpoint.manifest import make_manifest, to_host
from flax_cnns.checkpoint.reading import drop_late_callbacks, read_host, read_tree
from flax_cnns.errors import UserError
from flax_cnns.tree import flatten, unstack_blocks
from flax_cnns.types import PyTree

BEST_BY = "validation/accuracy"


def check_new_folder(folder: str | os.PathLike) -> Path:
    """The absolute path of `folder`; `UserError` if it exists or cannot hold checkpoints."""
    check_location(folder, "--out")
    path = Path(os.path.abspath(folder))
    if path.exists():
        raise UserError(f"{path} exists already; name a folder that does not exist")
    return path


def write_tree(folder: str | os.PathLike, tree: PyTree, about: Mapping[str, Any]) -> Path:
    """Writes a tree of host arrays as a checkpoint outside a run; returns its folder.

    `find_arrays(folder)` finds the checkpoint. It has a manifest, and `about` (for JSON) as
    `about.json`. The folder appears only when it is complete. Raises `UserError` if the folder
    exists already or cannot be written.
    """
    folder = check_new_folder(folder)
    partial = folder.with_name(f"{folder.name[:50]}.{os.getpid()}.partial")
    with _writing(folder.parent):
        try:
            try:
                (partial / "manifest").mkdir(parents=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
            with orbax_alias(partial / "state") as alias:
                ocp.PyTreeCheckpointer().save(alias, tree)
            manifest = {"format": 1, "leaves": make_manifest(flatten(tree))}
            _write_json(partial / "manifest" / "metadata", manifest)
            _write_json(partial / "about.json", about)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax would ask JAX's preemption service from its own thread, about a past step. That can
        # change the step at which the processes agree to stop. Only the training loop asks.
        return False


class Checkpoints:
    """The checkpoints of one run, in `directory` (`<run>/checkpoints`), saved in the background.

    Keeps the `keep_latest` newest steps, and the `keep_best` steps with the best metric `best_by`:
    the highest, or with `best_mode="min"` the lowest. Each process of a run makes a `Checkpoints`
    and calls the same methods with the same arguments; the caller holds the lock of the run. As a
    context manager it waits for the last save at the end, and raises the errors of that save.
    `report` is called with one line for each damaged checkpoint.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        best_by: str = BEST_BY,
        best_mode: str = "max",
        report: Callable[[str], None] | None = None,
    ):
        if keep_latest < 1 or keep_best < 0:
            raise UserError(
                "checkpoints: expected keep_latest of at least 1 and keep_best of at least 0, got"
                f" {keep_latest} and {keep_best}"
            )
        self.directory = Path(os.path.abspath(directory))
        if best_mode not in ("max", "min"):
            raise UserError(f"checkpoints: expected best_mode 'max' or 'min', got {best_mode!r}")
        self._best_by, self._sign = best_by, 1.0 if best_mode == "max" else -1.0
        self._report = report or (lambda line: print(line, file=sys.stderr))
        drop_late_callbacks()
        self._opened: _Manager | None = None
        self._replaced = self.directory.with_name(f"{self.directory.name}.replaced")
        self._is_readable = False  # whether this process has read a step of this directory
        self._put_back()
        self._check_directory()
        # Damaged metrics would stop Orbax when it starts.
        for step in finding.all_steps(self.directory):
            file, problem = self.directory / str(step) / "metrics" / "metrics", ""
            try:
                saved = finding.read_metrics(self.directory, step)
                if file.exists() and not isinstance(saved.get("score"), float):
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
            best_fn=score,  # without this Orbax does not save metrics
            cleanup_tmp_directories=True,  # left over from a save that was killed
        )
        with contextlib.ExitStack() as stack, _writing(self.directory):
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            alias = stack.enter_context(orbax_alias(self.directory))
            self._opened = _Manager(
                alias, options=options, item_names=("state", "host", "manifest")
            )
            self._open = stack.pop_all()

    @property
    def _manager(self) -> _Manager:
        assert self._opened is not None  # set at the end of `__init__`
        return self._opened

    def _check_directory(self) -> None:
        """Raises `UserError` for content that breaks Orbax, or that Orbax silently ignores."""
        check_location(self.directory)
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            raise UserError(
                f"{self.directory} is not a folder, but checkpoints are saved there; move it away"
            )
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.name.isdigit() and finding.parse_step(path.name) is None and path.is_dir():
                raise UserError(
                    f"{path} is not a step: expected a name of digits 0 to 9 without leading zeros;"
                    " rename the folder or move it away"
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

        `state`: a pytree of replicated global arrays (or NumPy arrays). `host`: an object for JSON.
        `metrics`: saved only with a finite number under `best_by`; otherwise the step is never the
        best. "score" is saved with them; the highest score is the best.

        Saving the newest step again replaces it; if the process is killed in between, the old
        version or the new one is left. A process that has restored nothing waits for its first save
        and reads it back.

        Raises `UserError` if the disk is full or not writable, during this save or the previous
        one, and if the first save cannot be read back; RuntimeError for a step before the newest.
        """
        leaves = flatten(state)
        for leaf in leaves.values():
            if isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(
                leaf.dtype, jax.dtypes.prng_key
            ):
                leaf.addressable_data(0).copy_to_host_async()  # starts all copies at once
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
        value = metrics.get(self._best_by, math.nan)
        scored = {**metrics, "score": self._sign * value} if math.isfinite(value) else None
        with _writing(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(named),
                    host=ocp.args.JsonSave(dict(host)),
                    manifest=ocp.args.JsonSave(
                        {
                            "format": 1,
                            "step": step,
                            "leaves": manifest,
                            "host_crc32": crc_of_json(host),
                            "metrics_crc32": crc_of_metrics(scored),
                        }
                    ),
                ),
                metrics=scored,
                force=True,  # the caller decides when to save
            )
        if again:
            self.wait()
            self._put_back()
        if not self._is_readable:
            self.wait()
            self._read_back(step)

    def restore(
        self, target: PyTree, step: int | None = None
    ) -> tuple[PyTree, dict[str, Any], int] | None:
        """`(state, host, step)` of the newest intact step, or of `step`; None if no step is intact.

        `target` is a pytree of arrays or `ShapeDtypeStruct`s; the state has its dtypes and
        shardings. A damaged step is reported and moved to the folder `checkpoints.damaged/`, and
        the step before it is tried. Raises `UserError` for a checkpoint of another network, and if
        the given `step` is damaged or missing.
        """
        self.wait()
        known = finding.all_steps(self.directory)
        if step is not None and step not in known:
            raise UserError(
                f"{self.directory} has no step {step};"
                f" it has {', '.join(map(str, known)) or 'none'}"
            )
        for candidate in [step] if step is not None else known[::-1]:
            path = self.directory / str(candidate)
            problem: UserError | None = None
            try:
                if not (path / "state" / "_METADATA").is_file():
                    raise DamagedError(f"{path} is damaged: its arrays are missing")
                state = read_tree(path / "state", target, exact=True)
                host = read_host(path)
            except UserError as error:
                problem = error
            may_skip = problem is None or (step is None and isinstance(problem, DamagedError))
            if _on_any_process(not may_skip):
                raise problem or UserError(f"another process cannot read {path}")
            if not self._skip_damaged(candidate, str(problem or "")):
                self._is_readable = True
                return state, host, candidate
        if known:
            self._report(f"no intact checkpoint is left in {self.directory}: starting at step 0")
        return None

    def all_steps(self) -> list[int]:
        """The complete steps on disk, ascending."""
        return finding.all_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest step on disk, or None."""
        return finding.latest_step(self.directory)

    def best_step(self) -> int | None:
        """The best step on disk, the latest if no step has a finite metric, or None."""
        return finding.best_step(self.directory)

    def wait(self) -> None:
        """Waits for the save in progress; raises `UserError` if the disk is full or read-only."""
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and closes. Raises the errors of `wait`."""
        with self._open:
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
            self._report(str(problem))  # `error` is raised, not this one

    def _read_back(self, step: int) -> None:
        """Raises `UserError` on all processes if the first one cannot read the step back."""
        problem = ""
        if jax.process_index() == 0:
            try:
                reading.verify_step(self.directory / str(step))
            except UserError as error:
                problem = str(error)
        if _on_any_process(bool(problem)):
            raise UserError(
                f"the first checkpoint of this run cannot be read back, so {self.directory} cannot"
                " keep checkpoints; choose another --workdir"
                f" ({problem or 'see the error of the first process'})"
            )
        self._is_readable = True

    def _set_aside(self, step: int) -> None:
        """Moves a step that is saved again to where `_put_back` finds it after a crash."""
        if jax.process_index() == 0:
            with _writing(self._replaced):
                self._replaced.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(self._replaced / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def _put_back(self) -> None:
        """Ends what `_set_aside` began: keeps the new step if it is complete, else the old one."""
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
        """Moves the step aside if some process has a problem with it; returns whether it did."""
        if not _on_any_process(bool(problem)):
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
        if self._opened is not None:
            self._opened.reload()
        return True


def _on_any_process(holds: bool) -> bool:
    """Whether `holds` is true on some process.

    An error must be raised on all processes: if one raised alone, the others would wait for it.
    """
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
def _writing(directory: Path) -> Iterator[None]:
    """Turns the errors of a full or unwritable disk, wherever Orbax raises them, into one line."""
    try:
        yield
    except Exception as error:
        for reason in _CANNOT_WRITE:
            if reason in str(error):
                raise UserError(
                    f"cannot write a checkpoint into {directory}: {reason.lower()}; earlier"
                    " checkpoints are intact; fix this and run the same command again"
                ) from error
        raise
