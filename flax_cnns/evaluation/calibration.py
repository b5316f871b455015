"""Calibration: whether a network that says "80 % sure" is right for 80 % of such images.

    scores = score_predictions(predictions)  # or score_probabilities(probabilities, labels)
    measure_scores(scores)  # {"ece", "adaptive_ece", "brier", "nll", "aurc", "excess_aurc"}

Metrics are computed in float64 on the host, from four numbers per image:

- ECE: the mean gap |accuracy - confidence| over 15 bins of equal width, weighted by their numbers
  of images (Guo et al. 2017, section 2, https://arxiv.org/abs/1706.04599). Confidence is the
  probability of the predicted class. As in the paper, a bin is (low, high]; confidence 0 is in the
  first bin. Empty bins are left out.
- Adaptive ECE: the same with bins of equally many images, to within one; the bins of the lowest
  confidence get one more (Nguyen & O'Connor 2015, https://arxiv.org/abs/1508.05154; Nixon et al.
  2019, https://arxiv.org/abs/1904.01685).
- Brier score: the squared distance from probabilities to the label, summed over the classes, so it
  is between 0 and 2 (Brier 1950). Some libraries halve it, or divide by the number of classes.
- NLL: the mean of -log(probability of the true class), in nats.
- AURC: the mean error over all coverages k/N, if the k images of highest confidence are answered
  and the others are left to a human (Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500).
  Excess AURC: AURC minus that of the best order of the same errors (Geifman et al. 2019,
  https://arxiv.org/abs/1805.08206, who approximate the best order's; here it is exact).

Images of equal confidence share their mean correctness, so their order has no effect. ECE of few
images is biased: it is above 0 even for a perfectly calibrated network.

With soft labels, the correctness of an image is the share that its label gives to the predicted
class, and Brier score and NLL compare with the whole label. Multilabel data are refused, because
their networks predict no single class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from flax_cnns.errors import UserError
from flax_cnns.evaluation.predictions import Predictions

BINS = 15
RESAMPLES = 1000
CHUNK = 4096  # images whose probabilities are in memory as float64


class Scores(NamedTuple):
    """What the metrics need of each of N images, each f64 [N]."""

    confidence: np.ndarray  # the probability of the predicted class
    correct: np.ndarray  # 1 or 0; of a soft label, what it gives to the predicted class
    brier: np.ndarray
    nll: np.ndarray  # in nats

    def take(self, rows: np.ndarray) -> Scores:
        """Returns the scores of some images, given by numbers i64 [n]."""
        return Scores(*(values[rows] for values in self))


class ReliabilityBins(NamedTuple):
    """Images in M bins by confidence, each [M]; NaN where a bin is empty."""

    low: np.ndarray
    high: np.ndarray
    images: np.ndarray  # how many
    confidence: np.ndarray  # mean
    accuracy: np.ndarray  # mean

    @property
    def calibration_error(self) -> float:
        """The mean |accuracy - confidence|, weighted by the images of the bins."""
        full = self.images > 0
        gaps = np.abs(self.accuracy[full] - self.confidence[full])
        return float(gaps @ self.images[full] / self.images.sum())


class RiskCoverage(NamedTuple):
    """The risk-coverage curve: point k is for the k + 1 images of highest confidence, each [N]."""

    coverage: np.ndarray  # (k + 1) / N
    risk: np.ndarray  # the fraction of errors among them
    confidence: np.ndarray  # the lowest confidence among them


# ---- scores of images


def score_predictions(predictions: Predictions, temperature: float = 1.0) -> Scores:
    """Returns the scores of N images, with their logits divided by `temperature`. Raises UserError
    for multilabel data, logits of NaN, or labels that are no classes or distributions."""
    parts = []
    for logits, labels in read_chunks(predictions):
        parts.append(_score(log_softmax(logits / temperature, axis=-1), labels))
    return Scores(*map(np.concatenate, zip(*parts)))


def score_probabilities(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """Returns the scores of `probabilities` [N K] for `labels`, i [N] or f [N K].

    Raises UserError if a row of `probabilities` is no distribution, or for the labels as
    `score_predictions`.
    """
    _check_distributions(np.asarray(probabilities), "probabilities")
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(probabilities, np.float64))
    return score_predictions(Predictions(logits, np.asarray(labels)))


def read_chunks(predictions: Predictions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (logits f64 [n K], labels as distributions f64 [n K]) of up to CHUNK images."""
    logits, labels, task = predictions
    if task != "classes":
        raise UserError(
            f"{task} data: calibration is of the one predicted class of an image, and these"
            " networks predict none; expected data of the task classes"
        )
    if not len(logits):
        raise UserError("no images: calibration needs at least one")
    classes = logits.shape[-1]
    if labels.ndim > 1:
        _check_distributions(labels, "soft labels")
    elif labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise UserError(f"label {wrong} is no class: expected 0 to {classes - 1}")
    for first in range(0, len(logits), CHUNK):
        some, truth = logits[first : first + CHUNK], labels[first : first + CHUNK]
        bad = np.isnan(some).any(-1) | np.isposinf(some).any(-1) | np.isneginf(some).all(-1)
        if bad.any():
            raise UserError(
                f"the logits of image {first + int(bad.argmax())} are not finite; the network"
                " diverged, or divides by zero on this image"
            )
        soft = truth if truth.ndim > 1 else truth[:, None] == np.arange(classes)
        yield some.astype(np.float64), soft.astype(np.float64)


