"""How many seeds a difference needs: the power of the two-sided paired t-test.

If the n differences are normal with mean d and standard deviation s, the test's statistic has the
noncentral t distribution with n - 1 degrees of freedom and noncentrality sqrt(n) d / s (Cohen 1988,
section 2.5). The power is the probability that the test rejects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from flax_cnns.analysis.statistics import paired_difference
from flax_cnns.errors import UserError

ALPHA = 0.05  # of the test
POWER = 0.8
CONFIDENCE = 0.8  # that the standard deviation is below the bound from the pilot
MAX_SEEDS = 100_000


class SeedsNeeded(NamedTuple):
    """Seeds that find a difference with 80 % power; None if more than `MAX_SEEDS`."""

    expected: int | None  # if the standard deviation is that of the pilot
    safe: int | None  # if it is at the upper end of its one-sided 80 % interval
    spread: float  # standard deviation of the pilot's paired differences
    pairs: int  # of the pilot


def compute_power(seeds: int, difference: float, spread: float, *, alpha: float = ALPHA) -> float:
    """Returns the power of the two-sided paired t-test with `seeds` pairs, at least two.

    `difference`: the true mean difference. `spread`: the standard deviation of the differences, in
    the same unit.
    """
    shift = math.sqrt(seeds) * abs(difference) / spread
    critical = float(stats.t.ppf(1 - alpha / 2, seeds - 1))
    above = float(stats.nct.sf(critical, seeds - 1, shift))
    below = float(stats.nct.cdf(-critical, seeds - 1, shift))
    # SciPy gives NaN for some extreme tails; their probability is far below 1e-9.
    return above + (below if math.isfinite(below) else 0.0)


def count_seeds(
    difference: float, spread: float, *, power: float = POWER, alpha: float = ALPHA
) -> int | None:
    """Returns the smallest number of pairs with this power; None if it is above `MAX_SEEDS`."""
    low, high = 1, 2  # the power with `low` pairs is too small
    while compute_power(high, difference, spread, alpha=alpha) < power:
        low, high = high, 2 * high
        if high > MAX_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = compute_power(middle, difference, spread, alpha=alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def plan_seeds(
    values: Mapping[int, float], baseline: Mapping[int, float], difference: float
) -> SeedsNeeded | None:
    """Plans the seeds for a difference from a pilot, both {seed: value}, paired by seed.

    The spread of a few pairs is itself uncertain, so a plan from its estimate has the promised
    power only about half of the time. `safe` takes the upper end of its one-sided 80 % interval
    (Browne 1995, Statistics in Medicine 14). Returns None if fewer than two pairs are known, or if
    all differences are equal.
    """
    check_difference(difference)
    seeds = sorted(values.keys() & baseline.keys())
    pairs = len(seeds)
    if not paired_difference(values, baseline).interval.is_known:
        return None
    spread = float(np.std([values[s] - baseline[s] for s in seeds], ddof=1))
    bound = spread * math.sqrt((pairs - 1) / stats.chi2.ppf(1 - CONFIDENCE, pairs - 1))
    return SeedsNeeded(
        count_seeds(difference, spread), count_seeds(difference, bound), spread, pairs
    )


def check_difference(difference: float) -> None:
    """Raises UserError unless the difference is a number above 0."""
    if not (math.isfinite(difference) and difference > 0):
        raise UserError(f"--power: expected a difference above 0, got {difference:g}")
