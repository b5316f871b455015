"""The run directory: who may write into it, and whether it holds what it should.

config.json        the resolved config; a resume under another one is refused
checkpoints/STEP/  state, host counters, CRC manifest
metrics.jsonl      every logged number, once: the truth; tensorboard/ says it again
summary.json       the final numbers; its presence means that the run is complete
curves.png         learning curves
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from flax_cnns import config as configs
from flax_cnns.checkpoint.lock import lock
from flax_cnns.errors import UserError


def write_json(path: pathlib.Path, content: Any) -> None:
    """All of it or nothing: written beside and moved into place."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)


def read_config(workdir: str | os.PathLike) -> Any:
    """The config of a run directory. Raises `UserError` where there is none."""
    from ml_collections import ConfigDict

    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no run here (config.json is missing); give a run's --workdir")
    return ConfigDict(json.loads(path.read_text()))


def check_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises `UserError` where `workdir` holds another experiment, or things that are no run."""
    if (workdir / "config.json").is_file():
        there = json.loads((workdir / "config.json").read_text())
        if fields := configs.difference(config, there):
            raise UserError(
                f"{workdir} holds a run with another config ({'; '.join(fields)}); "
                "take another --workdir, or the same config to go on"
            )
    elif others := sorted(p.name for p in workdir.iterdir() if p.name != ".lock"):
        raise UserError(
            f"{workdir} is not empty and holds no run ({', '.join(others[:5])}); "
            "take another --workdir"
        )


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, *, primary: bool) -> Iterator[None]:
    """Makes and locks the run directory; leaves nothing behind where the run never began."""
    if not primary:
        yield
        return
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    with lock(workdir):
        try:
            yield
        finally:
            if made and not (workdir / "config.json").exists():
                (workdir / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    for path in made:
                        path.rmdir()