def _check_distributions(rows: np.ndarray, what: str) -> None:
    bad = (np.abs(rows.sum(-1, dtype=np.float64) - 1) > 1e-3) | (rows < 0).any(-1)
    if rows.ndim != 2 or bad.any():
        where = (
            f"row {bad.argmax()} sums to {rows[bad][0].sum():g}" if rows.ndim == 2 else "not 2-D"
        )
        raise UserError(f"{what}: expected [N K], each row at least 0 and of sum 1; got {where}")


def _score(logs: np.ndarray, labels: np.ndarray) -> Scores:
    predicted = np.argmax(logs, -1)  # ties go to the lower class, as in `train.metrics`
    rows, probabilities = np.arange(len(logs)), np.exp(logs)
    nll = -np.where(labels > 0, labels * np.where(labels > 0, logs, 0), 0).sum(-1)
    brier = np.square(probabilities - labels).sum(-1)
    return Scores(probabilities[rows, predicted], labels[rows, predicted], brier, nll)


# ---- metrics


def bin_by_width(scores: Scores, bins: int = BINS) -> ReliabilityBins:
    """Divides images among `bins` intervals of equal width, (low, high]."""
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, scores.confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(index, scores.confidence, bins) / count
        accuracy = np.bincount(index, scores.correct, bins) / count
    return ReliabilityBins(edges[:-1], edges[1:], count, confidence, accuracy)


