"""What an ablation runs: its rows, its cells, and the plan in its folder."""

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

# Files in the folder of an ablation, which no row may have as its name.
FOLDER_FILES = (
    *("ablation.json", "report.md", "report.csv", "tuning.csv", "forest.png", "curves.png"),
)

WHY_NO_OBJECTS = "an ablation runs in child processes"  # the end of an error message


class SweepRow(NamedTuple):
    """A named change to the base config."""

    name: str
    overrides: dict[str, Any]  # {path of a field: value}, with values as in JSON
    config: ConfigDict  # the base config with the overrides
    space: Mapping[str, Any] = {}  # the row's own, see `tuning`


class SweepCell(NamedTuple):
    """A row with a seed: one run."""

    row: SweepRow
    seed: int  # from 0
    folder: pathlib.Path  # of the row

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
        """The config of the cell's run."""
        config = ConfigDict(self.row.config.to_dict())
        config.seed += self.seed
        return workdirs.reset_inert_if_new(config, self.workdir)

    def read_status(self) -> dict[str, Any]:
        """Returns the content of the cell's JSON file. The status of a cell that has not started,
        or whose run was removed, is "missing"."""
        known = {"status": "missing", "attempts": 0, "error": "", "seconds": 0.0}
        path = self.folder / f"seed{self.seed}.json"
        if path.is_file():
            with contextlib.suppress(UserError, TypeError, ValueError):  # damaged: like missing
                known |= workdirs.read_json(path)
        if (self.workdir / "summary.json").is_file():
            return known | {"status": "complete", "error": ""}
        # A cell that failed before its first step has no directory. Any other cell without a
        # directory was removed.
        failed = known["status"] == "failed"
        is_removed = known["status"] == "complete" or not (failed or self.workdir.exists())
        return known | {"status": "missing"} if is_removed else known

    def write_status(self, known: Mapping[str, Any]) -> None:
        """Writes the cell's JSON file."""
        files.write_json(self.folder / f"seed{self.seed}.json", known)

    def delete_status(self) -> None:
        """Deletes the status of a run whose directory was renamed."""
        (self.folder / f"seed{self.seed}.json").unlink(missing_ok=True)


def load_sweep(file: str | os.PathLike) -> list[tuple[Any, ...]]:
    """Returns the rows that `sweep()` in a config file gives: (name, overrides) or (name,
    overrides, space).

    Raises UserError if the file has no `sweep()`, or if `sweep()` does not return or yield rows.
    """
    sweep = getattr(recipes.load(file), "sweep", None)
    if not callable(sweep):
        raise UserError(f"{file} has no sweep() that gives the rows; see configs/ablations")
    rows = sweep()
    if not isinstance(rows, Iterable):
        raise UserError(f"{file}: sweep() must return or yield rows, got {rows}")
    return list(rows)


def make_rows(
    config: ConfigDict,
    sweep: Iterable[tuple[Any, ...]],
    folder: str | os.PathLike | None = None,
) -> list[SweepRow]:
    """Makes the rows of a sweep over a config, for `folder`.

    Raises UserError for a name that is used twice or cannot name a directory, for an override of an
    unknown field or with a bad value, for an opaque own part, and for what `config.check_new_run`
    refuses.
    """
    configs.validate(config)
    own_parts.refuse_opaque(config, WHY_NO_OBJECTS)
    rows: dict[str, SweepRow] = {}
    recorded = read_recorded_rows(folder)
    notes: list[str] = []
    for given in sweep:
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3) or not _is_row(*given):
            raise UserError(
                f"sweep(): expected (name, {{field: value, ...}}), got {given!r}; a space may be"
                " the third"
            )
        name, overrides, *spaces = given
        if not re.fullmatch(r"\w[\w.,+=-]*", name):
            raise UserError(
                f"sweep(): the row name {name!r} must also name a directory: use only letters,"
                " digits and _ . , + = -"
            )
        if name in FOLDER_FILES:
            raise UserError(
                f"sweep(): a row cannot be called {name!r}: the report writes this file"
            )
        if name in rows:
            raise UserError(f"sweep(): two rows have the name {name!r}")
        try:
            changed = apply_overrides(config, overrides)
            configs.validate(changed)
            configs.require_test(changed, "an ablation compares test metrics")
            own_parts.refuse_opaque(changed, WHY_NO_OBJECTS)
            begun = recorded.get(name) == configs.to_plain(dict(overrides))
            configs.check_new_run(changed, folder, begun=begun, say=notes.append)
        except UserError as error:
            raise UserError(f"row {name}: {error}") from None
        space = dict(spaces[0]) if spaces else {}
        rows[name] = SweepRow(name, configs.to_plain(dict(overrides)), changed, space)
    if not rows:
        raise UserError("sweep(): expected at least one row, got none")
    for note in dict.fromkeys(notes):
        print(note)
    return list(rows.values())


