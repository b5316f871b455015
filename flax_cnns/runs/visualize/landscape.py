"""The loss around a run's weights: planes, a line to another run, the run's path, curvature."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import files
from flax_cnns.analysis.landscape import curvature, directions, grids
from flax_cnns.analysis.landscape.objective import Levels, Loss, Variables, is_top_class
from flax_cnns.analysis.plots import landscapes as plots
from flax_cnns.checkpoint import finding
from flax_cnns.data import augment, pipeline
from flax_cnns.data.splits import select_rows
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import build
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.evaluate import load_variables
from flax_cnns.runs.references import check_trust
from flax_cnns.train import batchnorm_modes, losses, parallel, precise_bn
from flax_cnns.types import Array

BATCHNORM = {  # choices of --batchnorm -> how a picture names them
    "running": "running statistics",
    "batch": "statistics of each batch",
    "reestimate": "statistics re-estimated at each point",
}
MIN_CHECKPOINTS = 3  # of a trajectory


class Checkpoint(NamedTuple):
    """The weights of a run, with its data and its loss."""

    title: str
    folder: Path
    components: build.RunComponents
    variables: Variables
    step: int

    @property
    def loss_name(self) -> str:
        if own := self.components.config.train.loss:
            return str(own)
        multilabel = self.components.dataset.task == "multilabel"
        return "sigmoid cross-entropy" if multilabel else "cross-entropy"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the pictures of this module have in common."""

    split: str = "train"
    images: int = 512
    grid: int = 25  # points along each axis
    batchnorm: str = "running"
    seed: int = 0
    trust: bool = False
    say: Callable[[str], None] = print


def load_checkpoint(workdir: str | os.PathLike, *, trust: bool = False) -> Checkpoint:
    """Loads a run's network, weights, data and loss: RUN, RUN@best, RUN@latest or RUN@1200.

    `trust` allows importing the code of the run's own parts. Raises UserError.
    """
    folder, which = workdirs.split_checkpoint(workdir, "")
    config = workdirs.read_config(folder)
    check_trust(config, trust, str(folder))
    components = build.build_components(config, begun=True, callbacks=False)
    build.check_run_data(folder, components.dataset, True)
    components = components._replace(mesh=parallel.make_mesh(jax.devices()[:1]))
    variables, (step, _) = load_variables(components, folder, which)
    title = f"{config.model.name}, {folder.name} at step {step}"
    return Checkpoint(title, folder, components, components.stack_if_scanned(variables), step)


def make_loss(checkpoint: Checkpoint, settings: Settings, split: str = "") -> Loss:
    """Returns the run's loss, without penalties, over images of a split that are prepared as in the
    run's evaluation.

    The images are drawn at random, with `settings.seed`, or are the first ones if the data are the
    user's own batches. Raises UserError.
    """
    components = checkpoint.components
    dataset, config = components.dataset, components.config
    images, labels = _read_images(checkpoint, split or settings.split, settings)
    normalize = augment.make_normalize(config.data.augment, mean=dataset.mean, std=dataset.std)
    parts = _count_batches(len(images), config.data.eval_batch_size)
    batches = [
        (normalize(jnp.asarray(rows)), losses.soft_labels(jnp.asarray(own), components.num_classes))
        for rows, own in zip(np.array_split(images, parts), np.array_split(labels, parts))
    ]
    return Loss(
        components.model,
        batches,
        "batch" if settings.batchnorm == "batch" else "running",
        losses.select_loss(components.own_parts.loss, dataset.task),
        _share_right_labels if dataset.task == "multilabel" else is_top_class,
    )


def _share_right_labels(logits: Array, labels: Array) -> Array:
    return jnp.mean((logits > 0) == (labels > 0.5), -1, dtype=jnp.float32)


