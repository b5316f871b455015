"""What an ablation runs: rows, cells, the record in its folder, and what all of it will take."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import files, recipes
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import workdir as workdirs
from flax_cnns.studies import own_parts

# Beside the rows' directories.
FOLDER_FILES = ("ablation.json", "report.md", "report.csv", "forest.png", "curves.png")

WHY_NO_OBJECTS = "an ablation runs in child processes"


class SweepRow(NamedTuple):
    name: str
    overrides: dict[str, Any]  # by the paths of fields, as JSON has them
    config: ConfigDict  # the base with these


class SweepCell(NamedTuple):
    row: SweepRow
    seed: int  # from 0
    folder: pathlib.Path  # of its row

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def workdir(self) -> pathlib.Path:
        return self.folder / f"seed{self.seed}"

    @property
    def log(self) -> pathlib.Path:
        return self.folder / f"seed{self.seed}.txt"

    @property
    def config(self) -> ConfigDict:
        config = ConfigDict(self.row.config.to_dict())
        config.seed += self.seed
        return workdirs.reset_inert_if_new(config, self.workdir)

    def read_status(self) -> dict[str, Any]:
        """What is known of it; the status is "missing" where it was never started."""
        known = {"status": "missing", "attempts": 0, "error": "", "seconds": 0.0}
        path = self.folder / f"seed{self.seed}.json"
        if path.is_file():
            with contextlib.suppress(UserError, TypeError, ValueError):  # damaged: as if not there
                known |= workdirs.read_json(path)
        if (self.workdir / "summary.json").is_file():
            return known | {"status": "complete", "error": ""}
        # A cell that failed before its first step has no directory; that of any other was removed.
        failed = known["status"] == "failed"
        gone = known["status"] == "complete" or not (failed or self.workdir.exists())
        return known | {"status": "missing"} if gone else known

    def write_status(self, known: Mapping[str, Any]) -> None:
        files.write_json(self.folder / f"seed{self.seed}.json", known)

    def delete_status(self) -> None:
        """Deletes the status of a run that is no longer there."""
        (self.folder / f"seed{self.seed}.json").unlink(missing_ok=True)


def load_sweep(file: str | os.PathLike) -> list[tuple[str, dict[str, Any]]]:
    """What `sweep()` in a config's file yields. Raises `UserError` where it is not there, or yields
    nothing."""
    sweep = getattr(recipes.load(file), "sweep", None)
    if not callable(sweep):
        raise UserError(f"{file} has no sweep(), which yields the rows; see configs/ablations")
    rows = sweep()
    if not isinstance(rows, Iterable):
        raise UserError(f"{file}: sweep() is to return a list of rows or to yield them, got {rows}")
    return list(rows)


def make_rows(
    config: ConfigDict,
    sweep: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | os.PathLike | None = None,
) -> list[SweepRow]:
    """The rows of a sweep on a config, for `folder`. Raises `UserError` for a name that cannot be a
    directory's or is there twice, for an override that names no field, for a value of the wrong
    kind, for an object that child processes cannot have, and for what `config.check_new_run`
    refuses.
    """
    configs.validate(config)
    own_parts.refuse_opaque(config, WHY_NO_OBJECTS)
    rows: dict[str, SweepRow] = {}
    recorded, notes = read_recorded_rows(folder), []
    for pair in sweep:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not _is_row(*pair):
            raise UserError(f"sweep(): expected (name, {{field: value, ...}}), got {pair!r}")
        name, overrides = pair
        if not re.fullmatch(r"\w[\w.,+=-]*", name):
            raise UserError(
                f"sweep(): {name!r} is no name for a row, which is a directory's: letters, digits"
                " and _ . , + = - alone"
            )
        if name in FOLDER_FILES:
            raise UserError(f"sweep(): {name!r} is no name for a row: a file of the folder has it")
        if name in rows:
            raise UserError(f"sweep(): two rows have the name {name!r}")
        try:
            changed = apply_overrides(config, overrides)
            configs.validate(changed)
            own_parts.refuse_opaque(changed, WHY_NO_OBJECTS)
            begun = recorded.get(name) == configs.to_plain(dict(overrides))
            configs.check_new_run(changed, folder, begun=begun, say=notes.append)
        except UserError as error:
            raise UserError(f"row {name}: {error}") from None
        rows[name] = SweepRow(name, configs.to_plain(dict(overrides)), changed)
    if not rows:
        raise UserError("sweep(): expected a row or more, got none")
    for note in dict.fromkeys(notes):
        print(note)
    return list(rows.values())


def read_recorded_rows(folder: str | os.PathLike | None) -> dict[str, dict[str, Any]]:
    """The overrides, by row, of the ablation in a folder; {} if there is none, or a damaged one."""
    with contextlib.suppress(UserError, TypeError, KeyError):
        rows = workdirs.read_json(pathlib.Path(folder or "", "ablation.json"))["rows"]
        return {row["name"]: row["overrides"] for row in rows}
    return {}


def _is_row(name: Any, overrides: Any) -> bool:
    named = isinstance(name, str) and isinstance(overrides, Mapping)
    return named and all(isinstance(field, str) for field in overrides)


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with `{"mix.mixup": 0.2, "data.augment": {"flip": True}}` changed. Fields
    that these switch off, such as sgd's momentum under another optimizer, get their defaults, and
    those of an own part that is no longer named go. Raises `UserError` for an unknown field; those
    of a network and of a user's own parts are theirs to know."""
    given = configs.flatten(overrides)
    # A field that could not act before, or that the row sets, is a mistake: it must be refused.
    keep = {*configs.find_inert_fields(config), *given}
    config = ConfigDict(config.to_dict())
    parts = own_parts.find_names(config)
    for path, value in given.items():
        if path == "seed":
            raise UserError("seed: every row has the same ones; --seeds says how many")
        of_own = path.startswith("own.") or path.rpartition(".")[0] == "model"
        if path not in configs.FIELDS and not of_own:
            raise UserError(f"unknown field {path!r}{did_you_mean(path, configs.FIELDS)}")
        configs.set_config_field(config, path, value)
    gone = parts - own_parts.find_names(config)
    own_parts.remove_fields(
        config, {n for n in gone if not any(p.startswith(f"own.{n}.") for p in given)}
    )
    return configs.reset_inert_fields(config, keep)


