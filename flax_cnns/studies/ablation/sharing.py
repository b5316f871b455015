"""Takes the cells of a baseline from another ablation, so that they are not trained again.

A cell is taken if it is complete there, if its config is that of our cell in every field, the seed
included, and if it saw the data that ours would see (by fingerprint; `data.dir` may differ). Its
log, config and summary are copied, not its checkpoints. `shared.json` in the copy says where it
comes from.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.data.fingerprint import DataSnapshot
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.studies.ablation.plan import SweepCell
from flax_cnns.studies.ablation.reading import read_plan

COPIED = ("config.json", "dataset.json", "own.json", "metrics.jsonl", "summary.json", "curves.png")


def find_source(
    cell: SweepCell, other: pathlib.Path, data: DataSnapshot
) -> tuple[pathlib.Path | None, str]:
    """Finds the complete run in another ablation that is the run of `cell`.

    Returns (its directory, ""), or (None, why there is none).
    """
    ours, nearest = configs.to_plain(cell.config), ""
    fewest = float("inf")
    for workdir in _list_complete(other):
        theirs = configs.add_missing_fields(workdirs.read_json(workdir / "config.json"))[0]
        fields = configs.list_differences(ours, configs.reset_inert_fields_like(ours, theirs))
        fields = [field for field in fields if not field.startswith("data.dir:")]
        if fields:
            if len(fields) < fewest:
                fewest = len(fields)
                nearest = f"the nearest is {workdir}, which differs: {'; '.join(fields[:3])}"
            continue
        if differs := workdirs.find_data_differences(workdir, data):
            return None, f"{workdir} saw other data: {fingerprints.join_first(differs)}"
        return workdir, ""
    return None, nearest or "no cell is complete there"


def _list_complete(other: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the complete runs of an ablation, those of its baseline first."""
    plan = read_plan(other)
    names = [row["name"] for row in plan["rows"]]
    for name in sorted(names, key=lambda name: name != plan["baseline"]):
        for summary in sorted((other / name).glob("seed*/summary.json")):
            yield summary.parent


def share_cells(
    cells: Sequence[SweepCell],
    other: str | os.PathLike,
    data: DataSnapshot,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Copies the runs of a baseline's cells from another ablation. Returns their number.

    Cells that began here stay. `dry_run` only says what would be copied. Raises UserError if there
    is no ablation, or if it has no run of any of the cells.
    """
    other = pathlib.Path(other)
    shared, why = 0, ""
    open_cells = [cell for cell in cells if not workdirs.has_begun(cell.workdir)]
    for cell in open_cells:
        source, problem = find_source(cell, other, data)
        if source is None:
            why = why or problem
            continue
        shared += 1
        if not dry_run:
            _copy_run(source, cell.workdir)
        say(f"{cell.name}: {'would be' if dry_run else 'is'} taken from {source}")
    if open_cells and not shared and not any(map(read_source, cells)):
        raise UserError(f"--baseline: {other} has no run of {open_cells[0].name}: {why}")
    if rest := len(open_cells) - shared:
        cells_are = "1 cell is" if rest == 1 else f"{rest} cells are"
        say(f"{open_cells[0].row.name}: {cells_are} not in {other}, to be trained here")
    return shared


def _copy_run(source: pathlib.Path, workdir: pathlib.Path) -> None:
    """Copies the records of a run. The directory appears complete or not at all."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir.parent, prefix=".shared-") as temporary:
        copy = pathlib.Path(temporary) / workdir.name
        copy.mkdir()
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, copy / name)
        files.write_json(copy / "shared.json", {"from": str(source.resolve())})
        if workdir.is_dir() and not workdirs.has_begun(workdir):
            shutil.rmtree(workdir)  # left by a run that stopped before its first step
        os.replace(copy, workdir)


def read_source(cell: SweepCell | pathlib.Path) -> str:
    """Returns the directory from which a cell was taken; "" if it was trained here."""
    workdir = cell if isinstance(cell, pathlib.Path) else cell.workdir
    path = workdir / "shared.json"
    return workdirs.read_json(path).get("from", "") if path.is_file() else ""


def make_note(folder: pathlib.Path, plan: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the report about cells from another ablation; [] if there are none."""
    found: dict[str, list[int]] = {}
    for workdir in sorted((folder / plan["baseline"]).glob("seed*")):
        if workdir.is_dir() and (source := read_source(workdir)):
            parent = str(pathlib.Path(source).parent)
            found.setdefault(parent, []).append(int(workdir.name.removeprefix("seed")))
    return [
        line
        for parent, seeds in found.items()
        for line in (
            "",
            f"Seeds {', '.join(map(str, sorted(seeds)))} of the baseline were trained in"
            f" {parent}: the same config, seeds and data. Ablations with one baseline also share"
            " its chance errors.",
        )
    ]