def read_recorded_rows(folder: str | os.PathLike | None) -> dict[str, dict[str, Any]]:
    """Returns {row: overrides} of the ablation in a folder; {} if it is missing or damaged."""
    with contextlib.suppress(UserError, TypeError, KeyError):
        rows = workdirs.read_json(pathlib.Path(folder or "", "ablation.json"))["rows"]
        return {row["name"]: row["overrides"] for row in rows}
    return {}


def _is_row(name: Any, overrides: Any, space: Any = {}) -> bool:  # noqa: B006 (never changed)
    named = isinstance(name, str) and isinstance(overrides, Mapping) and isinstance(space, Mapping)
    return named and all(isinstance(field, str) for field in overrides)


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of `config` with overrides such as `{"mix.mixup": 0.2}`.

    Nested overrides work too: `{"data.augment": {"flip": True}}`. Fields that lose their effect,
    such as sgd's momentum under another optimizer, get their defaults. The fields of own parts that
    the config no longer names are removed. Raises UserError for an unknown field, except for fields
    of networks and of own parts, which are checked later.
    """
    given = configs.flatten(overrides)
    # Fields that had no effect before, or that the row sets, are not reset: a later check must
    # refuse them as mistakes.
    keep = {*configs.find_inert_fields(config), *given}
    config = ConfigDict(config.to_dict())
    names_before = own_parts.find_names(config)
    for path, value in given.items():
        if path == "seed":
            raise UserError("seed: every row has the same seeds; --seeds sets their number")
        is_open = path.startswith("own.") or path.rpartition(".")[0] == "model"
        if path not in configs.FIELDS and not is_open:
            raise UserError(f"unknown field {path!r}{did_you_mean(path, configs.FIELDS)}")
        configs.set_config_field(config, path, value)
    removed = names_before - own_parts.find_names(config)
    unset = {name for name in removed if not any(p.startswith(f"own.{name}.") for p in given)}
    own_parts.remove_fields(config, unset)
    return configs.reset_inert_fields(config, keep)


def make_cells(rows: Sequence[SweepRow], folder: str | os.PathLike, seeds: int) -> list[SweepCell]:
    """Returns every row with seed 0, then every row with seed 1, and so on.

    In this order rows can be compared early, and more seeds do not change the number of a cell.
    """
    if seeds < 1:
        raise UserError(f"--seeds: expected one or more, got {seeds}")
    folder = pathlib.Path(folder)
    return [SweepCell(row, seed, folder / row.name) for seed in range(seeds) for row in rows]


def select_cells(
    cells: Sequence[SweepCell], *, rows: Sequence[str] = (), index: int | None = None
) -> list[SweepCell]:
    """Returns the cells of the named rows, or cell number `index` (from 0). Raises UserError."""
    known = list(dict.fromkeys(cell.row.name for cell in cells))
    for name in rows:
        if name not in known:
            raise UserError(f"--rows: there is no row {name!r}{did_you_mean(name, known)}")
    if index is not None and rows:
        raise UserError("--index counts the cells of all rows; remove --rows")
    if index is not None and not 0 <= index < len(cells):
        raise UserError(f"--index: expected 0 to {len(cells) - 1}, got {index}")
    if index is not None:
        return [cells[index]]
    return [cell for cell in cells if not rows or cell.row.name in rows]


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path) -> Iterator[None]:
    """Waits until this process alone has the folder, which the tasks of an array share."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    with file:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_plan(
    folder: str | os.PathLike,
    config: ConfigDict,
    rows: Sequence[SweepRow],
    seeds: int,
    names: Sequence[str] = (),
    *,
    tuning: Mapping[str, Any] | None = None,
) -> None:
    """Writes ablation.json, or adds new seeds and rows to it.

    `names`: the rows to add in addition to the baseline; () adds all. `tuning`: how the rows are
    tuned, as `tuning.describe_plan` describes it. Raises UserError if the folder has runs of
    another config, of another row with the same name, or of rows that were tuned otherwise.
    """
    folder = pathlib.Path(folder)
    named = [row for row in rows if not names or row.name in names or row is rows[0]]
    ours, order = _make_plan(config, named, seeds), [row.name for row in rows]
    ours |= {} if tuning is None else {"tuning": configs.to_plain(dict(tuning))}
    with lock_folder(folder):
        path = folder / "ablation.json"
        merged = _merge(folder, ours, workdirs.read_json(path)) if path.is_file() else ours
        merged["rows"].sort(key=lambda row: [*order, row["name"]].index(row["name"]))
        if not path.is_file() or merged != workdirs.read_json(path):
            files.write_json(path, merged)


