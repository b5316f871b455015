"""Evaluates a classifier on crops of each image."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from PIL import Image

from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation.crops import CropProtocol, make_reader
from flax_cnns.evaluation.dense import make_dense_apply
from flax_cnns.evaluation.predictions import Predictions, average
from flax_cnns.runs.classifier import Classifier, LibraryReader, predict_split


def predict_crops(
    classifier: Classifier,
    protocol: CropProtocol,
    split: str = "test",
    dataset: Dataset | None = None,
) -> Predictions:
    """Returns the average of the probabilities of all crops of each image of a split.

    Crops of files come from the files' own pixels if `make_classifier_from_run` was called with
    `from_files`. Images in memory are enlarged bilinearly where a crop is smaller than what the
    network takes, and a printed line says so. Raises UserError, also for images that are not
    square, and for a network that does not take the protocol's sizes.
    """
    height, width, channels = classifier.image_shape
    if height != width:
        raise UserError(
            f"{classifier.title}: its images are {height}x{width}, but crops are squares"
        )
    dataset = classifier.dataset if dataset is None else dataset
    stored = None if dataset is None else dataset.splits.get(split)
    apply = None
    if protocol.dense:
        apply = make_dense_apply(classifier.model, classifier.variables)
    resample = Image.Resampling.BILINEAR
    if isinstance(classifier.reader, LibraryReader):
        resample = Image.Resampling[classifier.reader.preprocessing.interpolation.upper()]
    members = []
    for group in protocol.groups:
        size = round(group.scale * height)
        if stored is None or stored.source is not None or classifier.reader is not None:
            given: dict[str, Any] = {"reader": make_reader(group, size, channels, resample)}
        else:
            given = {"cut": partial(group.cut, size=size)}
            if protocol.enlarges(min(height, width), height) and jax.process_index() == 0:
                print(
                    f"note: the images are arrays of {height}x{width}, so crops are enlarged to"
                    f" {size}x{size} bilinearly"
                )
        members.append(predict_split(classifier, split, dataset, apply=apply, **given))
    return average(members)