def bin_by_mass(scores: Scores, bins: int = BINS) -> ReliabilityBins:
    """Divides images among `bins` bins of equally many images, to within one. Raises UserError if
    there are fewer images than bins."""
    total = len(scores.confidence)
    if total < bins:
        raise UserError(
            f"adaptive ECE: {total} images are too few for {bins} bins, each of which needs one;"
            f" choose at most {total} bins, or a split of more images"
        )
    confidence, correct = _sort_by_confidence(scores)
    count = np.full(bins, total // bins) + (np.arange(bins) < total % bins)
    first = np.cumsum(count) - count
    means = [np.add.reduceat(values, first) / count for values in (confidence, correct)]
    return ReliabilityBins(confidence[first], confidence[first + count - 1], count, *means)


def find_risk_coverage(scores: Scores) -> RiskCoverage:
    """Returns the risk-coverage curve of N images."""
    confidence, correct = _sort_by_confidence(scores)
    answered = np.arange(1, len(correct) + 1)
    risk = np.cumsum(1 - correct[::-1]) / answered
    return RiskCoverage(answered / len(correct), risk, confidence[::-1])


def _sort_by_confidence(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Confidence in ascending order, and correctness, shared by images of equal confidence."""
    order = np.argsort(scores.confidence, kind="stable")  # linear for what is sorted already
    confidence, correct = scores.confidence[order], scores.correct[order]
    first = np.flatnonzero(np.r_[True, confidence[1:] != confidence[:-1]])
    size = np.diff(np.r_[first, len(confidence)])
    return confidence, np.repeat(np.add.reduceat(correct, first) / size, size)


def measure_scores(scores: Scores, bins: int = BINS) -> dict[str, float]:
    """Returns {"ece", "adaptive_ece", "brier", "nll", "aurc", "excess_aurc"}, as the module defines
    them. Raises UserError if there are fewer images than bins."""
    best = np.sort(1 - scores.correct)  # the right answers first
    aurc = float(find_risk_coverage(scores).risk.mean())
    return {
        "ece": bin_by_width(scores, bins).calibration_error,
        "adaptive_ece": bin_by_mass(scores, bins).calibration_error,
        "brier": float(scores.brier.mean()),
        "nll": float(scores.nll.mean()),
        "aurc": aurc,
        "excess_aurc": aurc - float((np.cumsum(best) / np.arange(1, len(best) + 1)).mean()),
    }


def measure_classwise_ece(predictions: Predictions, bins: int = BINS) -> np.ndarray:
    """Returns the ECE of each class's probability for all images, f64 [K].

    Their mean is the classwise ECE of Kull et al. 2019, https://arxiv.org/abs/1910.12656. Raises
    UserError as `score_predictions`.
    """
    parts = [(np.exp(log_softmax(logits, -1)), soft) for logits, soft in read_chunks(predictions)]
    probabilities, labels = map(np.concatenate, zip(*parts))
    unused = np.zeros(len(labels))
    return np.array(
        [
            bin_by_width(Scores(*columns, unused, unused), bins).calibration_error
            for columns in zip(probabilities.T, labels.T)
        ]
    )


# ---- intervals


class CalibrationComparison(NamedTuple):
    """Metrics of several predictions for the same images, with bootstrap intervals."""

    metrics: list[dict[str, float]]
    intervals: list[dict[str, tuple[float, float]]]
    # Of each metric of the last predictions minus the first's; the images are resampled together.
    change: dict[str, tuple[float, float]]


def compare_scores(
    members: Sequence[Scores],
    *,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationComparison:
    """Returns the metrics of `members`, scores of the same images, with intervals over the images.

    An interval has the percentiles of `resamples` resamples of the images, moved by the resamples'
    bias (their mean minus the metric), because the ECE of a resample is above that of the images
    themselves. Metrics are not negative, so intervals end at 0. Raises UserError as
    `measure_scores`.
    """
    orders = [np.argsort(scores.confidence, kind="stable") for scores in members]
    ascending = [scores.take(order) for scores, order in zip(members, orders)]
    metrics = [measure_scores(scores, bins) for scores in members]
    rng, total = np.random.default_rng(seed), len(members[0].confidence)
    draws = np.empty((len(members), resamples, len(metrics[0])))
    for draw in range(resamples):
        times = np.bincount(rng.integers(total, size=total), minlength=total)
        for member, (scores, order) in enumerate(zip(ascending, orders)):
            rows = np.repeat(np.arange(total), times[order])
            draws[member, draw] = list(measure_scores(scores.take(rows), bins).values())
    found = np.array([list(of.values()) for of in metrics])

    def find_intervals(draws: np.ndarray, values: np.ndarray, lowest: float) -> dict:
        ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        low, high = np.maximum(ends - (draws.mean(0) - values), lowest)
        return {name: (float(a), float(b)) for name, a, b in zip(metrics[0], low, high)}

    intervals = [find_intervals(draws[i], found[i], 0.0) for i in range(len(members))]
    change = find_intervals(draws[-1] - draws[0], found[-1] - found[0], -np.inf)
    return CalibrationComparison(metrics, intervals, change)
