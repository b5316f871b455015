"""Finds checkpoints in a run directory or the folder of an Orbax checkpoint.

Nothing here reads an array, or creates or changes a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.files import check_local

UNFINISHED_MARK = ".orbax-checkpoint-tmp"  # in the folder name of a save in progress


class DamagedError(UserError):
    """A file or checkpoint is not what was written."""


def parse_step(folder_name: str) -> int | None:
    """The step whose folder has this name: digits 0 to 9 without leading zeros.

    None for other names, such as "007", or "\u0663", which is a digit for `str.isdigit`.
    """
    step = int(folder_name) if re.fullmatch(r"[0-9]{1,18}", folder_name) else None
    return step if str(step) == folder_name else None


def all_steps(run: str | os.PathLike) -> list[int]:
    """The complete steps on disk, ascending, in a run directory or its `checkpoints` folder."""
    directory = checkpoints_folder(run)
    if not directory.is_dir():
        return []
    # A save has another name until it is complete: `120.orbax-checkpoint-tmp`.
    named = (parse_step(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted(step for step in named if step is not None)


def latest_step(run: str | os.PathLike) -> int | None:
    """The newest step on disk, or None."""
    return max(all_steps(run), default=None)


def best_step(run: str | os.PathLike) -> int | None:
    """The step with the highest score; the newest of them if scores are equal.

    The score is the metric `train.best_by` of the run, negated if lower is better. Returns the
    latest step if no step has a (finite) score, and None if there is no step. Raises `DamagedError`
    if a step's metrics are not what was written.
    """
    scores = {step: read_metrics(run, step).get("score") for step in all_steps(run)}
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else latest_step(run)


def read_metrics(run: str | os.PathLike, step: int) -> dict[str, float]:
    """The metrics that were saved with a step; {} if there are none.

    Raises `DamagedError` if the metrics do not have the CRC32 in the manifest. Older manifests have
    no such CRC32; their metrics are not checked.
    """
    folder = checkpoints_folder(run) / str(step)
    file, manifest = folder / "metrics" / "metrics", folder / "manifest" / "metadata"
    metrics = read_json(file) if file.exists() else {}
    written = read_json(manifest) if manifest.exists() else {}
    if written.get("metrics_crc32", (crc := crc_of_metrics(metrics))) != crc:
        raise DamagedError(f"{file} is damaged: its CRC32 differs from the manifest")
    return metrics


def crc_of_json(value: Mapping[str, Any]) -> int:
    """The CRC32 of `value` as JSON with sorted keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def crc_of_metrics(metrics: Mapping[str, float] | None) -> int | None:
    """The value of `metrics_crc32` in a manifest; None for a step without metrics."""
    return crc_of_json(metrics) if metrics else None


class StepChoice(NamedTuple):
    """The chosen checkpoint of a run, and the reason."""

    step: int
    # "best", "latest", "named", "tested for summary.json", "latest, unfinished", or
    # "best, as train.test_on says", or "soup" (averaged weights that `evaluate --soup` saved)
    reason: str


def split_source(source: str | os.PathLike) -> tuple[str, str]:
    """Splits "runs/x@best" into ("runs/x", "best"); without "@", returns (source, "").

    Raises `UserError` for an address such as gs://bucket/x.
    """
    check_local(source, writes=True)
    text, at, which = os.fspath(source).rpartition("@")
    if not at or os.path.exists(source) or "/" in which:
        return os.fspath(source), ""
    return text, which


