"""The error browser: a page with the worst mistakes of a network on a split."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis.explain import cams, gradients
from flax_cnns.analysis.plots.error_page import ErrorSummary, Mistake, write_error_page
from flax_cnns.data import pipeline
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.runs import tables
from flax_cnns.runs.classifier import Classifier

MAX_MISTAKES = 500  # a page with more would be slow
SHOWN_CLASSES = 5  # predictions of each image, and the true class
SHOWN_PAIRS = 10
BATCH = 32  # images whose maps are computed at once


def check_error_page(task: str, count: int) -> None:
    """Raises UserError if there can be no page of `count` mistakes."""
    if task != "classes":
        raise UserError(
            f"--errors: {task} data have no single wrong class; the page needs one class per image"
        )
    if not 1 <= count <= MAX_MISTAKES:
        raise UserError(f"--errors: expected 1 to {MAX_MISTAKES} images, got {count}")
    if jax.process_count() > 1:
        raise UserError("--errors: the page is made by one process; run it without the launcher")


def write_errors(
    classifier: Classifier,
    predictions: Predictions,
    split: str,
    path: str | os.PathLike,
    *,
    dataset: Dataset | None = None,
    count: int = 100,
    protocol: str = "",
) -> str:
    """Writes a page of the `count` worst mistakes: the wrong predictions with the highest
    probability. Returns a description of the file for a message.

    `predictions` are those of `split`, of the classifier's own data or of `dataset`. `protocol`
    names how they were made, if that is not the plain evaluation. The saliency
    map beside each image is Grad-CAM of the predicted class, or the gradient if the network has no
    spatial maps. Raises UserError.
    """
    check_error_page(predictions.task, count)
    dataset = classifier.dataset if dataset is None else dataset
    if dataset is None:
        raise UserError(f"{classifier.title}: published weights have no data set of their own")
    numbers = find_worst(predictions, count)
    images = _read_images(classifier, dataset, split, numbers)
    predicted = np.argmax(predictions.logits, -1)
    method, maps = explain_classes(classifier, images, predicted[numbers])
    probabilities = Predictions(
        predictions.logits[numbers], predictions.labels[numbers], predictions.task
    ).probabilities
    mistakes = []
    for i, number in enumerate(numbers):
        true = int(predictions.classes[number])
        top = np.argsort(-predictions.logits[number], kind="stable")[:SHOWN_CLASSES].tolist()
        top += [] if true in top else [true]
        guesses = [(k, float(probabilities[i, k])) for k in top]
        pixels = _show_pixels(images[i], dataset.normalize)
        mistakes.append(Mistake(int(number), pixels, maps[i], true, guesses))
    summary = _summarize(classifier.title, predictions, split, len(mistakes), method)
    if protocol:
        lines = (*summary.lines, f"Predictions: {protocol}; the images below are the plain ones.")
        summary = summary._replace(lines=lines)
    size = write_error_page(path, summary, mistakes, classifier.class_names)
    wrong = int((~predictions.is_correct()).sum())
    size_text = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"
    return f"{os.path.basename(path)} ({len(mistakes)} of {wrong:,} mistakes, {size_text})"


def find_worst(predictions: Predictions, count: int) -> np.ndarray:
    """Returns the numbers i64 [n] of the wrongly classified images with the most probable wrong
    class, that one first; at most `count`."""
    wrong = np.flatnonzero(~predictions.is_correct())
    some = predictions._replace(logits=predictions.logits[wrong], labels=predictions.labels[wrong])
    confidence = some.probabilities.max(-1) if len(wrong) else np.zeros(0)
    return wrong[np.argsort(-confidence, kind="stable")][:count]


def find_confused(predictions: Predictions, count: int) -> list[tuple[int, int, int, int]]:
    """Returns the most frequent (true class, predicted class, images, images of the true class)."""
    true, predicted = predictions.classes, np.argmax(predictions.logits, -1)
    wrong = true != predicted
    pairs, counts = np.unique(
        np.stack([true[wrong], predicted[wrong]], 1), axis=0, return_counts=True
    )
    totals = np.bincount(true, minlength=predictions.logits.shape[-1])
    order = np.argsort(-counts, kind="stable")[:count]
    return [
        (int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i]), int(totals[pairs[i, 0]]))
        for i in order
    ]


def explain_classes(
    classifier: Classifier, images: np.ndarray, classes: Sequence[int] | np.ndarray
) -> tuple[str, np.ndarray]:
    """Returns (method's name, maps f32 [N H W] in 0..1) of `classes` for images as they are read.

    Grad-CAM, or the gradient if the network has no spatial maps."""
    found: list[np.ndarray] = []
    path = ""
    for first in range(0, len(images), BATCH):
        rows = np.arange(first, first + BATCH) % len(images)  # equal shapes are compiled once
        rows = rows if len(images) > BATCH else np.arange(len(images))
        some = classifier.normalize(jnp.asarray(images[rows]))
        some = jnp.asarray(some, jnp.float32)
        model, variables, goal = classifier.model, classifier.variables, np.asarray(classes)[rows]
        if not first:
            with contextlib.suppress(UserError):
                path = cams.choose_path(model, variables, some)
        if path:
            maps = cams.grad_cam(model, variables, some, goal, path)
            maps = cams.show_map(maps, some.shape[1:3])
        else:
            maps = gradients.summarize_channels(gradients.gradient(model, variables, some, goal))
            maps = maps / jnp.maximum(maps.max((1, 2), keepdims=True), 1e-12)
        found.append(np.asarray(maps)[: len(images) - first])
    name = f"Grad-CAM at {path}" if path else "gradient of the class by the pixels"
    return name, np.concatenate(found) if found else np.zeros((0, 1, 1), np.float32)


def _read_images(
    classifier: Classifier, dataset: Dataset, split: str, numbers: np.ndarray
) -> np.ndarray:
    """Returns the images [n H W C] of these numbers, as they are read for the evaluation."""
    wanted, first = {int(number) for number in numbers}, 0
    found: dict[int, np.ndarray] = {}
    batches = pipeline.eval_batches(
        dataset, split, classifier.data_config, reader=classifier.reader
    )
    with contextlib.closing(batches):
        for batch in batches:
            if len(found) == len(wanted):
                break
            seen = np.flatnonzero(np.asarray(batch.get("mask", np.ones(len(batch["label"])))) > 0)
            for number, row in enumerate(seen, first):
                if number in wanted:
                    found[number] = np.asarray(batch["image"][row])
            first += len(seen)
    shape = (0, *dataset.image_shape)
    return np.stack([found[int(number)] for number in numbers]) if len(numbers) else np.zeros(shape)


def _show_pixels(image: np.ndarray, in_range: bool) -> np.ndarray:
    """Returns u8 [H W C], C = 1 or 3. Floats are in 0..1 if `in_range`, otherwise scaled to their
    own range; another number of channels is averaged."""
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
        low, high = (0.0, 1.0) if in_range else (float(image.min()), float(image.max()))
        image = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
        image = np.round(255 * image).astype(np.uint8)
    if image.shape[-1] not in (1, 3):
        image = np.round(image.astype(np.float32).mean(-1, keepdims=True)).astype(np.uint8)
    return image


def _summarize(
    title: str, predictions: Predictions, split: str, shown: int, method: str
) -> ErrorSummary:
    right, n = predictions.is_correct(), len(predictions.logits)
    wrong = n - int(right.sum())
    lines = []
    for name, k in (("accuracy", 1), ("top-5 accuracy", 5)):
        if k < predictions.logits.shape[-1]:
            hits = int(predictions.is_correct(k).sum())
            ends: Any = {"accuracy": uncertainty.wilson_interval(hits, n)}
            value = tables.describe_value("accuracy", hits / n, ends)
            lines.append(f"{split}: {name} {value}, {hits:,} of {n:,} images")
    which = "all" if shown == wrong else f"{shown:,} of the"
    below = f"Below: {which} {wrong:,} mistakes." if wrong else "There are no mistakes."
    lines.append(f"Brackets: 95 % intervals over images. {below}")
    lines += [f"Saliency: {method}."] if wrong else []
    return ErrorSummary(title, split, lines, find_confused(predictions, SHOWN_PAIRS))
