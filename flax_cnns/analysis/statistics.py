"""What a few seeds tell: a mean with its interval, a paired difference with its p-value, and Holm's
correction of many of those.

From one value, or from values that are all equal, nothing is known of the spread: then there is no
interval (its ends are NaN), rather than one of no width, which would claim that there is none.
Accuracies are counts over a few hundred or thousand examples, so that equal ones are common.
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
    """A mean and what it lies within; NaN where nothing is known."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low)

    @property
    def excludes_zero(self) -> bool:
        """False too where there is no interval."""
        return self.low > 0 or self.high < 0


class Difference(NamedTuple):
    interval: Interval
    p: float  # of the two-sided paired t-test; NaN where it is unknown


def check_method(method: str) -> None:
    """Raises `UserError` where there is no such interval."""
    if method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise UserError(f"interval: expected {' or '.join(METHODS)}, got {method!r}{near}")


def mean(
    values: Sequence[float], *, method: str = "t", level: float = 0.95, seed: int = 0
) -> Interval:
    """Of independent values, the seeds' of one row.

    `t`: Student's, exact where the values are normal. `bootstrap`: the percentile interval (Efron
    1979) of 10,000 resamples, which `seed` draws; it assumes nothing of the distribution, and from
    a few values it is too narrow: it never leaves their range.
    """
    values = np.asarray(values, float)
    return _interval(values, _flat(values, values), method, level, seed)


def paired_difference(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    method: str = "t",
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """{seed: value} minus the baseline's, over the seeds that both have.

    The p-value is that of the paired t-test, whatever the interval; 1 where both are the same.
    """
    both = sorted(values.keys() & baseline.keys())
    ours, theirs = (np.array([of[s] for s in both], float) for of in (values, baseline))
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979), in the order given: whoever believes all that are below
    alpha errs in any of them with a probability of alpha at most. NaN stays, and is no test."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = highest
    return corrected


def _flat(values: np.ndarray, inputs: np.ndarray) -> bool:
    """Whether the values are equal, but for the rounding of the inputs that they come from."""
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
