"""The log of a run: `metrics.jsonl`, TensorBoard event files, and optionally wandb.

`metrics.jsonl` is the file that the rest of the project reads. A record is one JSON object on one
line with the metrics of one event (a training window, a validation, the test):

    {"step": 120, "time": 1767225600.0, "train/loss": 0.4321, "train/accuracy": 0.91}

A value that is not finite (NaN or an infinity) is written as `null`, because JSON cannot represent
it; `read_jsonl` returns it as `nan`. Every record is one write to the file, so a killed process
leaves at most one incomplete line, the last one.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_cnns.errors import UserError
from flax_cnns.files import replace_atomically


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`, oldest first, with `nan` for `null`.

    An incomplete last line is skipped. Raises `UserError` if the file cannot be read, or if an
    earlier line is not a record.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            record["step"], record["time"]
            records.append({k: math.nan if v is None else v for k, v in record.items()})
        except (ValueError, TypeError, KeyError):  # not JSON, not an object, or not a record
            if number == len(lines):  # only an incomplete line has no newline after it
                break
            raise UserError(
                f"{path}, line {number}: expected a record with step and time, "
                f"got {line[:40]!r}; delete this line to continue"
            ) from None
    return records


class Writer:
    """Logs one run, from its start or after a resume.

    Use it as a context manager, or call `close` at the end.

    Args:
      workdir: the directory for `metrics.jsonl` and `tensorboard/`; created if missing.
      resume_step: None for a new run, which replaces an older log. For a resumed run, the step of
        its checkpoint. Records of later steps are dropped (in TensorBoard: purged), because these
        steps run again. Records of `resume_step` that the log already holds are not written again.
      tensorboard: whether to write event files; they use the same names as the JSONL.
      wandb: the name of a wandb project, or "" for off. The run's id is stored in
        `workdir/wandb_id` and used again on resume.
      config: the config that wandb records; a dict or ConfigDict.
      primary: whether this process writes; the others only check that wandb is installed.

    Raises `UserError` if `wandb` is set but not installed, or if the files cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        primary: bool = True,
    ) -> None:
        self._file: io.FileIO | None = None
        self._events: Any = None
        self._wandb: Any = None
        self._logged: set[tuple[int, frozenset[str]]] = set()
        wandb_module = import_wandb() if wandb else None  # fails on all processes or on none
        if not primary:
            return
        workdir = Path(workdir)
        self._path = workdir / "metrics.jsonl"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._open_jsonl(resume_step)
            self._open_tensorboard(workdir / "tensorboard", resume_step, tensorboard)
            if wandb_module is not None:
                self._open_wandb(wandb_module, workdir, resume_step, wandb, config)
        except OSError as error:
            self._events = None  # closing it would write again
            self.close()
            raise _cannot_write(error, workdir) from error
        except BaseException:
            self.close()
            raise

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one record without buffering; `float` must accept the values of `metrics`.

        Raises `UserError` if the disk is full or the file is gone.
        """
        if self._file is None or not metrics or (step, frozenset(metrics)) in self._logged:
            return
        step, now = int(step), time.time()
        values = {name: float(value) for name, value in metrics.items()}
        record: dict[str, float | None] = {"step": step, "time": now}
        record |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        try:
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            if self._events is not None:
                self._events.write_event(_scalars(step, now, values))
                self._events.flush()
        except OSError as error:
            self._events = None  # closing it would write again, and fail again
            raise _cannot_write(error, self._path) from error
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Closes the log. A second call does nothing."""
        file, events, run = self._file, self._events, self._wandb
        self._file = self._events = self._wandb = None
        if file is not None:
            file.close()
        if events is not None:
            events.close()
        if run is not None:
            run.finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_jsonl(self, resume_step: int | None) -> None:
        lines = []
        if resume_step is not None and self._path.exists():
            for record in read_jsonl(self._path):
                if record["step"] > resume_step:
                    continue
                names = frozenset(record) - {"step", "time"}
                if record["step"] == resume_step:
                    self._logged.add((resume_step, names))
                finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
                lines.append(json.dumps(finite) + "\n")
        with replace_atomically(self._path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        # Unbuffered: one record is one write, so it survives if the process is killed.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def _open_tensorboard(self, directory: Path, resume_step: int | None, wanted: bool) -> None:
        if resume_step is None and directory.exists():
            shutil.rmtree(directory)
        if not wanted:
            return
        # A writer without a thread. If the process is killed, SummaryWriter's thread loses queued
        # events. If the disk is full, the thread dies, and then training blocks forever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names, which start with the second in
        # which they were opened. The number keeps the order if a run resumes within that second.
        number = sum(1 for _ in directory.iterdir())
        self._events = EventsWriter(str(directory / "events"), f".{number:04d}")
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(
                Event(step=resume_step + 1, wall_time=time.time(), session_log=start)
            )
        self._events.flush()

    def _open_wandb(
        self,
        wandb: Any,
        workdir: Path,
        resume_step: int | None,
        project: str,
        config: Mapping[str, Any] | None,
    ) -> None:
        id_file = workdir / "wandb_id"
        if resume_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        to_dict = getattr(config, "to_dict", None)  # ConfigDict's
        plain = dict(config or {}) if to_dict is None else to_dict()
        # A resumed run logs some steps again; wandb itself ignores steps below its newest one.
        self._wandb = wandb.init(
            project=project,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(workdir),
            name=workdir.name,
            config=plain,
        )


def _scalars(step: int, now: float, values: Mapping[str, float]) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
    return Event(step=step, wall_time=now, summary=summary)


def import_wandb() -> Any:
    """Returns the module wandb. Raises `UserError` if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "log.wandb is set, but wandb is not installed: "
            'pip install "flax_cnns[wandb]", or set log.wandb to ""'
        ) from None
    return wandb


def _cannot_write(error: OSError, path: Path) -> UserError:
    where = error.filename or path
    return UserError(f"cannot write the log {where}: {error.strerror or error}")
