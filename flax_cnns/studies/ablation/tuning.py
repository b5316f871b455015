"""Tunes every row of an ablation with the same budget before the rows are compared.

A row's strength decides what the row shows, and so does a learning rate that was chosen for the
baseline. So each row, the baseline included, gets the same number of trials over its own space, on
the validation split. The row's cells then run with the values of its best trial. Trials never see
the test split, and their seed is not one of the cells'.

ROW/tune/        the row's search, see `studies.search.tuning`
ROW/tuned.json   its config, space and trials, and the number of the best trial
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from flax_cnns import config as configs
from flax_cnns import files, recipes
from flax_cnns.config import spaces
from flax_cnns.config.spaces import Distribution
from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.studies.ablation import plan
from flax_cnns.studies.ablation.plan import SweepCell, SweepRow
from flax_cnns.studies.ablation.tuned_rows import TunedRow, read_tuned_row
from flax_cnns.studies.ablation.untuned import find_untuned

SEED_OFFSET = 10_000  # of the trials: the cells have the seeds config.seed + 0, 1, 2, ...


@dataclasses.dataclass(frozen=True)
class RowTuning:
    """What is tuned in a row."""

    row: SweepRow
    space: dict[str, Distribution]
    untuned: dict[str, Any] | None  # drawn values of the row's config; None if the space lacks them

    @property
    def config(self) -> ConfigDict:
        """The config of the row's trials."""
        config = ConfigDict(self.row.config.to_dict())
        config.seed += SEED_OFFSET
        config.train.evaluate_train = False
        return configs.reset_inert_fields(config)


# ---------------------------------------------------------------------------- the plan


def load_space(file: str | os.PathLike) -> dict[str, Any]:
    """Returns the space that all rows share: `space()` of a config file, {} if it has none."""
    function = getattr(recipes.load(file), "space", None)
    if function is None:
        return {}
    space = function() if callable(function) else function
    if not isinstance(space, Mapping):
        raise UserError(f"{file}: space() must return {{field: distribution}}, got {space!r}")
    return dict(space)


def plan_tuning(rows: Sequence[SweepRow], common: Mapping[str, Any]) -> list[RowTuning]:
    """Returns what is tuned in each row: `common`, the space of all rows, and the row's own space.

    A field of `common` that a row never draws, because the row's config makes its condition false,
    is left out there. Raises UserError for a row without any dimension, for what
    `spaces.check_space` refuses, for a field of `common` that no row draws, and for an override of
    the row that is outside of its space.
    """
    tunings, unused = [], dict.fromkeys(common, "")
    for row in rows:
        space = {**common, **row.space}
        shared = common.keys() - row.space.keys()
        try:
            if space:
                spaces.check_space(row.config, space, shared=shared)
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from None
        never_drawn = spaces.find_never_drawn(row.config, space)
        space = {path: each for path, each in space.items() if path not in never_drawn}
        unused = {path: never_drawn[path] for path in unused if path in never_drawn}
        if not space:
            raise UserError(
                f"--tune: row {row.name} has no space: give it as the third part of the row in"
                " sweep(), or give all rows one by space()"
            )
        try:
            untuned = find_untuned(row.config, space, set(configs.flatten(row.overrides)))
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from None
        tunings.append(RowTuning(row, space, untuned))
    for path, reason in unused.items():
        raise UserError(f"space(): no row ever draws {path}; in the last one, {reason}")
    return tunings


def describe_plan(tunings: Sequence[RowTuning], trials: int) -> dict[str, Any]:
    """Returns the tuning as `ablation.json` records it."""
    described = {tuning.row.name: spaces.describe_space(tuning.space) for tuning in tunings}
    return {"trials": trials, "spaces": described}


def make_budget_table(tunings: Sequence[RowTuning], trials: int, folder: pathlib.Path) -> Table:
    """Makes a table of what each row tunes and of its equal budget."""
    table = Table(title=f"every row gets {trials} trials on the validation split")
    for column in ("row", "trials", "done", "tuned", "trial 0"):
        table.add_column(column, justify="right" if column in ("trials", "done") else "left")
    for tuning in tunings:
        done = count_done(folder, tuning.row.name)
        ranges = [f"{path} {describe_range(each)}" for path, each in tuning.space.items()]
        first = "the row as it is" if tuning.untuned is not None else "drawn like the others"
        table.add_row(tuning.row.name, str(trials), str(done), "\n".join(ranges), first)
    return table


