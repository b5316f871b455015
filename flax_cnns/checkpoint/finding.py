"""What lies in a run directory or an Orbax checkpoint's folder; nothing here reads an array, or
creates or changes anything."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax_cnns.errors import UserError, did_you_mean

UNFINISHED_MARK = ".orbax-checkpoint-tmp"  # in the name of a save that is under way


class DamagedError(UserError):
    """A checkpoint that cannot be what was written."""


def parse_step(folder_name: str) -> int | None:
    """The step whose folder has this name: digits 0 to 9 without leading zeros. None for other
    names, such as "007", or "\u0663", which is a digit for `str.isdigit`.
    """
    step = int(folder_name) if re.fullmatch(r"[0-9]{1,18}", folder_name) else None
    return step if str(step) == folder_name else None


def all_steps(run: str | os.PathLike) -> list[int]:
    """The steps that are whole on disk, ascending, of a run directory or of its `checkpoints`
    folder.
    """
    directory = checkpoints_folder(run)
    if not directory.is_dir():
        return []
    # An unfinished save has another name until it is complete (`120.orbax-checkpoint-tmp`).
    found = (parse_step(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted(step for step in found if step is not None)


def latest_step(run: str | os.PathLike) -> int | None:
    """The newest step on disk, or None."""
    return max(all_steps(run), default=None)


def best_step(run: str | os.PathLike) -> int | None:
    """The step with the highest score (the metric that the run chooses by, negated where the lowest
    is the best), the newest of equals; the latest step where none has a
    (finite) metric. Raises `DamagedError` where a step's metrics are not what was written.
    """
    scores = {step: read_metrics(run, step).get("score") for step in all_steps(run)}
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else latest_step(run)


def read_metrics(run: str | os.PathLike, step: int) -> dict[str, float]:
    """The metrics saved with a step; {} where there are none. Raises `DamagedError` where they are
    not what was written. Older manifests have no checksum of them, and are not compared.
    """
    folder = checkpoints_folder(run) / str(step)
    file, manifest = folder / "metrics" / "metrics", folder / "manifest" / "metadata"
    metrics = read_json(file) if file.exists() else {}
    written = read_json(manifest) if manifest.exists() else {}
    if written.get("metrics_crc32", (crc := crc_of_metrics(metrics))) != crc:
        raise DamagedError(f"{file} is damaged: its CRC32 is not that of the manifest")
    return metrics


def crc_of_json(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def crc_of_metrics(metrics: Mapping[str, float] | None) -> int | None:
    """What a manifest has as `metrics_crc32`: None for a step that is saved without metrics."""
    return crc_of_json(metrics) if metrics else None


class StepChoice(NamedTuple):
    """The checkpoint of a run that is taken, and the reason."""

    step: int
    reason: str  # "best", "latest", "named", "tested for summary.json", "latest, unfinished"


def split_source(source: str | os.PathLike) -> tuple[str, str]:
    """`("runs/x", "best")` of runs/x@best; `(source, "")` where nothing is named."""
    text, at, which = os.fspath(source).rpartition("@")
    if not at or os.path.exists(source) or "/" in which:
        return os.fspath(source), ""
    return text, which


def choose_step(run: str | os.PathLike, which: str = "") -> StepChoice:
    """The step that `which` (best, latest, a number) means. "" means the one whose test numbers
    `summary.json` has. In a run without one, and in a folder that is not a run, it means the
    latest.

    Raises `UserError` where there is no such step; it names those there are.
    """
    known = all_steps(run)
    step, why = parse_step(which), "named"
    if which in ("best", "latest"):
        step, why = (best_step if which == "best" else latest_step)(run), which
    elif not which:
        step, why = _tested_step(run)
    if step not in known:
        if not known:
            raise UserError(f"{os.fspath(run)} has no checkpoints yet; train it first")
        named = repr(which) if which else f"{step}, which was tested for its summary.json"
        raise UserError(
            f"{os.fspath(run)} has no checkpoint {named}; it has best, latest,"
            f" {', '.join(map(str, known))}"
        )
    return StepChoice(step, why)


def _tested_step(run: str | os.PathLike) -> tuple[int | None, str]:
    folder = checkpoints_folder(run)
    run = folder.parent if folder.name == "checkpoints" else folder
    if not (run / "summary.json").is_file():
        unfinished = (run / "config.json").is_file()
        return latest_step(folder), "latest, unfinished" if unfinished else "latest"
    summary = read_json(run / "summary.json")
    for name in ("test/step", "fit/step"):
        if isinstance(summary.get(name), int):
            return summary[name], "tested for summary.json"
    # Nothing was tested, or a version tested it that did not record the step.
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    train = config.get("train")
    if isinstance(train, dict) and train.get("test_on") == "best":
        return best_step(folder), "best, as train.test_on says"
    return latest_step(folder), "latest"


def find_arrays(source: str | os.PathLike) -> Path:
    """The folder of arrays that is meant by RUN, RUN@best, RUN@latest, RUN@1200, or an Orbax
    checkpoint's path. `choose_step` says what RUN alone means.

    Raises `UserError` where there is no such run or step; it names those there are.
    """
    return find_step_arrays(*split_source(source))


def find_step_arrays(run: str | os.PathLike, which: str = "") -> Path:
    """Like `resolve`, with the run or checkpoint, and the step of a run, as two arguments."""
    text = os.fspath(run)
    path = Path(os.path.abspath(text))
    if not os.path.isdir(path):
        parent = path.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if os.path.isdir(parent) else []
        raise UserError(f"there is no checkpoint or run {text!r}{did_you_mean(path.name, near)}")
    if unfinished := [name for name in path.parts if UNFINISHED_MARK in name]:
        raise UserError(f"{text} is no whole checkpoint: saving {unfinished[0]} was never finished")
    if known := all_steps(path):
        path = checkpoints_folder(path) / str(choose_step(text, which).step)
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


def checkpoints_folder(run: str | os.PathLike) -> Path:
    path = Path(os.path.abspath(run))
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


# The cheapest way to mend each of a run's own files.
REPAIRS = {
    "config.json": "the same command with another --workdir writes the same file: copy it from"
    " there",
    "summary.json": "remove it, and the command that trained the run writes it again",
    "dataset.json": "remove it, and the data set itself is read instead",
}


def read_json(file: Path) -> dict:
    with explain_damage(file, REPAIRS.get(file.name, "")):
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got a {type(value).__name__}")
        return value


@contextlib.contextmanager
def explain_damage(path: Path, cure: str = ""):
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
        text = f"{type(error).__name__}: {text[:200]}{'; ' if cure else ''}{cure}"
        raise DamagedError(f"{path} is damaged: {text}") from error
