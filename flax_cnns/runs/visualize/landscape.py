"""The loss around a run's weights: planes, a line to another run, the run's path, curvature."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_cnns import files
from flax_cnns.analysis.landscape import curvature, directions, grids
from flax_cnns.analysis.landscape.objective import Levels
from flax_cnns.analysis.plots import landscapes as plots
from flax_cnns.checkpoint import finding
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.variables import load_variables
from flax_cnns.runs.visualize.loss import (
    BATCHNORM,
    DEFAULTS,
    Checkpoint,
    Settings,
    check_batchnorm,
    describe,
    explain,
    load_checkpoint,
    make_loss,
    make_reestimation,
)

MIN_CHECKPOINTS = 3  # of a trajectory


def draw_landscape(
    runs: Sequence[str | os.PathLike],
    picture: str | os.PathLike,
    settings: Settings = DEFAULTS,
    *,
    span: float = 1.0,
    surface: bool = False,
) -> list[Levels]:
    """Draws the loss on a plane around each run's weights, and returns losses and accuracies.

    Two random directions, normalized by filter, span each plane, from -`span` to `span`. Runs are
    drawn next to each other with one scale. `surface` draws a surface, too. Rows are kept in the
    folder of `find_rows_folder(picture)`. Raises UserError.
    """
    check_batchnorm(settings, "running", "batch")
    folder = find_rows_folder(picture)
    checkpoints = [
        load_checkpoint(run, trust=settings.trust, accept=settings.accept) for run in runs
    ]
    offsets = np.linspace(-span, span, settings.grid)
    planes = []
    for number, checkpoint in enumerate(checkpoints, 1):
        settings.say(checkpoint.title)
        loss = make_loss(checkpoint, settings)
        keys = jax.random.split(jax.random.key(settings.seed))
        params = checkpoint.variables["params"]
        first, second = (directions.random_direction(params, key) for key in keys)
        levels = grids.evaluate_plane(
            loss,
            checkpoint.variables,
            (first, second),
            offsets,
            offsets,
            folder=folder / f"{number}-{checkpoint.folder.name}",
            about=describe(checkpoint, settings),
            say=settings.say,
        )
        planes.append(plots.Plane(checkpoint.title, offsets, offsets, *levels))
    table = [
        (plane.title, x, y, plane.losses[j, i], plane.accuracies[j, i])
        for plane in planes
        for j, y in enumerate(offsets)
        for i, x in enumerate(offsets)
    ]
    _write_csv(folder / "levels.csv", ("network", "x", "y", "loss", "accuracy"), table)
    note = f"{explain(checkpoints[0], settings)}; directions: random, normalized by filter"
    plots.draw_planes(planes, picture, note=note, surface=surface)
    return [Levels(plane.losses, plane.accuracies) for plane in planes]


def draw_line(
    start: str | os.PathLike,
    end: str | os.PathLike,
    picture: str | os.PathLike,
    settings: Settings = DEFAULTS,
    *,
    splits: Sequence[str] = (),
) -> dict[str, Levels]:
    """Draws loss and accuracy on the line through the weights of two runs or two checkpoints.

    Returns {split: levels}, at the points of `list_alphas(settings.grid)`. `splits`: by default
    train and test. Images and loss are those of the first run. Points are kept in the folder of
    `find_rows_folder(picture)`. Raises UserError, also if the networks of the two differ.
    """
    check_batchnorm(settings, *BATCHNORM)
    first, second = (
        load_checkpoint(run, trust=settings.trust, accept=settings.accept) for run in (start, end)
    )
    _check_same_network(first, second)
    has_train = not first.components.dataset.is_stream  # the training batches of a stream never end
    splits = splits or [
        name
        for name in ("train", "test")
        if name in first.components.dataset.splits and (name != "train" or has_train)
    ]
    alphas = list_alphas(settings.grid)
    reestimate = None
    if settings.batchnorm == "reestimate":
        reestimate = make_reestimation(first, settings.images)
    folder, found = find_rows_folder(picture), {}
    for split in splits:
        settings.say(f"{split} split")
        chosen = dataclasses.replace(settings, split=split)
        found[split] = grids.evaluate_line(
            make_loss(first, chosen),
            first.variables,
            second.variables,
            alphas,
            reestimate=reestimate,
            folder=folder / split,
            about=describe(first, chosen),
            say=settings.say,
        )
    table = [
        (split, alpha, loss, accuracy)
        for split, levels in found.items()
        for alpha, loss, accuracy in zip(alphas, *levels)
    ]
    _write_csv(folder / "levels.csv", ("split", "alpha", "loss", "accuracy"), table)
    note = explain(first, settings, " and ".join(splits))
    if settings.batchnorm == "running":
        note = note.replace("running statistics", "interpolated running statistics")
    plots.draw_line(alphas, found, (first.title, second.title), picture, note=note)
    return found


def list_alphas(count: int) -> np.ndarray:
    """Returns about `count` positions from -0.5 to 1.5, always with 0 and 1, the two ends."""
    evenly = np.linspace(-0.5, 1.5, count)
    inner = evenly[np.abs(evenly[:, None] - [0.0, 1.0]).min(1) > 1e-9]
    return np.sort(np.concatenate([inner, [0.0, 1.0]]))


def draw_trajectory(
    run: str | os.PathLike, picture: str | os.PathLike, settings: Settings = DEFAULTS
) -> directions.Trajectory:
    """Draws the path of a run's kept checkpoints, in the plane that holds most of it, over the loss
    on that plane.

    The path ends at the checkpoint that `run` names, by default the latest. BatchNorm's running
    statistics are those of that checkpoint on the whole plane. Rows are kept in the folder of
    `find_rows_folder(picture)`. Raises UserError, also if there are fewer than `MIN_CHECKPOINTS`.
    """
    check_batchnorm(settings, "running", "batch")
    place, which = workdirs.split_checkpoint(run, "")
    last = load_checkpoint(
        f"{place}@{which or 'latest'}", trust=settings.trust, accept=settings.accept
    )
    steps = [step for step in finding.all_steps(place) if step <= last.step]
    if len(steps) < MIN_CHECKPOINTS:
        raise UserError(
            f"{place} keeps {len(steps)} checkpoints up to step {last.step}; a trajectory needs at"
            f" least {MIN_CHECKPOINTS}: train with --config.checkpoint.keep_latest=20"
            " --config.checkpoint.every='1 epochs'"
        )
    components = last.components
    path = [
        components.stack_if_scanned(load_variables(components, place, str(step))[0])
        for step in steps
    ]
    trajectory = directions.fit_trajectory([each["params"] for each in path])
    loss = make_loss(last, settings)
    own = [loss.measure(each) for each in path]
    low, high = trajectory.points.min(0), trajectory.points.max(0)
    margin = 0.15 * (high - low)
    xs, ys = np.linspace(low - margin, high + margin, settings.grid).T
    folder = find_rows_folder(picture)
    levels = grids.evaluate_plane(
        loss,
        last.variables,
        trajectory.directions,
        xs,
        ys,
        folder=folder / last.folder.name,
        about=describe(last, settings),
        say=settings.say,
    )
    table = [
        (step, *point, *each) for step, point, each in zip(steps, trajectory.points.tolist(), own)
    ]
    _write_csv(folder / "points.csv", ("step", "x", "y", "loss", "accuracy"), table)
    plots.draw_trajectory(
        plots.Plane(last.title, xs, ys, *levels),
        trajectory.points,
        steps,
        trajectory.explained,
        picture,
        note=explain(last, settings),
    )
    return trajectory


class Curvature(NamedTuple):
    """A row of the table of `tabulate_curvature`."""

    network: str
    loss: float
    accuracy: float
    gradient_norm: float
    sharpness: float
    eigenvalues: tuple[float, ...]  # largest first, in absolute value
    steps: tuple[int, ...]  # of the power iteration for each eigenvalue


def tabulate_curvature(
    runs: Sequence[str | os.PathLike],
    table: str | os.PathLike,
    settings: Settings = DEFAULTS,
    *,
    count: int = 1,
    rho: float = 0.05,
    tolerance: float = 1e-3,
) -> list[Curvature]:
    """Writes a CSV file with the top Hessian eigenvalues and SAM's sharpness of each run's weights,
    and prints its lines.

    Raises UserError.
    """
    check_batchnorm(settings, "running", "batch")
    found = []
    for run in runs:
        checkpoint = load_checkpoint(run, trust=settings.trust, accept=settings.accept)
        settings.say(checkpoint.title)
        loss = make_loss(checkpoint, settings)
        variables = checkpoint.variables
        levels = loss.measure(variables)
        norm = curvature.measure_norm(loss.gradient(variables))
        sharpness = curvature.measure_sharpness(loss, variables, rho)
        pairs = curvature.find_top_eigenvalues(
            loss,
            variables,
            count,
            key=jax.random.key(settings.seed),
            tolerance=tolerance,
            say=settings.say,
        )
        values = tuple(pair.value for pair in pairs)
        steps = tuple(pair.steps for pair in pairs)
        found.append(
            Curvature(
                checkpoint.title,
                float(levels.losses),
                float(levels.accuracies),
                norm,
                sharpness,
                values,
                steps,
            )
        )
    header = ["network", "split", "images", "batchnorm", "loss", "accuracy", "gradient norm"]
    header += [f"sharpness (rho {rho:g})"]
    header += [f"eigenvalue {i + 1}" for i in range(count)]
    header += [f"steps {i + 1}" for i in range(count)]
    shared = settings.split, loss.count, settings.batchnorm
    rows = [(row.network, *shared, *row[1:5], *row.eigenvalues, *row.steps) for row in found]
    _write_csv(Path(table), header, rows)
    _print_table(header, rows, settings.say)
    return found


def find_rows_folder(picture: str | os.PathLike) -> Path:
    """Returns the folder of the saved rows of a picture: `landscape.rows` of `landscape.png`."""
    return Path(picture).with_suffix(".rows")


def _check_same_network(first: Checkpoint, second: Checkpoint) -> None:
    ours, theirs = (grids.describe_network(each.components.model) for each in (first, second))
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{first.folder} and {second.folder} have different networks: {name} is"
            f" {ours.get(name)!r} and {theirs.get(name)!r}; a line needs two runs of one network"
        )


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[_format(value) for value in row] for row in rows])
    files.write_text(path, text.getvalue())


def _format(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float | np.floating) else str(value)


def _print_table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], say: Callable[[str], None]
) -> None:
    """Prints the table turned by 90 degrees: a line for each number, a column for each network."""
    columns = [list(header), *([_format(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns):
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
