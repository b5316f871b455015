"""Intervals and tests over images, against statsmodels, SciPy and closed forms."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.predictions import Predictions, measure
from flax_cnns.evaluation.uncertainty import PairedCounts

# Recorded from statsmodels 0.15.0: proportion_confint(k, n, alpha, method="wilson").
WILSON = [
    ((8, 10, 0.95), (0.4901624715, 0.9433178485)),
    ((0, 10, 0.95), (0.0, 0.2775327999)),
    ((360, 360, 0.95), (0.9894419431, 1.0)),
    ((9721, 10000, 0.95), (0.9686864534, 0.9751509753)),
    ((327, 360, 0.9), (0.880180246, 0.9303946274)),
]
# Recorded from statsmodels 0.15.0: mcnemar([[., b], [c, .]], exact=b + c < 25, correction=True).
MCNEMAR = [((3, 8), 0.2265625), ((0, 6), 0.03125), ((12, 13), 1.0), ((30, 55), 0.0092367)]


@pytest.mark.parametrize(("given", "wanted"), WILSON)
def test_wilsons_interval_is_statsmodels(given, wanted):
    k, n, level = given
    found = uncertainty.wilson_interval(k, n, level=level)
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    theirs = proportion.proportion_confint(k, n, alpha=1 - level, method="wilson")
    np.testing.assert_allclose(found, theirs, atol=1e-9)
    assert math.isnan(uncertainty.wilson_interval(0, 0)[0])


def test_wilsons_interval_covers_as_often_as_it_says():
    """Exact coverage at p = 0.97, n = 100, where p +- 1.96 s covers 80 % only."""
    covered, naive = 0.0, 0.0
    for k in range(101):
        chance = stats.binom.pmf(k, 100, 0.97)
        low, high = uncertainty.wilson_interval(k, 100)
        half = 1.959964 * math.sqrt(k / 100 * (1 - k / 100) / 100)
        covered += chance * (low <= 0.97 <= high)
        naive += chance * (abs(k / 100 - 0.97) <= half)
    assert naive < 0.85 < 0.93 < covered


@pytest.mark.parametrize(("pair", "wanted"), MCNEMAR)
def test_mcnemar_is_statsmodels(pair, wanted):
    b, c = pair
    found = uncertainty.mcnemar(PairedCounts(100, b, c, 7))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    theirs = tables.mcnemar([[100, b], [c, 7]], exact=b + c < 25, correction=True).pvalue
    np.testing.assert_allclose(found, min(theirs, 1.0), atol=1e-12)
    assert uncertainty.mcnemar(PairedCounts(50, 0, 0, 3)) == 1.0
    assert uncertainty.mcnemar(PairedCounts(50, 20, 20, 3)) == 1.0


def test_the_bootstrap_of_a_mean_is_scipys_and_seeded():
    values = np.random.default_rng(1).exponential(size=300)
    found = uncertainty.bootstrap_interval(values, seed=3)
    assert found == uncertainty.bootstrap_interval(values, seed=3)
    assert found != uncertainty.bootstrap_interval(values, seed=4)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0)
    np.testing.assert_allclose(found, tuple(theirs.confidence_interval), atol=0.02)
    # The central limit theorem: the width is 2 * 1.96 standard errors.
    width = 2 * 1.96 * values.std() / math.sqrt(300)
    assert found[1] - found[0] == pytest.approx(width, rel=0.08)
    assert math.isnan(uncertainty.bootstrap_interval(np.zeros(0))[0])


def test_the_bootstrap_of_a_ratio_draws_numerator_and_denominator_together():
    random = np.random.default_rng(2)
    counts = random.integers(0, 5, size=(200, 2)).astype(float)
    found = uncertainty.bootstrap_interval(3 * counts, counts)
    np.testing.assert_allclose(found, (3, 3), atol=1e-12)  # each image's ratio is 3, or 0 / 0
    counts[:, 1] = 0  # a ratio without examples is left out
    np.testing.assert_allclose(uncertainty.bootstrap_interval(3 * counts, counts), (3, 3))


def test_the_paired_interval_is_a_bootstrap_over_images():
    random = np.random.default_rng(0)
    first, second = random.random(2000) < 0.9, random.random(2000) < 0.93
    pairs = uncertainty.count_pairs(first, second)
    assert sum(pairs) == 2000
    assert pairs.difference == pytest.approx(second.mean() - first.mean())
    found = uncertainty.difference_interval(pairs)
    assert found == uncertainty.difference_interval(pairs)
    gains = second.astype(float) - first
    theirs = stats.bootstrap((gains,), np.mean, method="percentile", rng=0, n_resamples=4000)
    np.testing.assert_allclose(found, tuple(theirs.confidence_interval), atol=1.5e-3)
    # Pairing matters: answers that mostly agree give a narrower interval.
    alike = first ^ (random.random(2000) < 0.02)
    low, high = uncertainty.difference_interval(uncertainty.count_pairs(first, alike))
    assert high - low < 0.5 * (found[1] - found[0])


def test_few_disagreements_still_have_a_width():
    # By hand, n = 98, b = c = 0: p = 1/100 both, difference 0, se = sqrt(0.02 / 100).
    half = 1.959964 * math.sqrt(0.02 / 100)
    found = uncertainty.difference_interval(PairedCounts(90, 0, 0, 8))
    np.testing.assert_allclose(found, (-half, half), atol=1e-6)
    # b = 3, c = 9, n = 198: (10 - 4) / 200 = 0.03, se = sqrt((14 / 200 - 0.0009) / 200).
    half = 1.959964 * math.sqrt((0.07 - 0.0009) / 200)
    found = uncertainty.difference_interval(PairedCounts(180, 3, 9, 6))
    np.testing.assert_allclose(found, (0.03 - half, 0.03 + half), atol=1e-6)
    with pytest.raises(UserError, match="same images, at least one: got 3 and 2"):
        uncertainty.count_pairs(np.ones(3), np.ones(2))


def test_the_bootstrap_of_few_disagreements_would_claim_too_much(monkeypatch):
    """Exact coverage with 200 images, of which each network alone gets 0.2 % and 0.6 % right."""

    def cover(few_pairs):
        monkeypatch.setattr(uncertainty, "FEW_PAIRS", few_pairs)
        total = 0.0
        for b, c in np.ndindex(6, 10):
            chance = stats.multinomial.pmf([b, c, 200 - b - c], 200, [0.002, 0.006, 0.992])
            pairs = PairedCounts(200 - b - c, b, c, 0)
            low, high = uncertainty.difference_interval(pairs, resamples=500)
            total += chance * (low <= 0.004 <= high)
        return total

    assert cover(25) > 0.95
    assert cover(0) < 0.75


def test_every_metric_has_an_interval_around_its_value():
    random = np.random.default_rng(0)
    logits = random.normal(size=(500, 8)).astype(np.float32)
    labels = random.integers(8, size=500).astype(np.int32)
    logits[np.arange(500), labels] += 1.5

    def top_logit(logits, labels, mask):
        return (logits.max(-1) * mask).sum(), mask.sum()

    def recall(logits, labels, mask):  # of each class
        hits = labels * (jnp.argmax(logits, -1)[:, None] == jnp.arange(8))
        return (hits * mask[:, None]).sum(0), (labels * mask[:, None]).sum(0)

    predictions = Predictions(logits, labels)
    own = {"top_logit": top_logit, "recall": recall}
    metrics = measure(predictions, own_metrics=own)
    found = uncertainty.measure_intervals(predictions, own_metrics=own, chunk=128)
    assert found.keys() == metrics.keys() == {"loss", "accuracy", "top5", "top_logit", "recall"}
    for name, (low, high) in found.items():
        assert low < metrics[name] < high, name
    right = int((logits.argmax(-1) == labels).sum())
    assert found["accuracy"] == uncertainty.wilson_interval(right, 500)
    np.testing.assert_allclose(
        found["top_logit"], uncertainty.bootstrap_interval(logits.max(-1)), rtol=1e-6
    )
    whole = uncertainty.measure_intervals(predictions, own_metrics=own)
    for name in found:  # the chunks change nothing but the last bits
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-5)


def test_labels_of_one_image_are_not_independent():
    """All labels of an image are right together: N K Bernoulli trials would be too narrow."""
    random = np.random.default_rng(0)
    labels = random.integers(2, size=(400, 16)).astype(np.float32)
    right = random.random(400) < 0.7
    logits = np.where(right[:, None], 1, -1) * (2 * labels - 1)
    predictions = Predictions(logits.astype(np.float32), labels, "multilabel")
    found = uncertainty.measure_intervals(predictions)
    assert found.keys() == measure(predictions).keys()
    low, high = found["label_accuracy"]
    images = uncertainty.wilson_interval(right.sum(), 400)
    labels_alone = uncertainty.wilson_interval(16 * right.sum(), 16 * 400)
    assert found["subset_accuracy"] == images
    assert high - low == pytest.approx(images[1] - images[0], rel=0.1)
    assert high - low > 3 * (labels_alone[1] - labels_alone[0])
