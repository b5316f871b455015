"""A trained network with images to look at: of a run, or of published weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from flax_cnns import weights
from flax_cnns.data import pipeline
from flax_cnns.data.images import Photo
from flax_cnns.data.load import load_dataset
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models import registry
from flax_cnns.runs import own_parts, predict
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import check_run_data, explain_moved_data
from flax_cnns.runs.load import load_run
from flax_cnns.runs.references import check_trust, find_references
from flax_cnns.types import Array, Batch, PyTree


class Subject(NamedTuple):
    """`model.apply(variables, normalize(pixels), train=False)` gives the logits."""

    title: str
    model: nn.Module
    variables: PyTree
    pixels: np.ndarray  # f32 [N H W C] in 0..1, as the network sees them
    names: Sequence[str]  # of the images
    normalize: Callable[[Array], Array]  # pixels in 0..1 -> what the network takes
    class_names: Sequence[str]  # [K]
    # Opens all images of a run's split: {"image": f32 [n H W C] in 0..1, "label", "mask" f32 [n]}.
    # None if the images are photos.
    open_split: Callable[[], Generator[Batch]] | None = None

    def name_label(self, label: Any) -> str:
        """Returns the name of a label's class."""
        return self.class_names[int(label)] if np.ndim(label) == 0 else "several classes"

    def check_images(self) -> None:
        """Raises UserError if there are no images."""
        if not len(self.pixels):
            raise UserError(f"{self.title}: expected at least one photo, got none")


def make_subject_from_run(
    workdir: str | os.PathLike,
    checkpoint: str = "",
    *,
    photos: Sequence[Photo] = (),
    split: str = "test",
    count: int = 8,
    trust: bool = False,
    accept_changed_data: bool = False,
) -> Subject:
    """Returns a run's network, with `photos` or else the first `count` images of a split.

    `workdir`: RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    Photos are prepared as in the run's evaluation; the data set is not read then. `trust` allows
    importing the user's own network and data. With `accept_changed_data` the images may be others
    than those with which the run began.

    Raises UserError, also for images that are not bytes, for own parts without `trust`, and for
    changed data.
    """
    loaded = load_run(workdir, checkpoint, trust=trust)
    folder, _ = workdirs.split_checkpoint(workdir, checkpoint)
    dataset, config = loaded.dataset, loaded.config
    if not dataset.normalize:
        raise UserError(f"{folder}: its images are floats, which have no colors to show")
    note = " (best)" if loaded.checkpoint == "best" else ""
    title = f"{folder.name}, step {loaded.step}{note}: {config.model.name} on"
    subject = Subject(
        f"{title} {dataset.name}",
        loaded.network,
        loaded.variables,
        np.zeros((0, *dataset.image_shape), np.float32),
        (),
        loaded.preprocessing,  # floats are in 0..1 there too
        loaded.class_names,
    )
    if photos:
        predictor = predict.make_predictor_from_run(workdir, checkpoint, trust=trust)
        pixels = np.concatenate([predictor.read(photo) for photo in photos])
        return subject._replace(pixels=_to_floats(pixels), names=predict.name_photos(photos))
    data = load_data(folder, config, trust=trust, accept_changed_data=accept_changed_data)
    if split not in data.splits:
        hint = did_you_mean(split, data.splits)
        raise UserError(f"--split: {data.name} has no split {split!r}{hint}")
    subject = subject._replace(open_split=partial(_open_split, data, split, config.data))
    chosen = list(itertools.islice(_list_images(data, split, config.data), count))
    if not chosen:
        raise UserError(f"--split: no image of the {split} split of {data.name} can be read")
    pixels = np.stack([image for image, _ in chosen])
    names = [f"image {n} ({subject.name_label(label)})" for n, (_, label) in enumerate(chosen)]
    return subject._replace(pixels=pixels, names=names)


def load_data(
    workdir: pathlib.Path, config: Any, *, trust: bool = False, accept_changed_data: bool = False
) -> Dataset:
    """Loads the data of a run as its evaluation does, also the user's own.

    Raises UserError for own data without `trust`, and if the data changed since the run began,
    unless `accept_changed_data`; the change is printed then.
    """
    references = find_references(config).get("data", [])
    check_trust({"data": {"name": references[0]}} if references else {}, trust, str(workdir))
    with explain_moved_data(config):
        data = own_parts.make_data(config)
        dataset = load_dataset(config.data, data=data, begun=True)
    check_run_data(workdir, dataset, accept_changed_data)
    return dataset


def _open_split(dataset: Dataset, split: str, config: Any) -> Generator[Batch]:
    with contextlib.closing(pipeline.eval_batches(dataset, split, config)) as batches:
        for batch in batches:
            yield {**batch, "image": _to_floats(batch["image"])}


def _list_images(dataset: Dataset, split: str, config: Any) -> Generator[tuple[np.ndarray, Any]]:
    """Yields (image, label), without those that fill the last batch or replace damaged ones."""
    with contextlib.closing(_open_split(dataset, split, config)) as batches:
        for batch in batches:
            for image, label, mask in zip(batch["image"], batch["label"], batch["mask"]):
                if mask:
                    yield image, label


def _to_floats(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels in 0..1."""
    return pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1)


@dataclasses.dataclass(frozen=True)
class LibraryScaling:
    """A library's normalization, of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    reverse: bool  # BGR

    def __call__(self, pixels: Array) -> Array:
        ordered = pixels[..., ::-1] if self.reverse else pixels
        return (255 * self.scale * ordered - jnp.array(self.mean)) / jnp.array(self.std)


def make_subject_from_weights(
    model_name: str,
    source: str,
    path: str | os.PathLike | None = None,
    *,
    photos: Sequence[Photo] = (),
) -> Subject:
    """Returns a network with the weights of `load_weights(model_name, source, path)`, with photos
    that are prepared as the library does. Raises UserError."""
    model = registry.create_model(model_name)
    variables = weights.load_weights(model_name, source, path)
    row = weights.preprocessing(model_name, source)
    normalize = LibraryScaling(row.mean, row.std, row.scale, row.channels == "BGR")
    plain = row._replace(mean=(0.0,), std=(255.0,), scale=1.0, channels="RGB")
    pixels = np.zeros((0, row.size, row.size, 3), np.float32)
    if photos:
        pixels = np.concatenate([plain(photo) for photo in photos])
    names = row.class_names() or tuple(map(str, range(row.num_classes)))
    return Subject(
        f"{model_name}, {source}'s weights",
        model,
        variables,
        pixels,
        predict.name_photos(photos),
        normalize,
        names,
    )
