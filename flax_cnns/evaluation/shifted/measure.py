"""Metrics that only some shifted sets need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.evaluation.corruptions import scores
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.evaluation.shifted.rows import CORRUPTIONS

# AlexNet's errors on ImageNet-C, the mean over the severities.
ALEXNET_ERRORS = {name: float(np.mean(row)) for name, row in scores.ALEXNET_ERRORS.items()}
ALEXNET_ERRORS["frost"] = scores.ALEXNET_FROST_ERROR


def count_answers(logits: np.ndarray, answers: Sequence[frozenset[int]]) -> dict[str, int]:
    """Returns {"accuracy", "top5"}: the numbers of images with one of their `answers` among the
    highest logit or the five highest. Ties go to the lower class."""
    top = np.argsort(-logits, axis=-1, kind="stable")[:, :5].tolist()
    return {
        "accuracy": sum(row[0] in right for row, right in zip(top, answers)),
        "top5": sum(not right.isdisjoint(row) for row, right in zip(top, answers)),
    }


def choose_among(predictions: Predictions, classes: np.ndarray) -> Predictions:
    """Returns the predictions of a network that may choose only among `classes`, i64 sorted.

    Labels become positions in `classes`. The softmax is over these classes, as in timm's
    evaluation of ImageNet-A and -R.
    """
    labels = np.searchsorted(classes, predictions.labels).astype(np.int32)
    return Predictions(predictions.logits[:, classes], labels)


def mean_corruption_error(accuracies: Mapping[str, float]) -> float:
    """Returns ImageNet-C's mean corruption error: the mean over the 15 corruptions of the error
    divided by AlexNet's (Hendrycks & Dietterich 2019, section 4.2). 1 is AlexNet.

    `accuracies`: {corruption: the mean over the five severities}. Raises UserError if one of the 15
    is missing.
    """
    if missing := [name for name in CORRUPTIONS if name not in accuracies]:
        raise UserError(f"the mean corruption error needs {', '.join(missing)}")
    errors = {name: [1 - accuracies[name]] for name in CORRUPTIONS}
    alexnet = {name: [error] for name, error in ALEXNET_ERRORS.items()}
    return scores.mean_corruption_error(errors, alexnet)
