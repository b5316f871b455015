"""Intervals, p-values and Holm's correction, against numbers by hand and SciPy's tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from flax_cnns.analysis import statistics
from flax_cnns.errors import UserError


def test_students_interval_by_hand():
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.302653 from a table: 2 +- 4.302653 / sqrt(3).
    found = statistics.mean([1.0, 2.0, 3.0])
    np.testing.assert_allclose(found, (2.0, -0.484138, 4.484138, 3), atol=1e-5)
    assert not found.excludes_zero
    assert statistics.mean([11.0, 12.0, 13.0]).excludes_zero
    assert statistics.mean([-11.0, -12.0, -13.0]).excludes_zero


def test_a_paired_difference_takes_what_the_seeds_share_out_of_it():
    baseline = {0: 0.70, 1: 0.80, 2: 0.90, 3: 0.95}
    row = {0: 0.71, 1: 0.83, 2: 0.92, 7: 0.10}  # one lacks seed 3, the other seed 7
    found = statistics.paired_difference(row, baseline)
    # Differences 0.01, 0.03, 0.02: t = 0.02 / (0.01 / sqrt 3) = 3.464, p = 0.0742 with 2 degrees.
    assert found.interval.n == 3
    np.testing.assert_allclose(found.interval.mean, 0.02)
    np.testing.assert_allclose(found.interval.high, 0.02 + 4.302653 * 0.01 / 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(found.p, 0.0741799, atol=1e-6)
    pairs = [row[s] for s in range(3)], [baseline[s] for s in range(3)]
    np.testing.assert_allclose(found.p, stats.ttest_rel(*pairs).pvalue, rtol=1e-9)
    assert found.p < stats.ttest_ind(*pairs).pvalue  # without pairing


def test_the_bootstrap_is_scipys_and_seeded():
    values = np.random.default_rng(1).exponential(size=12)
    found = statistics.mean(values, method="bootstrap", seed=3)
    assert found == statistics.mean(values, method="bootstrap", seed=3)
    assert found != statistics.mean(values, method="bootstrap", seed=4)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000)
    np.testing.assert_allclose(
        found[1:3], tuple(theirs.confidence_interval), atol=0.03 * np.ptp(values)
    )
    difference = statistics.paired_difference(
        dict(enumerate(values)), dict.fromkeys(range(12), 0.0)
    )
    assert statistics.paired_difference(
        dict(enumerate(values)), dict.fromkeys(range(12), 0.0), method="bootstrap"
    ).p == pytest.approx(difference.p)


@pytest.mark.parametrize("method", statistics.METHODS)
def test_no_spread_no_interval(method):
    for values in ([0.5], [0.5, 0.5, 0.5]):
        found = statistics.mean(values, method=method)
        assert (found.mean, found.n, found.is_known) == (0.5, len(values), False)
        assert not found.excludes_zero
    nothing = statistics.mean([], method=method)
    assert nothing.n == 0
    assert math.isnan(nothing.mean)


def test_equal_differences_are_known_in_spite_of_rounding():
    """In floating point 324/360 - 323/360 and 31/360 - 30/360 are different numbers."""
    counts = {0: 324, 1: 31, 2: 341}
    row = {s: n / 360 for s, n in counts.items()}
    baseline = {s: (n - 1) / 360 for s, n in counts.items()}
    assert len({row[s] - baseline[s] for s in row}) > 1
    found = statistics.paired_difference(row, baseline)
    assert not found.interval.is_known
    assert math.isnan(found.p)
    assert statistics.paired_difference(row, row).p == 1.0
    assert math.isnan(statistics.paired_difference({0: 1.0}, {0: 0.5}).p)
    assert statistics.paired_difference({0: 1.0}, {1: 0.5}).interval.n == 0


def test_holm_by_hand():
    # Sorted: 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and none is below the previous one.
    np.testing.assert_allclose(statistics.holm([0.02, 0.01, 0.04, 0.03]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(statistics.holm([0.01, math.nan, 0.6, 0.7]), [0.03, math.nan, 1, 1])
    assert statistics.holm([]) == []


def test_an_unknown_interval_is_named():
    with pytest.raises(UserError, match="expected t or bootstrap, got 'bootstrp'; did you mean"):
        statistics.mean([1.0, 2.0], method="bootstrp")
