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
from typing import Any

from ml_collections import ConfigDict

from flax_cnns.data import fingerprint as fingerprints
from flax_cnns.errors import UserError
from flax_cnns.names import make_console
from flax_cnns.runs import child
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runtime import launch, output
from flax_cnns.studies.ablation import forecast, plan
from flax_cnns.studies.ablation.cells import run_cells
from flax_cnns.train.progress import format_duration


@output.safe()
def ablate(
    config: ConfigDict,
    sweep: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | os.PathLike,
    *,
    seeds: int = 3,
    jobs: int | None = None,
    index: int | None = None,
    rows: Sequence[str] = (),
    interval: str = "t",
    margin: float | None = None,
    metric: str = "accuracy",
    accept_changed_data: bool = False,
) -> dict[str, int]:
    """Runs the cells of a sweep that are not final, then writes the report.

    `rows` selects rows by name, `index` selects one cell by its number. `jobs`: how many cells run
    at once, see `child.make_device_slots`. `interval`, `margin`, `metric`: see `report.write`.
    `accept_changed_data`: see `run_cells`. Returns {status: number of cells}.

    Raises UserError, before anything runs, for everything that a run would refuse before its first
    step. Raises KeyboardInterrupt after Ctrl-C, when the running cells have saved.
    """
    _check_single_process()
    workdirs.check_location(folder)
    sweep_rows = plan.make_rows(config, sweep, folder)
    all_cells = plan.make_cells(sweep_rows, folder, seeds)
    cells = plan.select_cells(all_cells, rows=rows, index=index)
    costs = forecast.measure_rows(cells)
    metric = forecast.check_metric(metric, costs)
    slots = child.make_device_slots(jobs)
    plan.write_plan(folder, config, sweep_rows, seeds, rows)
    interrupt, counts = None, {}
    try:
        counts = run_cells(
            cells, slots, costs, accept_changed_data=accept_changed_data, metric=metric
        )
    except KeyboardInterrupt as error:
        interrupt = error
    # Of the tasks of an array, the last one to finish writes the report.
    states = {cell.read_status()["status"] for cell in all_cells}
    if "complete" in states and (index is None or not states & {"missing", "interrupted"}):
        write_report(folder, interval=interval, metric=metric, margin=margin)
    if interrupt is not None:
        raise interrupt
    return counts


def show_plan(
    config: ConfigDict,
    sweep: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | os.PathLike,
    *,
    seeds: int = 3,
    jobs: int | None = None,
    index: int | None = None,
    rows: Sequence[str] = (),
    metric: str = "accuracy",
) -> None:
    """Prints what `ablate` would run and how long that would take. Writes nothing.

    Raises UserError as `ablate` does.
    """
    workdirs.check_location(folder)
    sweep_rows = plan.make_rows(config, sweep, folder)
    cells = plan.select_cells(plan.make_cells(sweep_rows, folder, seeds), rows=rows, index=index)
    costs = forecast.measure_rows(cells)
    forecast.check_metric(metric, costs)
    slots = child.make_device_slots(jobs)
    seconds, basis = forecast.forecast_seconds(cells, costs, slots[0])
    console = make_console(width=max(100, make_console().width))
    console.print(forecast.make_plan_table(cells, costs, seconds))
    waiting = [seconds[c.row.name] for c in cells if not plan.is_final(c.read_status()["status"])]
    for cell in cells:
        if differs := workdirs.find_data_differences(cell.workdir, costs[cell.row.name].data):
            changes = fingerprints.join_first(differs)
            print(f"{cell.name}: its data changed: {changes}; it will run again")
    remaining = format_duration(forecast.compute_makespan(waiting, len(slots)))
    print(
        f"{len(cells)} cells, {len(cells) - len(waiting)} done; {len(slots)} at once, about"
        f" {remaining} left (estimated {basis})"
    )


def write_report(
    folder: str | os.PathLike,
    *,
    interval: str = "t",
    metric: str = "accuracy",
    margin: float | None = None,
) -> None:
    """Writes the report of the complete cells and prints the files' names. Raises UserError."""
    folder = pathlib.Path(folder)
    if not (folder / "ablation.json").is_file():
        raise UserError(f"{folder}: no ablation here (ablation.json is missing)")
    # Imported late: the report needs SciPy and matplotlib, training does not.
    from flax_cnns.studies.ablation import report as ablation_report

    with plan.lock_folder(folder):
        paths = ablation_report.write(folder, interval=interval, metric=metric, margin=margin)
    print(f"written to {folder}: {', '.join(pathlib.Path(path).name for path in paths)}")


def _check_single_process() -> None:
    several = launch.find_cluster(os.environ) in ("SLURM", "Open MPI", "Kubernetes")
    if several or os.environ.get(launch.COORDINATOR):
        raise UserError(
            "an ablation is one process that starts others; start a single process, for example"
            " with srun --ntasks=1, or an array of single processes with --index"
        )
