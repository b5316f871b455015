"""Activations and gradients by layer, at initialization and over a run's checkpoints."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import pathlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis import activations, tracing
from flax_cnns.analysis.activations import LayerActivations
from flax_cnns.analysis.batchnorm import BatchNormMode
from flax_cnns.analysis.plots import activations as plots
from flax_cnns.analysis.plots.histograms import choose_evenly
from flax_cnns.checkpoint import finding
from flax_cnns.data import augment, pipeline
from flax_cnns.data.images import Photo, check_photos
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models import registry
from flax_cnns.names import make_console
from flax_cnns.runs import subject as subjects
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import RunComponents, build_components, check_run_data
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.references import check_trust
from flax_cnns.runs.start import make_initial_variables
from flax_cnns.runs.variables import load_variables
from flax_cnns.types import Array, PyTree

MAX_ROWS = 40  # layers in the table
_NOISE = 64  # images of noise, if a network is given without photos
INITIALIZATION = "initialization"


class Moment(NamedTuple):
    """A network's variables at one moment."""

    name: str  # initialization, step 400, ...
    load: Callable[[], PyTree]


class Specimen(NamedTuple):
    """A network at some moments, with the images that it gets."""

    title: str
    model: nn.Module
    moments: Sequence[Moment]
    batches: Callable[[], Generator[tuple[Array, Array]]]  # images, normalized, and labels
    images: str  # describes them

    @property
    def starts_at_initialization(self) -> bool:
        return self.moments[0].name == INITIALIZATION


def make_specimen(
    *,
    workdir: str = "",
    config: Any = None,
    model: str = "",
    weights: str = "",
    init: str = "",
    photos: Sequence[str] = (),
    split: str = "test",
    count: int | None = None,
    trust: bool = False,
    accept: bool = False,
    seed: int = 0,
) -> Specimen:
    """Returns the specimen that the command's flags name. Raises UserError."""
    if sum(map(bool, (workdir, config, model))) != 1:
        raise UserError("activations: expected one of --workdir=RUN, --config=CONFIG, --model=NAME")
    if weights and not model:
        raise UserError("--weights: expected --model=NAME too")
    if photos and not weights:
        raise UserError(f"{photos[0]}: activations takes photos only with --weights=SOURCE")
    if init and (weights or not model):
        raise UserError(
            "--init: expected --model=NAME without weights; in a config, set --config.model.init"
        )
    if workdir:
        return make_specimen_from_run(workdir, split=split, count=count, trust=trust, accept=accept)
    if config:
        return make_specimen_from_config(config, split=split, count=count)
    if weights:
        check_photos(photos)
        source, _, file = weights.partition("=")
        return make_specimen_from_weights(model, source, file or None, photos=photos, seed=seed)
    return make_specimen_from_model(model, init, seed=seed)


def make_specimen_from_run(
    workdir: str | os.PathLike,
    *,
    split: str = "test",
    count: int | None = None,
    trust: bool = False,
    accept: bool = False,
) -> Specimen:
    """Returns a run's network at initialization and at each kept checkpoint; RUN@best, RUN@latest
    and RUN@STEP name one checkpoint. The images are a whole split, or its first `count`.

    The initialization is made again as the run made it: from the seed, its graft and lsuv. `trust`
    allows importing the user's own code. `accept`: changed data are taken. Raises UserError.
    """
    folder, which = workdirs.split_checkpoint(workdir)
    config = workdirs.read_config(folder)
    configs.validate(config)
    check_trust(config, trust, str(folder))
    components = build_components(config, begun=True, callbacks=False)
    check_run_data(folder, components.dataset, accept)

    def load(step: int) -> PyTree:
        return load_variables(components, folder, str(step))[0]

    def initialize() -> PyTree:
        return make_initial_variables(RunPlan(components))[0]

    steps = [finding.choose_step(folder, which).step] if which else finding.all_steps(folder)
    if not steps:
        raise UserError(f"{folder} has no checkpoint yet")
    moments = [Moment(f"step {step}", partial(load, step)) for step in steps]
    if not which:
        moments.insert(0, Moment(INITIALIZATION, initialize))
    title = f"{folder.name}: {config.model.name} on {components.dataset.name}"
    return _make_specimen(title, components, moments, split, count)


