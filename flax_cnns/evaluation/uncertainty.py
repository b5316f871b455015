"""Uncertainty over images: intervals of metrics, and two networks on the same images.

An interval of 95 % says how far a metric would vary with other images of the same kind. It says
nothing about other seeds of the training (`analysis.statistics` does, over several runs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from flax_cnns.errors import UserError
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.train import losses, metrics
from flax_cnns.types import Array

LEVEL = 0.95
RESAMPLES = 2_000
# With fewer disagreements, the exact test, and a closed form in place of the bootstrap, whose
# interval is then too narrow (its width is 0 without disagreements).
FEW_PAIRS = 25

Ends = tuple[float, float]  # low and high end of an interval; NaN: unknown


# ---------------------------------------------------------------------------- one network


def wilson_interval(successes: float, trials: float, *, level: float = LEVEL) -> Ends:
    """Returns Wilson's score interval (1927, JASA 22) of a proportion; NaN without trials.

    Unlike p +- 1.96 sqrt(p (1 - p) / n), it stays in 0..1, and keeps its level near 0 and 1.
    """
    if not trials:
        return math.nan, math.nan
    z = stats.norm.ppf((1 + level) / 2)
    share, n = successes / trials, trials
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # Rounding must not move an end out of 0..1, nor off 0 without successes, nor off 1 with n.
    low = 0.0 if successes == 0 else max(center - half, 0.0)
    high = 1.0 if successes == trials else min(center + half, 1.0)
    return float(low), float(high)


def bootstrap_interval(
    sums: np.ndarray,
    counts: np.ndarray | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ends:
    """Returns the percentile bootstrap interval (Efron 1979) of a mean over images.

    `sums` f32 [N] are the images' values. With `counts`, both [N M], the metric is the mean of M
    ratios of totals, without those whose count is 0, as in `train.metrics`. Images are drawn with
    replacement, with `seed`. NaN without images.
    """
    if not len(sums):
        return math.nan, math.nan
    values = np.asarray(sums, np.float64).reshape(len(sums), -1)
    weights = np.ones_like(values) if counts is None else np.reshape(counts, values.shape)
    random, n, found = np.random.default_rng(seed), len(values), np.empty(resamples)
    for i in range(resamples):
        drawn = random.integers(n, size=n, dtype=np.int32)
        if values.shape[1] == 1:
            total = values[drawn, 0].sum(keepdims=True)
            count = weights[drawn, 0].sum(keepdims=True) if counts is not None else np.array([n])
        else:
            times = np.bincount(drawn, minlength=n).astype(np.float64)
            total, count = times @ values, times @ weights
        seen = count != 0
        found[i] = (total[seen] / count[seen]).mean() if seen.any() else math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def measure_intervals(
    predictions: Predictions,
    *,
    loss: losses.Loss | None = None,
    own_metrics: Mapping[str, metrics.Metric] = {},
    level: float = LEVEL,
    seed: int = 0,
    chunk: int = 1024,
) -> dict[str, Ends]:
    """Returns the intervals of the metrics that `predictions.measure` returns, by name.

    "accuracy", "top5" and "subset_accuracy" are proportions of images: Wilson's interval. "loss",
    "label_accuracy" (the labels of one image are not independent) and the user's metrics: the
    bootstrap over images. `chunk`: the images at once.
    """
    logits, labels, task = predictions
    loss, n = losses.select_loss(loss, task), len(logits)
    chunk = min(chunk, n)

    @jax.jit
    def measure_images(logits: Array, labels: Array) -> dict[str, Array]:
        soft = losses.soft_labels(labels, logits.shape[-1])
        rows = {"loss": loss(logits, soft)}
        if task == "multilabel":
            rows["label_accuracy"] = jnp.mean((logits > 0) == (soft > 0.5), axis=-1)
        return rows | _sum_own_metrics_by_image(own_metrics, logits, soft)

    each: dict[str, list[np.ndarray]] = {}
    for first in range(0, n, chunk):
        # The last chunk begins early, so that all have one shape and are compiled once.
        begin = min(first, n - chunk)
        part = slice(begin, begin + chunk)
        rows = measure_images(jnp.asarray(logits[part]), jnp.asarray(labels[part]))
        for name, value in jax.device_get(rows).items():
            each.setdefault(name, []).append(np.asarray(value)[first - begin :])
    values = {name: np.concatenate(parts) for name, parts in each.items()}
    found: dict[str, Ends] = {}
    for name in ("loss", "label_accuracy"):
        if name in values:
            found[name] = bootstrap_interval(values[name], level=level, seed=seed)
    if task == "multilabel":
        right = int(((logits > 0) == (labels > 0.5)).all(-1).sum())
        found["subset_accuracy"] = wilson_interval(right, n, level=level)
    else:
        found["accuracy"] = wilson_interval(int(predictions.is_correct().sum()), n, level=level)
        if logits.shape[-1] > 5:
            found["top5"] = wilson_interval(int(predictions.is_correct(5).sum()), n, level=level)
    for name in own_metrics:
        sums, counts = (values[f"{name}/{kind}"] for kind in ("sum", "count"))
        found[name] = bootstrap_interval(sums, counts, level=level, seed=seed)
    return found


def _sum_own_metrics_by_image(
    own_metrics: Mapping[str, metrics.Metric], logits: Array, labels: Array
) -> dict[str, Array]:
    """Returns {"NAME/sum", "NAME/count"}, each [n] or [n M]: the metrics' sums of each image alone.

    A metric's sums over several images are the sums of these, because metrics are added over
    batches and devices."""
    if not own_metrics:
        return {}

    def of_one(logits: Array, labels: Array) -> dict[str, Array]:
        return metrics.sum_own_metrics(own_metrics, logits[None], labels[None])

    sums = jax.vmap(of_one)(logits, labels)
    return {key.removeprefix("metric/"): value for key, value in sums.items()}


# ---------------------------------------------------------------------------- two networks


class PairedCounts(NamedTuple):
    """How two networks answered the same images: the numbers of images."""

    both: int  # both networks are right
    only_first: int
    only_second: int
    neither: int

    @property
    def examples(self) -> int:
        return sum(self)

    @property
    def disagreements(self) -> int:
        """Images that exactly one of the networks classifies correctly."""
        return self.only_first + self.only_second

    @property
    def difference(self) -> float:
        """Accuracy of the second network minus that of the first."""
        return (self.only_second - self.only_first) / self.examples


def find_correct(predictions: Predictions) -> np.ndarray:
    """Returns bool [N]: whether the most likely class is the true one; for multilabel data, whether
    all labels are right."""
    if predictions.task == "multilabel":
        return ((predictions.logits > 0) == (predictions.labels > 0.5)).all(-1)
    return predictions.is_correct()


def count_pairs(first: np.ndarray, second: np.ndarray) -> PairedCounts:
    """Counts the pairs of bool [N] and bool [N]: whether each network is right. Raises UserError if
    the lengths differ or if there are no images."""
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or not first.size:
        raise UserError(
            "two networks are compared on the same images, at least one: got"
            f" {first.size} and {second.size}"
        )
    counts = ((first & second), (first & ~second), (~first & second), (~first & ~second))
    return PairedCounts(*(int(count.sum()) for count in counts))


def mcnemar(pairs: PairedCounts) -> float:
    """Returns the p-value of McNemar's test (1947): are the two networks equally often right?

    Below `FEW_PAIRS` disagreements the exact binomial test, from there on the chi-square
    distribution of (|b - c| - 1)^2 / (b + c), with Edwards's correction. 1 without disagreements.
    """
    b, c = pairs.only_first, pairs.only_second
    if b == c:
        return 1.0
    if b + c < FEW_PAIRS:
        return float(stats.binomtest(b, b + c, 0.5).pvalue)
    return float(stats.chi2.sf((abs(b - c) - 1) ** 2 / (b + c), 1))


def difference_interval(
    pairs: PairedCounts,
    *,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = 10_000,
) -> Ends:
    """Returns the interval of the difference of two accuracies on the same images.

    The percentile bootstrap draws images with replacement, and with each image both answers. Their
    counts are then multinomial, so they are drawn as such. Below `FEW_PAIRS` disagreements, the
    interval is Bonett and Price's (2012, J. Educ. Behav. Stat. 37): one image is added to each kind
    of disagreement.
    """
    n, b, c = pairs.examples, pairs.only_first, pairs.only_second
    if b + c < FEW_PAIRS:
        first, second = (b + 1) / (n + 2), (c + 1) / (n + 2)
        center = second - first
        half = stats.norm.ppf((1 + level) / 2) * math.sqrt((first + second - center**2) / (n + 2))
        return float(max(center - half, -1.0)), float(min(center + half, 1.0))
    shares = [b / n, c / n, (n - b - c) / n]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    differences = (drawn[:, 1] - drawn[:, 0]) / n
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
