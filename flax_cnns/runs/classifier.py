"""A trained network that classifies data sets: of a run, or with published weights.

classifier = make_classifier_from_run("runs/digits@best")
predictions = predict_split(classifier, "test")
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from flax_cnns import config as configs
from flax_cnns import weights
from flax_cnns.data import augment, pipeline
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation.predictions import Predictions, PredictStep, Transform, predict_batches
from flax_cnns.models import registry
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.batch_progress import report_batches
from flax_cnns.runs.build import (
    RunComponents,
    build_components,
    check_run_data,
    explain_moved_data,
    initialize_jax,
)
from flax_cnns.runs.references import check_trust
from flax_cnns.runs.subject import LibraryScaling
from flax_cnns.runs.variables import list_class_names, load_variables
from flax_cnns.train import loop
from flax_cnns.train.mirror import average_mirrored
from flax_cnns.types import Array, Batch, PyTree

Reader = Callable[[Image.Image], np.ndarray]


class Classifier(NamedTuple):
    """`model.apply(variables, normalize(images), train=False)` gives the logits."""

    title: str  # for people: the run, its step, its network and its data
    name: str  # for tables: the run's folder, or the network's name
    model: nn.Module
    variables: PyTree  # in the layout that the network takes: stacked if it scans
    normalize: Callable[[Array], Array]  # images as they are read, u8 [N H W C] -> network's input
    class_names: Sequence[str]  # [K]
    image_shape: tuple[int, int, int]  # H, W, C
    task: str  # "classes" or "multilabel"
    data_config: ConfigDict  # how images are read: `config.data` of a run
    # How published weights read a stored image: -> u8 [H W C]. None: as the data set's own
    # evaluation does.
    reader: Reader | None = None
    dataset: Dataset | None = None  # the run's data; None: published weights
    run: TrainedRun | None = None  # None: published weights

    @property
    def apply(self) -> Callable[..., Any]:
        """What gives the logits of one crop: `model.apply`, or its mean over an image and its
        mirror image if the run has `train.eval_flip`."""
        if self.run is not None and self.run.components.config.train.eval_flip:
            return average_mirrored(self.model.apply)
        return self.model.apply


class TrainedRun(NamedTuple):
    """A run and the checkpoint whose weights are used."""

    folder: pathlib.Path
    step: int
    checkpoint: str  # why this checkpoint: best, latest, named, tested for summary.json ...
    components: RunComponents
    changed_data: dict[str, Any] | None  # the accepted change of the data since the run began


def make_classifier_from_run(
    workdir: str | os.PathLike,
    checkpoint: str = "",
    *,
    accept_changed_data: bool = False,
    trust: bool = False,
    confusion: bool = False,
    from_files: bool = False,
) -> Classifier:
    """Returns the network of a run, with its data.

    `workdir`: RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    RUN alone means the checkpoint that was tested for `summary.json`, or the latest checkpoint of
    an unfinished run. `trust` allows importing the code of the run's own parts. `confusion`:
    whether the evaluation step counts a confusion matrix. `from_files`: whether images of files are
    read when they are needed, so that crops and other sizes come from the files' own pixels.

    Raises UserError if the run or the checkpoint does not exist, if the data changed since the run
    began and the change is not accepted, or if the run has own parts and is not trusted.
    """
    folder, checkpoint = workdirs.split_checkpoint(workdir, checkpoint)
    config = workdirs.read_config(folder)
    configs.validate(config)
    check_trust(config, trust, str(folder))
    problems = configs.find_problems(config)
    initialize_jax(config)
    if from_files and not config.data.mock:
        config.data.in_memory = "no"
    with explain_moved_data(config):
        components = build_components(config, confusion=confusion, begun=True, callbacks=False)
    if problems and jax.process_index() == 0:
        print(configs.format_note(folder, problems))
    dataset = components.dataset
    change = check_run_data(folder, dataset, accept_changed_data)
    variables, (step, why) = load_variables(components, folder, checkpoint)
    return Classifier(
        f"{folder.name}, step {step} ({why}): {config.model.name} on {dataset.name}",
        str(folder),
        components.model,
        components.stack_if_scanned(variables),
        augment.make_normalize(config.data.augment, mean=dataset.mean, std=dataset.std),
        list_class_names(dataset, components.num_classes),
        dataset.image_shape,
        dataset.task,
        config.data,
        None,
        dataset,
        TrainedRun(folder, step, why, components, change),
    )


def make_classifier_from_weights(
    model_name: str, source: str, path: str | os.PathLike | None = None
) -> Classifier:
    """Returns a network with the weights of `load_weights(model_name, source, path)`, which reads
    images as the library does. Raises UserError."""
    model = registry.create_model(model_name)
    variables = weights.load_weights(model_name, source, path)
    row = weights.preprocessing(model_name, source)
    names = row.class_names() or tuple(map(str, range(row.num_classes)))
    scaling = LibraryScaling(row.mean, row.std, row.scale, row.channels == "BGR")
    return Classifier(
        f"{model_name}, {source}'s weights",
        model_name,
        model,
        variables,
        lambda images: scaling(images.astype(np.float32) / 255),
        names,
        (row.size, row.size, 3),
        "classes",
        configs.default_config().data,
        LibraryReader(row),
    )


@dataclasses.dataclass(frozen=True)
class LibraryReader:
    """Reads an image as a library prepares it, before the normalization: u8 [H W 3] in RGB."""

    preprocessing: weights.Preprocessing

    def __call__(self, image: Image.Image) -> np.ndarray:
        plain = self.preprocessing._replace(mean=(0.0,), std=(1.0,), scale=1.0, channels="RGB")
        return plain(image)[0].astype(np.uint8)


def divide_batch(batch_size: int, crops: int) -> tuple[int, int]:
    """Returns (images of a batch, crops of each that are computed at once) for `crops` crops of an
    image. Together they are about `batch_size`, and all devices have the same number of images."""
    devices = jax.device_count()
    images = max(batch_size // crops // devices, 1) * devices
    return images, max(batch_size // images, 1)


def check_split(dataset: Dataset, split: str) -> None:
    """Raises UserError if the data set has no such split."""
    if split not in dataset.splits:
        raise UserError(
            f"--split: {dataset.name} has no split {split!r}{did_you_mean(split, dataset.splits)}"
        )


def predict_split(
    classifier: Classifier,
    split: str = "test",
    dataset: Dataset | None = None,
    *,
    reader: Reader | None = None,
    cut: Callable[[np.ndarray], np.ndarray] | None = None,
    crops: int = 1,
    transform: Transform | None = None,
    apply: Callable[..., Any] | None = None,
    step: PredictStep | None = None,
) -> Predictions:
    """Returns the predictions for a split of the classifier's own data, or of `dataset`.

    `reader`: what reads an image, u8 [H W C] or [V H W C] for V crops; by default the classifier's.
    `cut` turns images [n H W C] that are read already into crops [n V h w C]. `crops` is V: batches
    have fewer images then, so that memory does not grow with V. `transform`, `apply` and `step`:
    see `predict_batches`. On several processes, each returns all predictions. Raises UserError,
    also for an unknown split.
    """
    dataset = classifier.dataset if dataset is None else dataset
    if dataset is None:
        raise UserError(f"{classifier.title}: published weights have no data set of their own")
    check_split(dataset, split)
    config, crops_per_step = classifier.data_config, 1
    if crops > 1 and not dataset.is_stream:
        config = ConfigDict(config)
        config.eval_batch_size, crops_per_step = divide_batch(config.eval_batch_size, crops)
    batches: Iterable[Batch] = pipeline.eval_batches(
        dataset,
        split,
        config,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        reader=classifier.reader if reader is None else reader,
    )
    if cut is not None:
        batches = ({**batch, "image": cut(batch["image"])} for batch in batches)
    with contextlib.closing(loop.prefetch(batches)) as ahead:
        return predict_batches(
            classifier.model,
            classifier.variables,
            report_batches(ahead, len(dataset.splits[split]), split),
            normalize=classifier.normalize,
            transform=transform,
            apply=classifier.apply if apply is None and crops == 1 else apply,
            step=step,
            crops_per_step=crops_per_step,
            task=classifier.task,
        )