def choose_step(run: str | os.PathLike, which: str = "") -> StepChoice:
    """The step that `which` means: "best", "latest", a number, or "".

    "" means the step that was tested for `summary.json`; if `summary.json` does not name it, the
    best or latest step, as `train.test_on` says. If there is no `summary.json`, or the folder is
    not a run, "" means the latest step. Raises `UserError` if the run lacks the step; the message
    lists the steps.
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
        named = repr(which) if which else f"{step}, the one that was tested for summary.json"
        raise UserError(
            f"{os.fspath(run)} has no checkpoint {named}; it has best, latest,"
            f" {', '.join(map(str, known))}"
        )
    return StepChoice(step, why)


def _tested_step(run: str | os.PathLike) -> tuple[int | None, str]:
    """(step, reason) of the step that was tested for `summary.json`; `choose_step` has the rest."""
    folder = checkpoints_folder(run)
    run = folder.parent if folder.name == "checkpoints" else folder
    if not (run / "summary.json").is_file():
        if (run / "soup.json").is_file():
            return latest_step(folder), "soup"
        unfinished = (run / "config.json").is_file()
        return latest_step(folder), "latest, unfinished" if unfinished else "latest"
    summary = read_json(run / "summary.json")
    for name in ("test/step", "fit/step"):
        if isinstance(summary.get(name), int):
            return summary[name], "tested for summary.json"
    # Nothing was tested, or the version that tested did not record the step.
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    train = config.get("train")
    if isinstance(train, dict) and train.get("test_on") == "best":
        return best_step(folder), "best, as train.test_on says"
    return latest_step(folder), "latest"


def find_arrays(source: str | os.PathLike) -> Path:
    """The folder with the arrays of RUN, RUN@best, RUN@latest, RUN@1200 or an Orbax checkpoint.

    `choose_step` says what RUN alone means. Raises `UserError` if there is no such run or step; the
    message lists what there is.
    """
    return find_step_arrays(*split_source(source))


def find_step_arrays(run: str | os.PathLike, which: str = "") -> Path:
    """Like `find_arrays`, with the run or checkpoint and the step as two arguments."""
    text = os.fspath(run)
    path = Path(os.path.abspath(text))
    if not os.path.isdir(path):
        parent = path.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if os.path.isdir(parent) else []
        raise UserError(f"there is no checkpoint or run {text!r}{did_you_mean(path.name, near)}")
    if unfinished := [name for name in path.parts if UNFINISHED_MARK in name]:
        raise UserError(f"{text} is not a complete checkpoint: {unfinished[0]} was never finished")
    if known := all_steps(path):
        path = checkpoints_folder(path) / str(choose_step(text, which).step)
    elif which:
        raise UserError(f"{text} has no checkpoint {which!r}: it is not a run with checkpoints")
    if (path / "_METADATA").is_file():
        return path
    items = sorted(p.name for p in path.iterdir() if (p / "_METADATA").is_file())
    for name in ("state", "default", *(items if len(items) == 1 else ())):
        if name in items:
            return path / name
    if items:
        raise UserError(f"{path} holds {', '.join(items)}; give the path of one of these folders")
    if known:
        raise DamagedError(f"{path} is damaged: it holds no arrays")
    raise UserError(f"{text} holds no checkpoint (yet), neither of a run nor of Orbax")


def checkpoints_folder(run: str | os.PathLike) -> Path:
    """The `checkpoints` folder of a run; the given folder if it has none."""
    path = Path(os.path.abspath(run))
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


# The cheapest way to repair each file of a run.
REPAIRS = {
    "config.json": "the same command with another --workdir writes the same file; copy that file",
    "summary.json": "remove the file, and the command that trained the run writes it again",
    "dataset.json": "remove the file, and the data set itself is read instead",
}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `DamagedError` if the file does not hold one."""
    with explain_damage(file, REPAIRS.get(file.name, "")):
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got a {type(value).__name__}")
        return value


@contextlib.contextmanager
def explain_damage(path: Path, repair: str = "") -> Iterator[None]:
    """Turns an error while reading `path` into a `DamagedError` with the advice `repair`.

    An error that does not mean damage (no permission, no memory) becomes another `UserError`, or
    stays as it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        text = str(error).partition("\n")[0]
        if (isinstance(error, OSError) and not missing) or "ermission denied" in text:
            raise UserError(f"cannot read {path}: {text}") from error
        text = f"{type(error).__name__}: {text[:200]}{'; ' if repair else ''}{repair}"
        raise DamagedError(f"{path} is damaged: {text}") from error