def _count_batches(images: int, largest: int) -> int:
    """The number of batches: equal ones, if the images can be divided so, compile once."""
    fewest = -(-images // largest)
    equal = (n for n in range(fewest, min(4 * fewest, images) + 1) if images % n == 0)
    return next(equal, fewest)


def _read_images(
    checkpoint: Checkpoint, split: str, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    data, config = checkpoint.components.dataset, checkpoint.components.config
    if split not in data.splits:
        hint = did_you_mean(split, data.splits)
        raise UserError(f"--split: {data.name} has no split {split!r}{hint}")
    count = min(settings.images, len(data.splits[split]))
    if count < len(data.splits[split]) and not data.is_stream:
        order = np.random.default_rng(settings.seed).permutation(len(data.splits[split]))
        chosen = select_rows(
            data.splits[split], np.sort(order[:count]), f"{count}, seed {settings.seed}"
        )
        data = dataclasses.replace(data, splits={**data.splits, split: chosen})
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with contextlib.closing(pipeline.eval_batches(data, split, config.data)) as batches:
        for batch in batches:
            real = batch["mask"] > 0  # 0: fills the last batch, or replaces a damaged image
            found.append((batch["image"][real], batch["label"][real]))
            if sum(len(rows) for rows, _ in found) >= count:
                break
    images, labels = (np.concatenate(parts)[:count] for parts in zip(*found))
    if not len(images):
        raise UserError(f"{data.name}: no image of the {split} split could be decoded")
    return images, labels


def draw_landscape(
    runs: Sequence[str | os.PathLike],
    picture: str | os.PathLike,
    settings: Settings = Settings(),
    *,
    span: float = 1.0,
    surface: bool = False,
) -> list[Levels]:
    """Draws the loss on a plane around each run's weights, and returns losses and accuracies.

    Two random directions, normalized by filter, span each plane, from -`span` to `span`. Runs are
    drawn next to each other with one scale. `surface` draws a surface, too. Rows are kept in the
    folder of `find_rows_folder(picture)`. Raises UserError.
    """
    _check_batchnorm(settings, "running", "batch")
    folder = find_rows_folder(picture)
    checkpoints = [load_checkpoint(run, trust=settings.trust) for run in runs]
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
            about=_describe(checkpoint, settings),
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
    note = f"{_explain(checkpoints[0], settings)}; directions: random, normalized by filter"
    plots.draw_planes(planes, picture, note=note, surface=surface)
    return [Levels(plane.losses, plane.accuracies) for plane in planes]


def draw_line(
    start: str | os.PathLike,
    end: str | os.PathLike,
    picture: str | os.PathLike,
    settings: Settings = Settings(),
    *,
    splits: Sequence[str] = (),
) -> dict[str, Levels]:
    """Draws loss and accuracy on the line through the weights of two runs or two checkpoints.

    Returns {split: levels}, at the points of `list_alphas(settings.grid)`. `splits`: by default
    train and test. Images and loss are those of the first run. Points are kept in the folder of
    `find_rows_folder(picture)`. Raises UserError, also if the networks of the two differ.
    """
    _check_batchnorm(settings, *BATCHNORM)
    first, second = (load_checkpoint(run, trust=settings.trust) for run in (start, end))
    _check_same_network(first, second)
    has_train = not first.components.dataset.is_stream  # whose training batches never end
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
            about=_describe(first, chosen),
            say=settings.say,
        )
    table = [
        (split, alpha, loss, accuracy)
        for split, levels in found.items()
        for alpha, loss, accuracy in zip(alphas, *levels)
    ]
    _write_csv(folder / "levels.csv", ("split", "alpha", "loss", "accuracy"), table)
    note = _explain(first, settings, " and ".join(splits))
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
    run: str | os.PathLike, picture: str | os.PathLike, settings: Settings = Settings()
) -> directions.Trajectory:
    """Draws the path of a run's kept checkpoints, in the plane that holds most of it, over the loss
    on that plane.

    The path ends at the checkpoint that `run` names, by default the latest. BatchNorm's running
    statistics are those of that checkpoint on the whole plane. Rows are kept in the folder of
    `find_rows_folder(picture)`. Raises UserError, also if there are fewer than `MIN_CHECKPOINTS`.
    """
    _check_batchnorm(settings, "running", "batch")
    place, which = workdirs.split_checkpoint(run, "")
    last = load_checkpoint(f"{place}@{which or 'latest'}", trust=settings.trust)
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
        about=_describe(last, settings),
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
        note=_explain(last, settings),
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
    settings: Settings = Settings(),
    *,
    count: int = 1,
    rho: float = 0.05,
    tolerance: float = 1e-2,
) -> list[Curvature]:
    """Writes a CSV file with the top Hessian eigenvalues and SAM's sharpness of each run's weights,
    and prints its lines.

    Raises UserError.
    """
    _check_batchnorm(settings, "running", "batch")
    found = []
    for run in runs:
        checkpoint = load_checkpoint(run, trust=settings.trust)
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


