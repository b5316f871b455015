"""A table of all 729 cells: every cell trained once, every tenth with three seeds.

    flax-cnns search nas --space=cells --table --workdir=runs/cells --data-dir=DIR

makes it. The shipped table, fashion_mnist_729.json beside this file, was made by this command.

Cells of the same pruned cell (space.py) are the same network, start from the same weights and
train to the same weights. So each pruned cell is trained once with each seed, 360 of 729 with seed
0. Cells that compute the same function with other edges are trained separately: their weights start
elsewhere.

Every training ends with a line in WORKDIR/trainings.jsonl. A process that is killed loses the
training at hand; the same command goes on and makes the same table.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_cnns import files
from flax_cnns.analysis.cost import cost
from flax_cnns.checkpoint.lock import DirectoryLock
from flax_cnns.errors import UserError
from flax_cnns.models.nas_bench_201 import CellNetwork
from flax_cnns.studies.search.nas.cells import journal
from flax_cnns.studies.search.nas.cells.space import SMALL_SPACE, list_cells, prune_cell
from flax_cnns.studies.search.nas.cells.training import CellTrainer, Recipe, Trained, read_images

SHIPPED = Path(__file__).with_name("fashion_mnist_729.json")
COMMAND = "flax-cnns search nas --space=cells --table --workdir=runs/cells --data-dir=DIR"
SEEDS = (0, 1, 2)
RECIPE = Recipe()
IMAGE_SHAPE = (14, 14, 1)
EVERY = 10  # every tenth cell is trained with all seeds


class CellRow(NamedTuple):
    """What the table knows about a cell."""

    cell: str
    params: int
    macs: int  # of one image
    seconds: float  # processor seconds of the training with seed 0
    validation: tuple[float, ...]  # accuracies in 0..1, one for each seed
    test: tuple[float, ...]


class CellTable(NamedTuple):
    """The table of a space."""

    rows: dict[str, CellRow]  # by cell, in the order of list_cells
    recipe: dict[str, Any]  # the fields of Recipe


class Training(NamedTuple):
    """A training of the plan."""

    cell: str  # pruned
    seed: int


def plan_trainings() -> list[Training]:
    """Lists the trainings of the table: all pruned cells with seed 0, then the further seeds."""
    cells = list_cells(SMALL_SPACE)
    every = [Training(prune_cell(cell), SEEDS[0]) for cell in cells]
    more = [Training(prune_cell(cell), seed) for seed in SEEDS[1:] for cell in cells[::EVERY]]
    return list(dict.fromkeys(every + more))


def count_cost(cell: str, recipe: Recipe, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns parameters and MACs of one image of a cell's network."""
    network = CellNetwork(cell=cell, num_classes=10, **recipe.fields(image_shape))
    total = cost(network, (1, *image_shape))
    return total.params, total.macs


# ---------------------------------------------------------------------------- making it


def make_table(
    folder: Path,
    data_dir: Path,
    recipe: Recipe = RECIPE,
    *,
    plan: list[Training] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Trains what is missing, writes WORKDIR/table.json, and returns its path.

    `plan` holds the trainings; None: those of the whole table. Raises `UserError` if the folder
    holds trainings with another recipe, or if another process uses it.
    """
    plan = plan_trainings() if plan is None else plan
    with DirectoryLock(folder):
        _check_recipe(folder / "recipe.json", recipe)
        path = folder / "trainings.jsonl"
        done = read_trainings(path)
        missing = [training for training in plan if training not in done]
        say(f"{len(plan)} trainings, {len(plan) - len(missing)} of them done")
        if missing:
            images = read_images(data_dir, recipe)
            say(f"compiling one program for all cells; {recipe.steps} steps for each training")
            trainer = CellTrainer(recipe, images)
            trainer.train(plan[0].cell, plan[0].seed)  # compiles, so that no row's time includes it
            clock = _Clock(missing, say)
            for i, training in enumerate(missing, 1):
                trained = trainer.train(*training)
                journal.append_row(path, training._asdict() | trained._asdict())
                done[training] = trained
                clock.report(i)
        content = write_content(done, recipe, plan)
        files.write_text(folder / "table.json", content)
    return folder / "table.json"


class _Clock:
    """Says how long the rest will take. A training takes longer with more convolutions."""

    def __init__(self, trainings: list[Training], say: Callable[[str], None]):
        self.loads = np.cumsum([2 + t.cell.count("nor_conv") for t in trainings])
        self.start, self.say = time.perf_counter(), say

    def report(self, done: int) -> None:
        total = len(self.loads)
        if done in (3, total) or done % 20 == 0:
            seconds = time.perf_counter() - self.start
            left = seconds * (self.loads[-1] / self.loads[done - 1] - 1)
            self.say(
                f"{done}/{total} trainings, {seconds / done:.1f} s each, about {left / 60:.0f} min"
                " left"
            )


def _check_recipe(path: Path, recipe: Recipe) -> None:
    """Writes the recipe into a new folder; raises UserError if the folder has another one."""
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if not path.exists():
        files.write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{path.parent} has trainings with {name}={found.get(name)}, not {wanted[name]}; use"
            " another --workdir"
        )


def read_trainings(path: Path) -> dict[Training, Trained]:
    """Reads trainings.jsonl."""
    return {
        Training(row["cell"], row["seed"]): Trained(row["validation"], row["test"], row["seconds"])
        for row in journal.read_rows(path)
    }


def write_content(done: dict[Training, Trained], recipe: Recipe, plan: list[Training]) -> str:
    """Returns the table's JSON, with one line for each cell that the plan trains."""
    costs: dict[int, tuple[int, int]] = {}  # by the number of convolutions
    lines = []
    planned = set(plan)
    for cell in list_cells(SMALL_SPACE):
        pruned = prune_cell(cell)
        trained = [done[t] for t in (Training(pruned, s) for s in SEEDS) if t in planned]
        if not trained:
            continue
        count = cell.count("nor_conv_3x3")
        if count not in costs:
            costs[count] = count_cost(cell, recipe, IMAGE_SHAPE)
        row = CellRow(
            cell,
            *costs[count],
            round(trained[0].seconds, 2),
            tuple(round(t.validation, 5) for t in trained),
            tuple(round(t.test, 5) for t in trained),
        )
        lines.append(json.dumps(row))
    head = {
        "command": COMMAND,
        "data": "Fashion-MNIST, means of 2x2 pixels",
        "recipe": dataclasses.asdict(recipe),
        "columns": CellRow._fields,
    }
    body = ",\n".join(lines)
    return f'{json.dumps(head)[:-1]},\n"rows": [\n{body}\n]}}\n'


# ---------------------------------------------------------------------------- reading it


def read_table(path: Path | None = None) -> CellTable:
    """Reads a table; None: the shipped one. Raises `UserError` if the file is not a table."""
    path = SHIPPED if path is None else path
    try:
        content = json.loads(path.read_text())
        rows = [CellRow(*row[:4], *map(tuple, row[4:])) for row in content["rows"]]
        recipe = content["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read the table {path}: {error}; make one with search nas --table"
        ) from None
    return CellTable({row.cell: row for row in rows}, recipe)
