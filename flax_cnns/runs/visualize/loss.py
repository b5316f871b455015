"""The loss of a run's checkpoint: its network, weights, images and statistics of BatchNorm."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis.landscape.objective import Loss, Variables, is_top_class
from flax_cnns.data import augment, pipeline
from flax_cnns.data.splits import select_rows
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import build, reestimation
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.references import check_trust
from flax_cnns.runs.variables import load_variables
from flax_cnns.train import batchnorm_modes, losses, parallel
from flax_cnns.types import Array

BATCHNORM = {  # choices of --batchnorm -> how a picture names them
    "running": "running statistics",
    "batch": "statistics of each batch",
    "reestimate": "statistics re-estimated at each point",
}


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
    accept: bool = False  # data that changed since the run began
    say: Callable[[str], None] = print


DEFAULTS = Settings()


def load_checkpoint(
    workdir: str | os.PathLike, *, trust: bool = False, accept: bool = False
) -> Checkpoint:
    """Loads a run's network, weights, data and loss: RUN, RUN@best, RUN@latest or RUN@1200.

    `trust` allows importing the code of the run's own parts. Raises UserError, also if the data
    changed since the run began, unless `accept` is set; the change is printed then.
    """
    folder, which = workdirs.split_checkpoint(workdir, "")
    config = workdirs.read_config(folder)
    check_trust(config, trust, str(folder))
    components = build.build_components(config, begun=True, callbacks=False)
    build.check_run_data(folder, components.dataset, accept)
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
    """Returns the number of batches, of equal size if possible: these are compiled only once."""
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
    reestimate, _ = reestimation.make_reestimation(components, modes, images)

    def reestimate_and_place(variables: Variables) -> Variables:
        found = reestimate(variables)
        return {**found, "batch_stats": parallel.replicate(found["batch_stats"], components.mesh)}

    return reestimate_and_place


def check_batchnorm(settings: Settings, *known: str) -> None:
    """Raises UserError unless `settings.batchnorm` is one of `known`."""
    if settings.batchnorm not in known:
        hint = did_you_mean(settings.batchnorm, known)
        raise UserError(
            f"--batchnorm: expected {' or '.join(known)} here, got {settings.batchnorm!r}{hint}"
        )


def describe(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """Returns facts that must be equal for saved rows, besides those that `grids` compares."""
    record = checkpoint.components.own_parts.record
    own = {kind: list(record[kind]) for kind in ("model", "loss") if kind in record}
    return {"run": checkpoint.title, "split": settings.split, **({"own": own} if own else {})}


def explain(checkpoint: Checkpoint, settings: Settings, split: str = "") -> str:
    """Returns a note for a picture: the loss, the images, the statistics of BatchNorm."""
    names = (split or settings.split).split(" and ")
    held = checkpoint.components.dataset.splits
    counts = dict.fromkeys(str(min(settings.images, len(held[name]))) for name in names)
    note = f"{checkpoint.loss_name} without L2 penalty, {' and '.join(names)}"
    note += f" {'splits' if len(names) > 1 else 'split'}, {' and '.join(counts)} images"
    if checkpoint.variables.get("batch_stats"):
        note += f"; BatchNorm: {BATCHNORM[settings.batchnorm]}"
    return note