def make_cells(rows: Sequence[SweepRow], folder: str | os.PathLike, seeds: int) -> list[SweepCell]:
    """Every row with seed 0, then every row with seed 1: what is complete is soon comparable, and
    with more seeds a cell's number stays its own."""
    if seeds < 1:
        raise UserError(f"--seeds: expected one or more, got {seeds}")
    folder = pathlib.Path(folder)
    return [SweepCell(row, seed, folder / row.name) for seed in range(seeds) for row in rows]


def select_cells(
    cells: Sequence[SweepCell], *, rows: Sequence[str] = (), index: int | None = None
) -> list[SweepCell]:
    """Those of some rows, by name, or the one of a number, from 0. Raises `UserError`."""
    known = list(dict.fromkeys(cell.row.name for cell in cells))
    for name in rows:
        if name not in known:
            raise UserError(f"--rows: there is no row {name!r}{did_you_mean(name, known)}")
    if index is not None and rows:
        raise UserError("--index counts the cells of all rows; leave out --rows")
    if index is not None and not 0 <= index < len(cells):
        raise UserError(f"--index: expected 0 to {len(cells) - 1}, got {index}")
    if index is not None:
        return [cells[index]]
    return [cell for cell in cells if not rows or cell.row.name in rows]


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path) -> Iterator[None]:
    """One process at a time, others wait: the tasks of an array share a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_plan(
    folder: str | os.PathLike,
    config: ConfigDict,
    rows: Sequence[SweepRow],
    seeds: int,
    names: Sequence[str] = (),
) -> None:
    """Writes ablation.json, or adds to it what is new: seeds, and rows, all or the baseline and
    those of some names. Raises `UserError` where the folder holds runs of another config, or of a
    row by this name that was another."""
    folder = pathlib.Path(folder)
    named = [row for row in rows if not names or row.name in names or row is rows[0]]
    ours, order = _plan(config, named, seeds), [row.name for row in rows]
    with lock_folder(folder):
        path = folder / "ablation.json"
        merged = _merge(folder, ours, workdirs.read_json(path)) if path.is_file() else ours
        merged["rows"].sort(key=lambda row: [*order, row["name"]].index(row["name"]))
        if not path.is_file() or merged != workdirs.read_json(path):
            files.write_json(path, merged)


def _plan(config: ConfigDict, rows: Sequence[SweepRow], seeds: int) -> dict[str, Any]:
    named = [{"name": row.name, "overrides": row.overrides} for row in rows]
    plain = configs.to_plain(config)
    return {"config": plain, "baseline": rows[0].name, "seeds": seeds, "rows": named}


def _merge(folder: pathlib.Path, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    begun = {path.parents[1].name for path in folder.glob("*/seed*/config.json")}
    kept = {row["name"]: row["overrides"] for row in theirs["rows"] if row["name"] in begun}
    if not kept:
        return ours
    fields = configs.list_differences(
        ours["config"], configs.add_missing_fields(theirs["config"])[0]
    )
    # The fingerprint of each cell tells whether the data only moved.
    fields = [field for field in fields if not field.startswith("data.dir:")]
    if ours["baseline"] != theirs["baseline"]:
        fields.append(f"baseline: {theirs['baseline']} there, {ours['baseline']} here")
    for row in ours["rows"]:
        changed = configs.list_differences(
            row["overrides"], kept.pop(row["name"], row["overrides"])
        )
        fields += [f"row {row['name']}: {field}" for field in changed]
    if fields:
        raise UserError(
            f"{folder} holds another ablation ({'; '.join(fields)}); take another --workdir, or"
            " the same config and rows to go on"
        )
    gone = [{"name": name, "overrides": overrides} for name, overrides in kept.items()]
    seeds = max(ours["seeds"], theirs["seeds"])
    return ours | {"seeds": seeds, "rows": [*ours["rows"], *gone]}


def is_final(status: str) -> bool:
    """Whether another start leaves a cell as it is."""
    return status in ("complete", "diverged")
