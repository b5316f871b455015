"""Temperature scaling: one number that makes a network's probabilities calibrated.

The logits are divided by a temperature T, which is chosen on held-out images by the negative log
likelihood (Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599). The predicted classes
stay. T above 1 means that the network was too sure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.optimize import brentq

from flax_cnns.errors import UserError
from flax_cnns.evaluation.calibration import read_chunks
from flax_cnns.evaluation.predictions import Predictions


def fit_temperature(predictions: Predictions) -> float:
    """Returns the temperature of least NLL, to a relative error of about 1e-12.

    NLL is convex in b = 1 / T. Its slope is the mean over the images of E_p[logit] - the true
    class's logit, with p = softmax(b * logits). Brent's method finds its one zero, in float64 and
    without random numbers. Labels may be soft.

    Raises UserError if there is no such temperature: if every image is classified correctly, NLL
    falls until T = 0; if the logits are no better than chance, it falls as T grows for ever. Also
    raises it for infinite logits, and as `score_predictions`.
    """
    images = len(predictions.logits)
    true = sum(float((labels * below).sum()) for below, labels in _read_below_top(predictions))
    if true == 0:
        raise UserError(
            f"all {images} images are classified correctly, so no temperature fits: the loss falls"
            " until T = 0; use more images, or harder ones"
        )

    def find_slope(inverse: float) -> float:
        total = 0.0
        for below, _ in _read_below_top(predictions):
            weights = np.exp(inverse * below)
            total += float(((weights * below).sum(-1) / weights.sum(-1)).sum())
        return (total - true) / images

    if find_slope(0.0) >= 0:
        raise UserError(
            f"no temperature fits: on {images} images the logits are no better than chance; train"
            " longer, or check the labels"
        )
    low, high = 0.0, 1.0
    while find_slope(high) < 0:
        low, high = high, 2 * high
    return float(1 / brentq(find_slope, low, high, xtol=1e-14, rtol=1e-13))


def _read_below_top(predictions: Predictions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (each logit minus the largest of its image f64 [n K], labels f64 [n K]) by chunks. The
    subtraction changes neither probabilities nor slopes."""
    for logits, labels in read_chunks(predictions):
        if np.isinf(logits).any():
            raise UserError("no temperature fits logits that are infinite")
        yield logits - logits.max(-1, keepdims=True), labels


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Returns the predictions with their logits divided by `temperature`. Raises UserError if it is
    not positive and finite, and for multilabel data."""
    check_temperature(temperature)
    if predictions.task != "classes":
        raise UserError(f"{predictions.task} predictions have no temperature: no class competes")
    return predictions._replace(logits=predictions.logits / np.float32(temperature))


def check_temperature(temperature: Any) -> float:
    """Returns `temperature`. Raises UserError unless it is a positive, finite number."""
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise UserError(f"temperature: expected a positive number, got {temperature!r}")
    return float(temperature)
