"""What lies in a run directory or an Orbax checkpoint's folder; nothing here reads an array, or
creates or changes anything."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from flax_cnns.errors import UserError, did_you_mean


class DamagedError(UserError):
    """A checkpoint that cannot be what was written."""


def steps(run: str | os.PathLike) -> list[int]:
    """The steps that are whole on disk, ascending, of a run directory or of its `checkpoints`
    folder.
    """
    directory = checkpoints_of(run)
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
        return read_json(checkpoints_of(run) / str(step) / "metrics" / "metrics")
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
        path = checkpoints_of(path) / str(step)
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


def checkpoints_of(run: str | os.PathLike) -> Path:
    path = Path(os.path.abspath(run))
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def read_json(file: Path) -> dict:
    with damage(file):
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value


@contextlib.contextmanager
def damage(path: Path):
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