def describe_range(distribution: Distribution) -> str:
    """Describes a distribution: "0.01 to 1, log", "2 to 9", "sgd or adam, conditional"."""
    condition = ", conditional" if distribution.when else ""
    if distribution.kind == "choice":
        return " or ".join(map(str, distribution.labels)) + condition
    log = ", log" if distribution.log else ""
    return f"{distribution.low:g} to {distribution.high:g}{log}{condition}"


def describe_budget(tunings: Sequence[RowTuning], trials: int) -> str:
    """Says in a sentence that the budgets are equal."""
    dimensions = sorted({len(tuning.space) for tuning in tunings})
    fields = " to ".join(map(str, [dimensions[0], dimensions[-1]][: len(dimensions)]))
    return (
        f"equal budgets: {trials} trials for each of {len(tunings)} rows, {trials * len(tunings)}"
        f" trials without pruning, over spaces of {fields} fields; scored on the validation split"
    )


def count_done(folder: pathlib.Path, row: str) -> int:
    """Counts the trials of a row that have ended."""
    if (known := read_tuned_row(folder, row)) is not None:
        return len(known.trials)
    return len(list((folder / row / "tune" / "trials").glob("*/summary.json")))


def check_optuna(tunings: Sequence[RowTuning], folder: pathlib.Path, trials: int) -> None:
    """Raises UserError if a row has yet to be tuned, but Optuna is missing."""
    if any(_read_if_same(tuning, folder, trials) is None for tuning in tunings):
        from flax_cnns.studies.search.tuning import storage

        storage.import_optuna()


def check_index(
    cells: Sequence[SweepCell],
    index: int | None,
    folder: pathlib.Path,
    tunings: Sequence[RowTuning],
    trials: int,
) -> None:
    """Raises UserError if --index names a cell of a row that is not tuned yet.

    Without cells, --index names the row to tune.
    """
    if index is None or not cells or _read_if_same(tunings[0], folder, trials) is not None:
        return
    name = cells[0].row.name
    raise UserError(
        f"--index: row {name} is not tuned yet: first tune all rows, for example by an array over"
        f" the rows with --seeds=0 --index=ROW'S NUMBER, or this row by --seeds=0 --rows={name}"
    )


def check_data(
    tunings: Sequence[RowTuning],
    folder: pathlib.Path,
    trials: int,
    data: Mapping[str, Mapping[str, Any]],
    *,
    accept: bool,
    say: Callable[[str], None] = print,
) -> None:
    """Raises UserError if a row was tuned on other data than `data`, {row: fingerprint now}.

    With `accept`, says so instead. A row that is not tuned yet is checked by its study.
    """
    for tuning in tunings:
        name = tuning.row.name
        known = _read_if_same(tuning, folder, trials)
        if known is None or not known.data:
            continue
        if not (changes := fingerprints.find_differences(known.data, data[name])):
            continue
        changed = f"row {name} was tuned on other data: {fingerprints.join_first(changes)}"
        if not accept:
            raise UserError(
                f"{changed}; restore the data, remove {folder / name} to tune it again, or keep its"
                " values with --accept-changed-data"
            )
        say(f"accepted: {changed}")


# ---------------------------------------------------------------------------- running


def tune_rows(
    tunings: Sequence[RowTuning],
    folder: pathlib.Path,
    trials: int,
    *,
    jobs: int | None = None,
    accept_changed_data: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, SweepRow], dict[str, str]]:
    """Tunes the rows that are not tuned yet, one after the other.

    Returns ({name: row with the values of its best trial}, {name of a row of which no trial is
    complete: why}). The values of the trials come from a Sobol sequence, so they do not depend on
    `jobs`. Raises KeyboardInterrupt after Ctrl-C and `Preempted` after SIGTERM, when the running
    trials have saved.
    """
    tuned: dict[str, SweepRow] = {}
    failed: dict[str, str] = {}
    for number, tuning in enumerate(tunings, 1):
        name = tuning.row.name
        known = _read_if_same(tuning, folder, trials)
        if known is None:
            say(f"row {name}, {number} of {len(tunings)}: {trials} trials")
            known = _tune_row(tuning, folder, trials, jobs, accept_changed_data)
        if known.chosen is None:
            failed[name] = next((t.error for t in known.trials if t.error), "")
            say(f"row {name}: none of its {trials} trials is complete: {failed[name]}")
        else:
            values = spaces.format_values(known.chosen.values)
            say(f"row {name}: trial {known.best} is the best: {values}")
            tuned[name] = apply_tuned(tuning.row, known)
    return tuned, failed


