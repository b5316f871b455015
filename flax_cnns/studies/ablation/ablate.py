"""Ablations: changes to one config, trained with several seeds and compared.

A row is a name and overrides, `("mixup", {"mix.mixup": 0.2})`; the first row is the baseline. A
cell is a row with a seed: a run (`flax_cnns.run`) in its own directory and process. Seed s adds s
to `config.seed` in every row. This pairs the rows: cells of one seed have the same initial values
where shapes agree, the same order of the images, the same augmentation and the same split.

ablation.json     the config, the baseline's name, the number of seeds, rows with their overrides
ROW/seedS/        the run
ROW/seedS.json    {"status": complete, failed, diverged or interrupted, "attempts", "error" (one
                  line), "seconds" (of the attempts that were seen to end)}; the status of a running
                  cell is interrupted
ROW/seedS.txt     the run's output

When an ablation is started again, complete cells are skipped, interrupted cells resume, and failed
cells are tried again. A diverged cell is skipped too, because it would diverge again bit for bit;
remove its directory to rerun it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError
from flax_cnns.names import make_console
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runtime import cluster, output
from flax_cnns.studies.ablation import forecast, plan, sharing, stopping, tuning
from flax_cnns.studies.ablation.cells import run_cells
from flax_cnns.studies.ablation.plan import SweepCell, SweepRow
from flax_cnns.studies.ablation.stopping import StoppingRule
from flax_cnns.studies.ablation.tuning import RowTuning
from flax_cnns.train.progress import format_duration


class AblationPlan(NamedTuple):
    """What a start of an ablation will do."""

    rows: list[SweepRow]
    tunings: list[RowTuning]  # of the selected rows; [] if rows are not tuned
    all_tunings: list[RowTuning]
    rule: StoppingRule | None
    cells: list[SweepCell]  # selected
    costs: dict[str, forecast.RowCost]
    metric: str  # without test/


def _make_plan(
    config: ConfigDict,
    sweep: Iterable[tuple[Any, ...]],
    folder: str | os.PathLike,
    *,
    seeds: int,
    index: int | None,
    rows: Sequence[str],
    metric: str,
    tune: int | None,
    space: Mapping[str, Any],
    width: float | None,
    most: int | None,
    baseline: str | os.PathLike | None,
    accept_changed_data: bool,
) -> AblationPlan:
    """Checks everything that can be checked before anything runs. Writes nothing."""
    workdirs.check_location(folder)
    if tune is None and seeds < 1:
        raise UserError(f"--seeds: expected one or more, got {seeds}")
    rule = stopping.check_rule(width, most, seeds)
    if rule is not None and index is not None:
        raise UserError("--index: --width adds cells as it goes; remove --index or --width")
    if tune is not None and baseline is not None:
        raise UserError(
            "--baseline: with --tune, the baseline has trials of its own; remove --baseline"
        )
    if tune is not None and (most := max(seeds, rule.most if rule else 0)) > tuning.SEED_OFFSET:
        raise UserError(f"--seeds: with --tune at most {tuning.SEED_OFFSET}, got {most}")
    sweep_rows = plan.make_rows(config, sweep, folder)
    all_tunings = [] if tune is None else tuning.plan_tuning(sweep_rows, space)
    cells = plan.make_cells(sweep_rows, folder, max(seeds, 1))
    cells = plan.select_cells(cells, rows=rows, index=index)
    first = sweep_rows[0].name
    if rule is not None and all(cell.row.name != first for cell in cells):
        raise UserError(f"--width needs the baseline's cells; add it: --rows={first},...")
    costs = forecast.measure_rows(cells)
    metric = forecast.check_metric(metric, costs)
    tunings = [each for each in all_tunings if each.row.name in costs]
    if seeds < 1:
        cells = []
    if tune is not None:
        tuning.check_index(cells, index, pathlib.Path(folder), tunings, tune)
        data = {name: cost.data.fingerprint for name, cost in costs.items()}
        tuning.check_data(tunings, pathlib.Path(folder), tune, data, accept=accept_changed_data)
    return AblationPlan(sweep_rows, tunings, all_tunings, rule, cells, costs, metric)


@output.safe()
def ablate(
    config: ConfigDict,
    sweep: Iterable[tuple[Any, ...]],
    folder: str | os.PathLike,
    *,
    seeds: int = 3,
    jobs: int | None = None,
    index: int | None = None,
    rows: Sequence[str] = (),
    interval: str = "t",
    margin: float | None = None,
    power: float | None = None,
    metric: str = "accuracy",
    accept_changed_data: bool = False,
    tune: int | None = None,
    space: Mapping[str, Any] = {},
    width: float | None = None,
    most: int | None = None,
    baseline: str | os.PathLike | None = None,
    dry_run: bool = False,
) -> dict[str, int]:
    """Runs the cells of a sweep that are not final, then writes the report.

    rows, index: select rows by name, or one cell by its number.
    jobs: how many cells run at once, see `child.make_device_slots`.
    interval, margin, power, metric: see `report.write`.
    accept_changed_data: see `run_cells`. A row that was tuned on other data keeps its values.
    tune, space: first gives each row this number of trials over `space` and the row's own space,
        see `tuning`. `seeds=0` only tunes.
    width, most: adds seeds until intervals are so narrow or there are so many, see `stopping`.
    baseline: the folder of an ablation whose cells of the same baseline are used, see `sharing`.
    dry_run: only prints what would run and how long that would take. Writes nothing.

    Returns {status: number of cells}; a row of which no trial is complete counts as one failed
    cell. Raises UserError, before anything runs, for everything that a run would refuse before its
    first step. Raises KeyboardInterrupt after Ctrl-C, when the running cells have saved.
    """
    if not dry_run:
        _check_single_process()
    todo = _make_plan(
        config,
        sweep,
        folder,
        seeds=seeds,
        index=index,
        rows=rows,
        metric=metric,
        tune=tune,
        space=space,
        width=width,
        most=most,
        baseline=baseline,
        accept_changed_data=accept_changed_data,
    )
    folder, all_rows, cells = pathlib.Path(folder), todo.rows, todo.cells
    if dry_run:
        _show_plan(todo, folder, jobs, rows, tune, baseline)
        return {}
    untuned: dict[str, str] = {}
    slots = child.make_device_slots(jobs)
    tuning_plan = None
    if tune is not None:
        tuning.check_optuna(todo.tunings, folder, tune)
        tuning_plan = tuning.describe_plan(todo.all_tunings, tune)
        print(tuning.describe_budget(todo.tunings, tune))
    plan.write_plan(folder, config, todo.rows, seeds, rows, tuning=tuning_plan)
    if tune is not None:
        tuned, untuned = tuning.tune_rows(
            todo.tunings, folder, tune, jobs=jobs, accept_changed_data=accept_changed_data
        )
        all_rows = [tuned.get(row.name, row) for row in todo.rows if row.name not in untuned]
        cells = [c._replace(row=tuned[c.row.name]) for c in cells if c.row.name in tuned]
        tuning.check_cells(cells)
    if baseline is not None:
        first = [cell for cell in cells if cell.row is todo.rows[0]]
        if first:
            sharing.share_cells(first, baseline, todo.costs[first[0].row.name].data)
    interrupt, counts = None, {}
    options: dict[str, Any] = dict(accept_changed_data=accept_changed_data, metric=todo.metric)
    try:
        counts = run_cells(cells, slots, todo.costs, **options) if cells else {}
        if todo.rule is not None:
            counts = _add_seeds(todo, cells, seeds, counts, slots, folder, baseline, options)
    except KeyboardInterrupt as error:
        interrupt = error
    # Of the tasks of an array, the last one to finish writes the report.
    all_cells = plan.make_cells(all_rows, folder, max(seeds, 1))
    states = {cell.read_status()["status"] for cell in all_cells}
    is_last = index is None or not states & {"missing", "interrupted"}
    if is_last and ("complete" in states or tune is not None):
        write_report(folder, interval=interval, metric=todo.metric, margin=margin, power=power)
    if interrupt is not None:
        raise interrupt
    return counts | ({"failed": counts.get("failed", 0) + len(untuned)} if untuned else {})


def _add_seeds(
    todo: AblationPlan,
    cells: Sequence[SweepCell],
    seeds: int,
    counts: dict[str, int],
    slots: Sequence[child.DeviceSlot],
    folder: pathlib.Path,
    baseline: str | os.PathLike | None,
    options: Mapping[str, Any],
) -> dict[str, int]:
    """Runs further seeds of the selected rows, and of the baseline, until the rule stops them."""
    rule = todo.rule
    assert rule is not None
    rows = {cell.row.name: cell.row for cell in cells}
    first = todo.rows[0].name
    described = stopping.describe_plan(rule, seeds, todo.metric)
    while not counts.keys() & {"interrupted", "missing"}:  # a signal leaves such cells
        states = stopping.read_states(folder, list(rows), first, rule, todo.metric, seeds)
        wanted = {name: state.seeds for name, state in states.items()}
        plan.write_row_seeds(folder, wanted, described)
        more = plan.make_cells(list(rows.values()), folder, rule.most)
        more = [cell for cell in more if cell.seed < wanted[cell.row.name]]
        if not any(cell.read_status()["status"] in stopping.WAITING for cell in more):
            break
        if baseline is not None:
            shared = [cell for cell in more if cell.row.name == first]
            sharing.share_cells(shared, baseline, todo.costs[first].data)
        print(f"more seeds: {stopping.describe_progress(states, rule, first)}")
        counts = run_cells(more, slots, todo.costs, **options)
    return counts


def _show_plan(
    todo: AblationPlan,
    folder: pathlib.Path,
    jobs: int | None,
    rows: Sequence[str],
    tune: int | None,
    baseline: str | os.PathLike | None,
) -> None:
    """Prints what `ablate` would run and how long that would take."""
    cells, costs = todo.cells, todo.costs
    slots = child.make_device_slots(jobs)
    all_cells = cells or plan.select_cells(plan.make_cells(todo.rows, folder, 1), rows=rows)
    seconds, basis = forecast.forecast_seconds(all_cells, costs, slots[0])
    console = make_console(width=max(100, make_console().width))
    trials: list[float] = []
    if tune is not None:
        print(tuning.describe_budget(todo.tunings, tune))
        console.print(tuning.make_budget_table(todo.tunings, tune, folder))
        left = {t.row.name: tune - tuning.count_done(folder, t.row.name) for t in todo.tunings}
        trials = [seconds[name] for name, number in left.items() for _ in range(number)]
    if cells:
        console.print(forecast.make_plan_table(cells, costs, seconds))
    if baseline is not None and (first := [c for c in cells if c.row is todo.rows[0]]):
        sharing.share_cells(first, baseline, costs[first[0].row.name].data, dry_run=True)
    waiting = [seconds[c.row.name] for c in cells if not plan.is_final(c.read_status()["status"])]
    for cell in cells:
        if differs := workdirs.find_data_differences(cell.workdir, costs[cell.row.name].data):
            changes = fingerprints.join_first(differs)
            print(f"{cell.name}: its data changed: {changes}; it will run again")
    remaining = format_duration(forecast.compute_makespan([*trials, *waiting], len(slots)))
    what = f"{len(trials)} trials left and {len(cells)} cells" if tune else f"{len(cells)} cells"
    print(
        f"{what}, {len(cells) - len(waiting)} done; {len(slots)} at once, about"
        f" {remaining} left (estimated {basis})"
    )
    if todo.rule is not None:
        rule = todo.rule
        print(f"then seeds are added until --width={rule.width:g} or --most={rule.most}")


def write_report(
    folder: str | os.PathLike,
    *,
    interval: str = "t",
    metric: str = "accuracy",
    margin: float | None = None,
    power: float | None = None,
) -> None:
    """Writes the report of the complete cells and prints the files' names. Raises UserError."""
    folder = pathlib.Path(folder)
    if not (folder / "ablation.json").is_file():
        raise UserError(f"{folder}: no ablation here (ablation.json is missing)")
    # Imported late: the report needs SciPy and matplotlib, training does not.
    from flax_cnns.studies.ablation import report as ablation_report

    with plan.lock_folder(folder):
        paths = ablation_report.write(
            folder, interval=interval, metric=metric, margin=margin, power=power
        )
    print(f"written to {folder}: {', '.join(pathlib.Path(path).name for path in paths)}")


def _check_single_process() -> None:
    if cluster.is_one_of_several(os.environ):
        raise UserError(
            "an ablation is one process that starts others; start a single process, for example"
            " with srun --ntasks=1, or an array of single processes with --index"
        )