def make_specimen_from_config(
    config: Any, *, split: str = "test", count: int | None = None
) -> Specimen:
    """Returns the network of a config at initialization, with images of its data. Raises
    UserError."""
    config = configs.complete(config)
    configs.validate(config)
    components = build_components(config, callbacks=False)
    moment = Moment(INITIALIZATION, lambda: make_initial_variables(RunPlan(components))[0])
    title = f"{config.model.name} on {components.dataset.name}, seed {config.seed}"
    if config.model.init:
        title += f", init {config.model.init}"
    return _make_specimen(title, components, [moment], split, count)


def make_specimen_from_weights(
    model_name: str, source: str, path: str | None = None, *, photos: Sequence[Photo], seed: int = 0
) -> Specimen:
    """Returns a network with published weights, with photos. Labels are random. Raises
    UserError."""
    subject = subjects.make_subject_from_weights(model_name, source, path, photos=photos)
    subject.check_images()
    images = subject.normalize(jnp.asarray(subject.pixels))
    moment = Moment(f"{source}'s weights", lambda: subject.variables)
    batches = _label_at_random(subject.model, subject.variables, images, seed)
    described = f"{len(images)} photos, random labels"
    return Specimen(subject.title, subject.model, [moment], batches, described)


def make_specimen_from_model(model_name: str, init: str = "", *, seed: int = 0) -> Specimen:
    """Returns a network of the registry at initialization, with images of N(0, 1) and random
    labels. `init`: the initializer of its kernels; "": the network's own. Raises UserError."""
    scaled = init == "lsuv"
    model = registry.create_model(model_name, **({"init": init} if init and not scaled else {}))
    keys = jax.random.split(jax.random.key(seed), 3)
    images = jax.random.normal(keys[1], (_NOISE, *model.input_size))
    variables = registry.init_variables(model, keys[0])
    if scaled:
        variables = activations.lsuv(model, variables, images, key=keys[2])
    moment = Moment(INITIALIZATION, lambda: variables)
    batches = _label_at_random(model, variables, images, seed)
    title = f"{model_name}, init {init or 'its own'}, seed {seed}"
    return Specimen(title, model, [moment], batches, f"{_NOISE} images of N(0, 1), random labels")