def make_reestimation(checkpoint: Checkpoint, images: int) -> Callable[[Variables], Variables]:
    """Returns a function that replaces the running statistics of variables by those of the run's
    first training batches, at least `images` images, prepared as in training (`train.precise_bn`).

    Raises UserError if the network has no BatchNorm.
    """
    components, variables = checkpoint.components, checkpoint.variables
    everything = jax.tree.map(lambda _: True, variables["params"])
    modes = batchnorm_modes.decide_modes((), everything, variables.get("batch_stats", {}))
    if not modes:
        raise UserError(f"--batchnorm=reestimate: {checkpoint.title} has no BatchNorm")
    step = parallel.parallelize(
        precise_bn.make_moments_step(
            components.model.apply, modes, **build.make_augment_and_mix(components)
        ),
        components.mesh,
        mode=components.mode,
        donate=False,
    )
    count = -(-images // components.config.data.batch_size)
    with contextlib.closing(build.train_batches(components)) as stream:
        batches = list(itertools.islice(stream, count))
    key = parallel.replicate(build.make_training_key(components.config), components.mesh)

    def reestimate(variables: Variables) -> Variables:
        stats = precise_bn.estimate_statistics(step, variables, batches, key)
        return {**variables, "batch_stats": parallel.replicate(stats, components.mesh)}

    return reestimate


def find_rows_folder(picture: str | os.PathLike) -> Path:
    """Returns the folder of the saved rows of a picture: `landscape.rows` of `landscape.png`."""
    return Path(picture).with_suffix(".rows")


def _check_batchnorm(settings: Settings, *known: str) -> None:
    if settings.batchnorm not in known:
        hint = did_you_mean(settings.batchnorm, known)
        raise UserError(
            f"--batchnorm: expected {' or '.join(known)} here, got {settings.batchnorm!r}{hint}"
        )


def _check_same_network(first: Checkpoint, second: Checkpoint) -> None:
    ours, theirs = (grids.describe_network(each.components.model) for each in (first, second))
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{first.folder} and {second.folder} have different networks: {name} is"
            f" {ours.get(name)!r} and {theirs.get(name)!r}; a line needs two runs of one network"
        )


def _describe(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """What saved rows must have in common, besides what `grids` compares."""
    record = checkpoint.components.own_parts.record
    own = {kind: list(record[kind]) for kind in ("model", "loss") if kind in record}
    return {"run": checkpoint.title, "split": settings.split, **({"own": own} if own else {})}


def _explain(checkpoint: Checkpoint, settings: Settings, split: str = "") -> str:
    images = min(settings.images, _count_images(checkpoint, split or settings.split))
    return (
        f"{checkpoint.loss_name} without L2 penalty, {split or settings.split} split,"
        f" {images} images; BatchNorm: {BATCHNORM[settings.batchnorm]}"
    )


def _count_images(checkpoint: Checkpoint, splits: str) -> int:
    return max(len(checkpoint.components.dataset.splits[s]) for s in splits.split(" and "))


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
