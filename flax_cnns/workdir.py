"""The run directory: who may write into it, and whether it holds what it should.

config.json        the resolved config; a resume under another one is refused
dataset.json       classes, size, mean and std: what it takes to predict without the data
checkpoints/STEP/  state, host counters, CRC manifest
metrics.jsonl      every logged number, once: the truth; tensorboard/ says it again
summary.json       the final numbers; its presence means that the run is complete
curves.png         learning curves
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from flax_cnns import config as configs
from flax_cnns.checkpoint import finding
from flax_cnns.checkpoint.finding import steps
from flax_cnns.checkpoint.lock import lock
from flax_cnns.checkpoint.place import check_place
from flax_cnns.errors import UserError

FILES = ("config.json", "dataset.json", "metrics.jsonl", "summary.json", "curves.png", "graft.json")
FOLDERS = ("checkpoints", "tensorboard")


def finite(content: Any) -> Any:
    """`content` as JSON has it: None in place of NaN and infinities, for which JSON has no name."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, list | tuple) else content


def write_json(path: pathlib.Path, content: Any) -> None:
    """All of it or nothing: written beside and moved into place; null for what is not finite.
    Raises `UserError`."""
    beside = path.with_name(path.name + ".tmp")
    try:
        text = json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises `UserError` where the file cannot be read or is no JSON object. What is not finite is
    None: `null`, and the NaN and Infinity of older versions."""
    try:
        return finite(finding.read_json(path))
    except finding.DamagedError as error:
        cure = "" if path.name in finding.CURES else "; put it right or remove the run"
        raise finding.DamagedError(f"{error}{cure}") from None


def split_checkpoint(workdir: str | os.PathLike, checkpoint: str = "") -> tuple[pathlib.Path, str]:
    """The run directory and the checkpoint (best, latest, a step, or "" for RUN's own) that are
    meant by RUN, or RUN@best with or without the same again. Raises `UserError` for two."""
    run, which = finding.split_source(workdir)
    if which and checkpoint not in ("", which):
        raise UserError(
            f"{os.fspath(workdir)} and --checkpoint={checkpoint} are two checkpoints; name one"
        )
    return pathlib.Path(run), which or checkpoint


def read_config(workdir: str | os.PathLike) -> Any:
    """The config of a run directory, with the fields that were added since it was made. Raises
    `UserError` where there is none."""
    from ml_collections import ConfigDict

    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no run here (config.json is missing); give a run's --workdir")
    complete, _ = _completed(path)
    if missing := sorted(configs.FIELDS.keys() - configs.flatten(complete).keys()):
        raise finding.DamagedError(
            f"{path} is damaged: the field {missing[0]!r} is missing; {finding.CURES[path.name]}"
        )
    return ConfigDict(complete)


def _completed(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    with finding.damage(path, finding.CURES[path.name]):
        return configs.completed(read_json(path))


def check_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises `UserError` where `workdir` holds another experiment, or things that are no run; says
    so where the run was made by an older version and lacks fields that change nothing."""
    if (workdir / "config.json").is_file():
        there, newer = _completed(workdir / "config.json")
        begun = steps(workdir) or (workdir / "metrics.jsonl").is_file()
        if begun and (fields := configs.difference(config, there)):
            raise UserError(
                f"{workdir} holds a run with another config ({'; '.join(fields)}); "
                "take another --workdir, or the same config to go on"
            )
        if begun and newer:
            print(
                f"{workdir} was made by an older version that lacks the fields"
                f" {', '.join(newer)}: it goes on with their defaults, which change nothing"
            )
        for name in (*FILES, *FOLDERS):
            path = workdir / name
            if os.path.lexists(path) and not (path.is_dir() if name in FOLDERS else path.is_file()):
                kind = "folder" if name in FOLDERS else "file"
                raise UserError(
                    f"{path} is no {kind}, and the run writes a {kind} of this name;"
                    " move it away or take another --workdir"
                )
    elif others := sorted(
        p.name for p in workdir.iterdir() if p.name != ".lock" and p.suffix != ".tmp"
    ):
        raise UserError(
            f"{workdir} is not empty and holds no run ({', '.join(others[:5])}); "
            "take another --workdir"
        )


class Opened:
    """A run directory that this process may write into; `begun` once a step was taken."""

    begun = False


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, *, primary: bool) -> Iterator[Opened]:
    """Makes and locks the run directory; a mistake before the first step leaves nothing behind.

    With several processes the primary one does it for all. Raises `UserError` where the directory
    is in use or cannot be written.
    """
    check_place(workdir)
    opened = Opened()
    if not primary:
        yield opened
        return
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    locked_before = (workdir / ".lock").exists()
    with lock(workdir):
        try:
            yield opened
        except BaseException:
            if made and not opened.begun:
                shutil.rmtree(workdir, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty: another run began beside us
                    for path in made[1:]:
                        path.rmdir()
            elif not locked_before and not (workdir / "config.json").exists():
                (workdir / ".lock").unlink(missing_ok=True)
            raise
