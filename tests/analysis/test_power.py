"""Power of the paired t-test, against statsmodels and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from flax_cnns.analysis import power
from flax_cnns.errors import UserError

# Recorded from statsmodels 0.15.0: TTestPower().power(effect, pairs, 0.05, "two-sided") for 2, 5
# and 12 pairs, and the ceiling of solve_power(effect, power=0.8, alpha=0.05).
RECORDED = {
    0.2: ([0.05197845, 0.06426957, 0.09719878], 199),
    0.5: ([0.06194861, 0.14051669, 0.35282415], 34),
    1.0: ([0.09280916, 0.40138992, 0.88289164], 10),
    3.0: ([0.26077071, 0.99767958, 1.0], 4),
}


@pytest.mark.parametrize("effect", RECORDED)
def test_power_and_seeds_are_statsmodels(effect):
    powers, seeds = RECORDED[effect]
    ours = [power.compute_power(pairs, -effect * 7, 7) for pairs in (2, 5, 12)]
    assert ours == pytest.approx(powers, abs=1e-8)
    assert power.count_seeds(effect, 1.0) == seeds
    theirs = pytest.importorskip("statsmodels.stats.power").TTestPower()
    for pairs, found in zip((2, 5, 12), ours):
        wanted = theirs.power(effect, pairs, 0.05, alternative="two-sided")
        assert found == pytest.approx(wanted, abs=1e-9)


def test_the_rate_of_rejections_in_simulated_ablations():
    """20,000 ablations with 6 seeds and an effect of one standard deviation."""
    pairs = np.random.default_rng(0).normal(1.0, 1.0, (20_000, 6))
    rejected = np.mean(stats.ttest_1samp(pairs, 0, axis=1).pvalue < 0.05)
    assert power.compute_power(6, 1.0, 1.0) == pytest.approx(rejected, abs=4 * 0.0035)


def test_a_plan_from_a_pilot_by_hand():
    baseline = {0: 0.80, 1: 0.81, 2: 0.79, 9: 0.5}
    row = {0: 0.81, 1: 0.83, 2: 0.82, 7: 0.9}  # differences 0.01, 0.02, 0.03: spread 0.01
    plan = power.plan_seeds(row, baseline, 0.01)
    assert plan is not None
    assert plan.pairs == 3
    assert plan.spread == pytest.approx(0.01)
    # Cohen's table for d = 1 gives 10 pairs. The chi-square quantile (0.2; 2) is 0.446, so the
    # bound is 0.01 sqrt(2 / 0.446) = 0.0212, d = 0.472: 37.2 pairs by G*Power's formula.
    # Cohen's table for d = 1 gives 10 pairs. The chi-square quantile (0.2; 2) is 0.446, so the
    # bound is 0.01 sqrt(2 / 0.446) and d = 0.472: statsmodels' solve_power gives 37.14 pairs.
    assert (plan.expected, plan.safe) == (10, 38)


def test_no_plan_without_spread():
    assert power.plan_seeds({0: 0.9}, {0: 0.8}, 0.01) is None
    assert power.plan_seeds({0: 0.9, 1: 0.8}, {0: 0.8, 1: 0.7}, 0.01) is None
    assert power.plan_seeds({0: 0.9}, {1: 0.8}, 0.01) is None
    assert power.count_seeds(1e-6, 1.0) is None
    assert power.compute_power(400, 1.0, 1e-3) == pytest.approx(1.0)
    with pytest.raises(UserError, match="--power: expected a difference above 0, got 0"):
        power.plan_seeds({0: 0.9}, {0: 0.8}, 0.0)