def _tune_row(
    tuning: RowTuning, folder: pathlib.Path, trials: int, jobs: int | None, accept: bool
) -> TunedRow:
    # Imported late: it needs Optuna.
    from flax_cnns.studies.search import tuning as searches

    name = tuning.row.name
    study = folder / name / "tune"
    try:
        searches.tune(
            tuning.config,
            tuning.space,
            study,
            trials=trials,
            sampler="qmc",
            first=[] if tuning.untuned is None else [tuning.untuned],
            jobs=jobs,
            seed=tuning.config.seed,
            accept_changed_data=accept,
        )
    except UserError as error:
        # A row without a complete trial is left out. Anything else is a mistake.
        if not _have_all_failed(study, trials):
            raise UserError(f"row {name}: {error}") from None
    _write_tuned_row(tuning, folder, trials)
    known = read_tuned_row(folder, name)
    assert known is not None  # it was just written
    return known


def apply_tuned(row: SweepRow, tuned: TunedRow) -> SweepRow:
    """Returns the row with the values of its best trial."""
    assert tuned.chosen is not None
    config = plan.apply_overrides(row.config, _to_tuples(tuned.chosen.fields))
    configs.validate(config)
    return row._replace(config=config)


def check_cells(cells: Sequence[SweepCell]) -> None:
    """Raises UserError if a cell began with other values than those chosen now."""
    for cell in cells:
        if not workdirs.has_begun(cell.workdir):
            continue
        theirs = configs.add_missing_fields(workdirs.read_json(cell.workdir / "config.json"))[0]
        ours = configs.to_plain(cell.config)
        fields = configs.list_differences(ours, configs.reset_inert_fields_like(ours, theirs))
        fields = [field for field in fields if not field.startswith("data.dir:")]
        if fields:
            raise UserError(
                f"{cell.workdir} began with other values than the row's tuning chooses now"
                f" ({'; '.join(fields)}); remove {cell.folder}, or use another --workdir"
            )


def _to_tuples(value: Any) -> Any:
    """Returns a value from JSON with tuples for lists, as config files write them."""
    if isinstance(value, Mapping):
        return {name: _to_tuples(each) for name, each in value.items()}
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _have_all_failed(folder: pathlib.Path, trials: int) -> bool:
    """Whether a study has all its trials, and none is complete."""
    from flax_cnns.studies.search.tuning import read_study

    try:
        study = read_study(folder)
    except UserError:
        return False
    return len(study.trials) >= trials and all(trial.state == "failed" for trial in study.trials)


# ---------------------------------------------------------------------------- ROW/tuned.json


def _write_tuned_row(tuning: RowTuning, folder: pathlib.Path, trials: int) -> None:
    from flax_cnns.studies.search.tuning import read_study, records

    study = read_study(folder / tuning.row.name / "tune")
    facts = records.read_facts(study.folder)
    assert facts is not None  # the study was just read
    ours = study.trials[:trials]  # an earlier command may have asked for more
    best = records.find_best(ours, study.mode)
    content = {
        "config": configs.to_plain(tuning.config),
        "data": facts["data"],
        "space": spaces.describe_space(tuning.space),
        "metric": study.metric,
        "mode": study.mode,
        "has_untuned": tuning.untuned is not None,
        "trials": [
            {
                "number": trial.number,
                "values": trial.values,
                "fields": trial.fields,
                "state": trial.state,
                "validation": trial.value if trial.state == "complete" else None,
                "error": trial.error,
            }
            for trial in ours
        ],
        "best": None if best is None else best.number,
    }
    files.write_json(folder / tuning.row.name / "tuned.json", configs.to_plain(content))


def _read_if_same(tuning: RowTuning, folder: pathlib.Path, trials: int) -> TunedRow | None:
    """Reads the row's outcome if it is of the same config, space and number of trials."""
    known = read_tuned_row(folder, tuning.row.name)
    if known is None or len(known.trials) != trials:
        return None
    is_same = known.config == configs.to_plain(tuning.config)
    return known if is_same and known.space == spaces.describe_space(tuning.space) else None
