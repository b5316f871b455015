"""A trained network with images to look at: of a run, or of published weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from flax_cnns import weights
from flax_cnns.data import pipeline
from flax_cnns.data.images import Photo
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.models import registry
from flax_cnns.runs import predict
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.load import load_run
from flax_cnns.types import Array, PyTree


class Subject(NamedTuple):
    """`model.apply(variables, normalize(pixels), train=False)` gives the logits."""

    title: str
    model: nn.Module
    variables: PyTree
    pixels: np.ndarray  # f32 [N H W C] in 0..1, as the network sees them
    names: Sequence[str]  # of the images
    normalize: Callable[[Array], Array]  # pixels in 0..1 -> what the network takes
    class_names: Sequence[str]  # [K]

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
) -> Subject:
    """Returns a run's network, with `photos` or else the first `count` images of a split.

    `workdir`: RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    Photos are prepared as in the run's evaluation. `trust` allows importing a network of the
    user's own. Raises UserError, also for images that are not bytes.
    """
    loaded = load_run(workdir, checkpoint, trust=trust)
    folder, _ = workdirs.split_checkpoint(workdir, checkpoint)
    dataset, config = loaded.dataset, loaded.config
    if not dataset.normalize:
        raise UserError(f"{folder}: its images are floats, which have no colors to show")
    if photos:
        predictor = predict.make_predictor_from_run(workdir, checkpoint, trust=trust)
        pixels = np.concatenate([predictor.read(photo) for photo in photos])
        names = predict.name_photos(photos)
    else:
        data = load_dataset(config.data)
        if split not in data.splits:
            hint = did_you_mean(split, data.splits)
            raise UserError(f"--split: {data.name} has no split {split!r}{hint}")
        with contextlib.closing(pipeline.eval_batches(data, split, config.data)) as batches:
            rows = (
                (image, label)
                for batch in batches
                for image, label, mask in zip(batch["image"], batch["label"], batch["mask"])
                if mask  # 0: an image that fills the last batch, or replaces a damaged one
            )
            chosen = list(itertools.islice(rows, count))
        pixels = np.stack([image for image, _ in chosen])
        names = [_name_label(loaded.class_names, label) for _, label in chosen]
    return Subject(
        f"{folder.name}, step {loaded.step} ({loaded.checkpoint}): {config.model.name} on"
        f" {dataset.name}",
        loaded.network,
        loaded.variables,
        pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1),
        names,
        loaded.preprocessing,  # floats are in 0..1 there too
        loaded.class_names,
    )


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


def _name_label(class_names: Sequence[str], label: Any) -> str:
    return class_names[int(label)] if np.ndim(label) == 0 else "several classes"
