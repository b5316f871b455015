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


def test_two_one_sided_tests_are_statsmodels():
    baseline = {0: 0.900, 1: 0.910, 2: 0.920, 3: 0.950}
    row = {0: 0.901, 1: 0.910, 2: 0.918, 3: 0.951, 7: 0.1}  # the baseline lacks seed 7
    # Differences 1, 0, -2, 1 thousandths: mean 0, standard error sqrt(6 / 3) / 2 thousandths,
    # t = 5 / 0.7071 = 7.071 with 3 degrees of freedom: p = 0.0029078.
    found = statistics.compare_with_margin(row, baseline, 0.005)
    np.testing.assert_allclose([found.p_not_worse, found.p_not_better], 0.0029078, atol=1e-6)
    half = statistics.compare_with_margin({0: 0.91, 1: 0.912}, {0: 0.90, 1: 0.90}, 0.02)
    assert half.p_not_worse < half.p_not_better == half.p_equivalent
    weights = pytest.importorskip("statsmodels.stats.weightstats")
    for margin in (0.001, 0.005, 0.02):
        found = statistics.compare_with_margin(row, baseline, margin)
        pairs = [np.array([of[s] for s in range(4)]) for of in (row, baseline)]
        p, above, below = weights.ttost_paired(*pairs, -margin, margin)
        wanted = (margin, above[1], below[1])
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        np.testing.assert_allclose(found.p_equivalent, p, rtol=1e-6)
        # Interval inclusion at the level 1 - 2 alpha is the same test.
        interval = statistics.paired_difference(row, baseline, level=0.9).interval
        verdict = statistics.judge_margin(interval.low, interval.high, margin)
        assert (verdict == "equivalent") == (p < 0.05)


def test_a_margin_without_spread_is_unknown_and_one_of_zero_is_refused():
    assert math.isnan(statistics.compare_with_margin({0: 1.0}, {0: 0.5}, 0.1).p_equivalent)
    same = {0: 0.5, 1: 0.6}
    assert math.isnan(statistics.compare_with_margin(same, same, 0.1).p_not_worse)
    for margin in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="margin: expected a number above 0, got"):
            statistics.compare_with_margin(same, same, margin)


def test_an_interval_is_judged_by_a_margin():
    assert statistics.judge_margin(-0.4, 0.4, 0.5) == "equivalent"
    assert statistics.judge_margin(-0.4, 0.6, 0.5) == "not worse"
    assert statistics.judge_margin(0.6, 0.9, 0.5) == "not worse"
    assert statistics.judge_margin(-0.6, 0.6, 0.5) == "undecided"
    assert statistics.judge_margin(-0.9, -0.6, 0.5) == "worse"
    assert statistics.judge_margin(-0.5, 0.1, 0.5) == "undecided"  # the end belongs to it
    assert statistics.judge_margin(math.nan, math.nan, 0.5) == "undecided"


def test_holm_by_hand():
    # Sorted: 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and none is below the previous one.
    np.testing.assert_allclose(statistics.holm([0.02, 0.01, 0.04, 0.03]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(statistics.holm([0.01, math.nan, 0.6, 0.7]), [0.03, math.nan, 1, 1])
    assert statistics.holm([]) == []


def test_an_unknown_interval_is_named():
    with pytest.raises(UserError, match="expected t or bootstrap, got 'bootstrp'; did you mean"):
        statistics.mean([1.0, 2.0], method="bootstrp")
