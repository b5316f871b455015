"""Statistics over a few seeds: intervals of means, paired differences, equivalence, and Holm's
correction.

One value, or several equal values, say nothing about the spread. The ends of the interval are then
NaN, because an interval of width 0 would claim that there is no spread. Equal values are common,
because an accuracy is a count of correct examples among a few hundred or thousand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from flax_cnns.errors import UserError, did_you_mean

METHODS = ("t", "bootstrap")
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean with a confidence interval; ends that are unknown are NaN."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_known(self) -> bool:
        """Whether the interval is known."""
        return math.isfinite(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval; False if the interval is unknown."""
        return self.low > 0 or self.high < 0


class Difference(NamedTuple):
    """A mean difference with its confidence interval and p-value."""

    interval: Interval
    p: float  # p-value of the two-sided paired t-test; NaN if unknown


def check_method(method: str) -> None:
    """Raises `UserError` unless `method` is one of `METHODS`."""
    if method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise UserError(f"interval: expected {' or '.join(METHODS)}, got {method!r}{near}")


def mean(
    values: Sequence[float], *, method: str = "t", level: float = 0.95, seed: int = 0
) -> Interval:
    """Returns the mean of independent values, such as those of several seeds, with its interval.

    `t` is Student's interval, exact if the values are normally distributed. `bootstrap` is the
    percentile interval (Efron 1979) of 10,000 resamples, drawn with `seed`. It assumes nothing
    about the distribution. For a few values it is too narrow: it never leaves their range.
    """
    array = np.asarray(values, float)
    return _interval(array, _flat(array, array), method, level, seed)


def paired_difference(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    method: str = "t",
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Returns the mean of `values` - `baseline`, both {seed: value}, over the seeds in both.

    The p-value is always that of the paired t-test. It is 1 if all differences are 0.
    """
    seeds = sorted(values.keys() & baseline.keys())
    ours, theirs = (np.array([of[s] for s in seeds], float) for of in (values, baseline))
    difference = ours - theirs
    flat = _flat(difference, np.concatenate([ours, theirs]))
    interval = _interval(difference, flat, method, level, seed)
    n = interval.n
    if n > 1 and not flat:
        t = interval.mean / (np.std(difference, ddof=1) / math.sqrt(n))
        p = float(2 * stats.t.sf(abs(t), n - 1))
    else:
        p = 1.0 if n > 1 and not difference.any() else math.nan
    return Difference(interval, p)


class MarginTest(NamedTuple):
    """Whether a difference is within a margin; p-values are NaN if unknown."""

    margin: float
    p_not_worse: float  # one-sided: the difference is above -margin
    p_not_better: float  # one-sided: the difference is below +margin

    @property
    def p_equivalent(self) -> float:
        """p-value of the two one-sided tests (Schuirmann 1987): the larger of the two."""
        return max(self.p_not_worse, self.p_not_better)


def compare_with_margin(
    values: Mapping[int, float], baseline: Mapping[int, float], margin: float
) -> MarginTest:
    """Tests with one-sided paired t-tests whether `values` - `baseline`, both {seed: value}, is
    within `margin`, in the unit of the values.

    A small p-value shows that the difference is *not* as large as the margin. A large p-value of
    `paired_difference` does not show that: it may only mean that the seeds are too few. Raises
    UserError unless the margin is a number above 0.
    """
    check_margin(margin)
    seeds = sorted(values.keys() & baseline.keys())
    ours, theirs = (np.array([of[s] for s in seeds], float) for of in (values, baseline))
    difference = ours - theirs
    if len(seeds) < 2 or _flat(difference, np.concatenate([ours, theirs])):
        return MarginTest(margin, math.nan, math.nan)
    n = len(seeds)
    error = stats.sem(difference)
    above = float(stats.t.sf((difference.mean() + margin) / error, n - 1))
    below = float(stats.t.cdf((difference.mean() - margin) / error, n - 1))
    return MarginTest(margin, above, below)


def check_margin(margin: float) -> None:
    """Raises `UserError` unless the margin is a number above 0."""
    if not (math.isfinite(margin) and margin > 0):
        raise UserError(f"--margin: expected a number above 0, got {margin:g}")


def judge_margin(low: float, high: float, margin: float) -> str:
    """Judges an interval of a difference, in which more is better, by a margin in the same unit.

    With the interval of the level 1 - 2 alpha, each verdict is wrong with probability alpha at most
    (interval inclusion): "equivalent" if the whole interval is within +-margin; "not worse" if it
    is above -margin; "worse" if it is below -margin; otherwise "undecided".
    """
    check_margin(margin)
    if low > -margin:
        return "equivalent" if high < margin else "not worse"
    return "worse" if high < -margin else "undecided"


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values with Holm's step-down correction (1979), in the same order.

    The correction controls the family-wise error rate: if hypotheses with a corrected value below
    alpha are rejected, the probability of any false rejection is at most alpha. NaN stays NaN and
    is not counted as a test.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = highest
    return corrected


def format_p(p: float) -> str:
    """Formats a p-value: "0.012", "<0.001", or "-" if it is unknown."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _flat(values: np.ndarray, inputs: np.ndarray) -> bool:
    """Whether all `values` are equal, up to rounding of the `inputs` they are computed from."""
    return values.size == 0 or np.ptp(values) <= 1e-9 * np.abs(inputs).max()


def _interval(values: np.ndarray, flat: bool, method: str, level: float, seed: int) -> Interval:
    check_method(method)
    n = len(values)
    center = float(values.mean()) if n else math.nan
    if n < 2 or flat:
        return Interval(center, math.nan, math.nan, n)
    if method == "t":
        half = stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
        return Interval(center, float(center - half), float(center + half), n)
    draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(center, float(low), float(high), n)
