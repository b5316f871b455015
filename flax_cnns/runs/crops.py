"""Evaluates a classifier on crops of each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from PIL import Image

from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation.crops import CropProtocol, make_protocol, make_reader
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
    resample, decoder = Image.Resampling.BILINEAR, classifier.data_config.decoder
    if isinstance(classifier.reader, LibraryReader):
        resample = Image.Resampling[classifier.reader.preprocessing.interpolation.upper()]
        decoder = "pillow"  # as the library does
    members = []
    for group in protocol.groups:
        size = round(group.scale * height)
        if stored is None or stored.source is not None or classifier.reader is not None:
            given: dict[str, Any] = {
                "reader": make_reader(group, size, channels, resample, decoder)
            }
        else:
            given = {"cut": partial(group.cut, size=size)}
            if protocol.enlarges(min(height, width), height) and jax.process_index() == 0:
                print(
                    f"note: the images are arrays of {height}x{width}, so crops are enlarged to"
                    f" {size}x{size} bilinearly"
                )
        given |= dict(apply=apply, crops=len(group.views))
        members.append(predict_split(classifier, split, dataset, **given))
    return average(members)


class CropOptions(NamedTuple):
    """What a user asks for; the sizes of the protocol depend on the classifier."""

    crops: str = "1"  # as in `evaluation.crops.list_views`
    share: float | None = None  # of the shorter side; None: see `make`
    scales: Sequence[float] = ()  # of the classifier's own image size
    size: int = 0  # side of the images in pixels, in place of `scales`
    flip: bool = False
    dense: bool = False

    def make(self, classifier: Classifier) -> CropProtocol:
        """Returns the protocol. One crop has the share of the classifier's own evaluation, unless
        `share` is given. Raises UserError."""
        if self.size and self.scales:
            raise UserError("--size is one size, and --scales are several: give one of them")
        if self.flip and self.crops not in ("1", "5"):
            raise UserError(f"--flip: --crops={self.crops} has mirror images already")
        if self.size < 0:
            raise UserError(f"--size: expected a number of pixels above 0, got {self.size}")
        scales = list(self.scales) or [1.0]
        if self.size:
            scales = [self.size / classifier.image_shape[0]]
        share = self.share
        if self.crops == "1" and not self.dense and share is None:
            own = _find_own_share(classifier)
            share = None if own == 1.0 else own
        protocol = make_protocol(
            self.crops, share=share, scales=scales, flip=self.flip, dense=self.dense
        )
        if self.size:  # pixels are what the user typed: size33, not scales1.03125
            name = protocol.name.partition("_scales")[0] + f"_size{self.size}"
            protocol = dataclasses.replace(protocol, name=name, size=self.size)
        return protocol


def _find_own_share(classifier: Classifier) -> float:
    """Returns the share of the shorter side that the classifier's own evaluation sees."""
    if isinstance(classifier.reader, LibraryReader):
        return classifier.reader.preprocessing.crop
    return 1.0 if classifier.dataset is None else classifier.dataset.eval_share