def write_row_seeds(
    folder: pathlib.Path, seeds: Mapping[str, int], rule: Mapping[str, Any]
) -> None:
    """Adds to ablation.json the rows with more seeds than the others, and the rule that says so."""
    with lock_folder(folder):
        path = folder / "ablation.json"
        plan = workdirs.read_json(path)
        for row in plan["rows"]:
            if (number := max(seeds.get(row["name"], 0), row.get("seeds", 0))) > plan["seeds"]:
                row["seeds"] = number
        plan["stopping"] = dict(rule)
        if plan != workdirs.read_json(path):
            files.write_json(path, plan)


def _make_plan(config: ConfigDict, rows: Sequence[SweepRow], seeds: int) -> dict[str, Any]:
    return {
        "config": configs.to_plain(config),
        "baseline": rows[0].name,
        "seeds": seeds,
        "rows": [{"name": row.name, "overrides": row.overrides} for row in rows],
    }


def _merge(folder: pathlib.Path, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Merges the plan in the folder into ours. Rows without a run are dropped."""
    with_cells = {path.parents[1].name for path in folder.glob("*/seed*/config.json")}
    with_trials = {path.parents[1].name for path in folder.glob("*/tune/study.json")}
    begun = with_cells | (with_trials if "tuning" in ours else set())
    kept = {row["name"]: row["overrides"] for row in theirs["rows"] if row["name"] in begun}
    if not kept:
        return ours
    fields = configs.list_differences(
        ours["config"], configs.add_missing_fields(theirs["config"])[0]
    )
    # A changed data.dir does not count: each cell's fingerprint tells if the data changed.
    fields = [field for field in fields if not field.startswith("data.dir:")]
    if ours["baseline"] != theirs["baseline"]:
        fields.append(f"baseline: {theirs['baseline']} there, {ours['baseline']} here")
    fields += _list_tuning_differences(
        ours.get("tuning"), theirs.get("tuning"), set(kept), has_cells=bool(with_cells)
    )
    for row in ours["rows"]:
        changed = configs.list_differences(
            row["overrides"], kept.pop(row["name"], row["overrides"])
        )
        fields += [f"row {row['name']}: {field}" for field in changed]
    if fields:
        raise UserError(
            f"{folder} holds another ablation ({'; '.join(fields)}); use another --workdir, or"
            " the same config and rows to resume"
        )
    only_theirs = [{"name": name, "overrides": overrides} for name, overrides in kept.items()]
    seeds = max(ours["seeds"], theirs["seeds"])
    merged = ours | {"seeds": seeds, "rows": [*ours["rows"], *only_theirs]}
    more = {row["name"]: row["seeds"] for row in theirs["rows"] if row.get("seeds", 0) > seeds}
    for row in merged["rows"]:
        row |= {"seeds": more[row["name"]]} if row["name"] in more else {}
    if "stopping" in theirs:
        merged["stopping"] = theirs["stopping"]
    if "tuning" in ours:  # the rows that are only there keep their spaces
        spaces = theirs["tuning"]["spaces"] | ours["tuning"]["spaces"]
        merged["tuning"] = ours["tuning"] | {"spaces": spaces}
    return merged


def _list_tuning_differences(
    ours: Mapping[str, Any] | None,
    theirs: Mapping[str, Any] | None,
    begun: set[str],
    has_cells: bool,
) -> list[str]:
    """Lists how the tuning of rows with runs differs. Trials may be added before the first cell."""
    if (ours is None) != (theirs is None):
        there, here = ("not tuned" if each is None else "tuned" for each in (theirs, ours))
        return [f"--tune: {there} there, {here} here"]
    if ours is None or theirs is None:
        return []
    fields = []
    if has_cells and ours["trials"] != theirs["trials"]:
        fields.append(f"--tune: {theirs['trials']} trials there, {ours['trials']} here")
    for name in sorted(begun & ours["spaces"].keys() & theirs["spaces"].keys()):
        if ours["spaces"][name] != theirs["spaces"][name]:
            fields.append(f"the space of row {name} differs")
    return fields


def is_final(status: str) -> bool:
    """Whether a cell with this status is skipped when the ablation is started again."""
    return status in ("complete", "diverged")