def draw_activations(
    specimen: Specimen,
    png: str | os.PathLike,
    *,
    paths: Sequence[str] | None = None,
    batchnorm: BatchNormMode | None = None,
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Measures and draws a network's activations and gradients. Returns the path of the CSV file
    with all numbers, which lies beside the picture.

    `paths`: modules; None: all with parameters of their own. The gradients are of the mean
    cross-entropy over the first batch. `batchnorm`: "batch" or "running"; by default "batch" if the
    first moment is the initialization, where the running statistics would make BatchNorm the
    identity. Raises UserError.
    """
    if batchnorm not in (None, *BATCHNORM_TEXTS):
        raise UserError(f"--batchnorm: expected batch or running, got {batchnorm!r}")
    mode: BatchNormMode = batchnorm or ("batch" if specimen.starts_at_initialization else "running")
    layers, gradients = [], []
    for number, moment in enumerate(specimen.moments, 1):
        variables = moment.load()
        with contextlib.closing(specimen.batches()) as batches:
            images, labels = next(batches)
            norms = activations.measure_gradients(
                specimen.model, variables, images, labels, batchnorm=mode
            )
        with contextlib.closing(specimen.batches()) as batches:
            several = (images for images, _ in batches)
            found = activations.measure_activations(
                specimen.model, variables, several, paths, batchnorm=mode
            )
        layers.append(found)
        gradients.append([norms.get(x.path.partition("[")[0], float("nan")) for x in found])
        say(f"{moment.name}: measured ({number} of {len(specimen.moments)})")
    names = [moment.name for moment in specimen.moments]
    title = f"{specimen.title}; {specimen.images}"
    if variables.get("batch_stats"):
        title += f"; {BATCHNORM_TEXTS[mode]}"
    plots.draw_activations(layers, gradients, names, png, title)
    table = pathlib.Path(png).with_suffix(".csv")
    _write_csv(table, names, layers, gradients)
    _print_table(title, names, layers, gradients)
    return table


BATCHNORM_TEXTS = {
    "batch": "BatchNorm by the statistics of each batch",
    "running": "BatchNorm by its running statistics",
}


def _make_specimen(
    title: str,
    components: RunComponents,
    moments: Sequence[Moment],
    split: str,
    count: int | None,
) -> Specimen:
    dataset, config = components.dataset, components.config
    if split not in dataset.splits:
        hint = did_you_mean(split, dataset.splits)
        raise UserError(f"--split: {dataset.name} has no split {split!r}{hint}")
    normalize = augment.make_normalize(config.data.augment, mean=dataset.mean, std=dataset.std)

    def batches() -> Generator[tuple[Array, Array]]:
        left = count
        with contextlib.closing(pipeline.eval_batches(dataset, split, config.data)) as stream:
            for images, labels in _join_last(stream):
                images, labels = images[:left], labels[:left]
                yield normalize(jnp.asarray(images)), jnp.asarray(labels)
                left = None if left is None else left - len(images)
                if left == 0:
                    return

    number = "all" if count is None else f"the first {count}"
    described = f"{number} images of the {split} split"
    return Specimen(title, components.model, moments, batches, described)


def _join_last(stream: Iterator[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the images and labels of each batch, without those of mask 0.

    A last batch of less than half the size is joined to the one before: the statistics of a few
    images would mislead.
    """
    held: tuple[np.ndarray, np.ndarray] | None = None
    for batch in stream:
        kept = np.asarray(batch["mask"]) > 0
        images, labels = batch["image"][kept], batch["label"][kept]
        if held is not None and 2 * len(images) < len(held[0]):
            held = np.concatenate([held[0], images]), np.concatenate([held[1], labels])
            continue
        if held is not None:
            yield held
        held = images, labels
    if held is not None:
        yield held


def _label_at_random(
    model: nn.Module, variables: PyTree, images: Array, seed: int
) -> Callable[[], Generator[tuple[Array, Array]]]:
    classes = tracing.get_logits_shape(model, variables, images)[-1]
    labels = jax.random.randint(jax.random.key(seed), (len(images),), 0, classes)
    return lambda: _yield_once(images, labels)


def _yield_once(images: Array, labels: Array) -> Generator[tuple[Array, Array]]:
    yield images, labels


def _write_csv(
    path: pathlib.Path,
    moments: Sequence[str],
    layers: Sequence[Sequence[LayerActivations]],
    gradients: Sequence[Sequence[float]],
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("moment", "layer", "values", "mean", "std", "dead", "gradient_norm"))
    for moment, row, norms in zip(moments, layers, gradients):
        for layer, norm in zip(row, norms):
            dead = "" if layer.dead is None else f"{layer.dead:.6g}"
            numbers = (f"{layer.mean:.6g}", f"{layer.std:.6g}", dead)
            shown = "" if np.isnan(norm) else f"{norm:.6g}"
            writer.writerow((moment, layer.path, layer.values, *numbers, shown))
    with files.replace_atomically(path) as temporary:
        pathlib.Path(temporary).write_text(text.getvalue(), encoding="utf-8")


def _print_table(
    title: str,
    moments: Sequence[str],
    layers: Sequence[Sequence[LayerActivations]],
    gradients: Sequence[Sequence[float]],
) -> None:
    """Prints a table of the first moment, and one of the last."""
    shown = choose_evenly(range(len(layers[0])), MAX_ROWS)
    console = make_console()
    console.print(title, highlight=False, soft_wrap=True)
    note = "" if len(shown) == len(layers[0]) else f" ({len(shown)} of {len(layers[0])} layers)"
    for at in sorted({0, len(moments) - 1}):
        table = Table(box=box.SIMPLE_HEAD, title=f"{moments[at]}{note}")
        table.add_column("layer")
        for name in ("mean", "std", "dead", "gradient"):
            table.add_column(name, justify="right", no_wrap=True)
        for number in shown:
            layer, norm = layers[at][number], gradients[at][number]
            table.add_row(
                layer.path,
                f"{layer.mean:.2g}",
                f"{layer.std:.2g}",
                "-" if layer.dead is None else f"{layer.dead:.1%}",
                "-" if np.isnan(norm) else f"{norm:.2g}",
            )
        console.print(table)
