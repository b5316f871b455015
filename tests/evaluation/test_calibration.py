"""Calibration: other libraries' values, values derived by hand, ties, edges, intervals, errors."""

from __future__ import annotations

import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.evaluation import calibration
from flax_cnns.evaluation.calibration import (
    Scores,
    bin_by_mass,
    bin_by_width,
    compare_scores,
    find_risk_coverage,
    measure_classwise_ece,
    measure_scores,
    score_predictions,
    score_probabilities,
)
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.evaluation.temperature import apply_temperature, fit_temperature
from tests.evaluation.make_calibration import PATH, SIZES, make_cases, softmax

RECORDED = np.load(PATH)


def make_scores(confidence, correct):
    zeros = np.zeros(len(confidence))
    return Scores(np.array(confidence, float), np.array(correct, float), zeros, zeros)


def make_predictions(images=200, seed=3, scale=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, 4))
    labels = np.argmax(logits + 0.8 * rng.gumbel(size=logits.shape), -1)
    return Predictions((scale * logits).astype(np.float32), labels)


# ---- what other libraries measured


@pytest.fixture(params=SIZES)
def recorded(request):
    prefix = f"{request.param}/"
    return {name.removeprefix(prefix): RECORDED[name] for name in RECORDED if prefix in name}


def test_metrics_are_those_of_other_libraries(recorded):
    predictions = Predictions(recorded["logits"], recorded["labels"])
    scores = score_predictions(predictions)
    found = measure_scores(scores)
    found["classwise_ece"] = measure_classwise_ece(predictions).mean()
    curve = find_risk_coverage(scores)
    # torch-uncertainty integrates from coverage 1/N to 1, by the trapezoid rule.
    span = 1 - 1 / len(scores.correct)
    found["aurc"] = np.trapezoid(curve.risk, curve.coverage) / span
    compared = [name for name in recorded if name not in ("logits", "labels", "temperature_torch")]
    assert len(compared) >= 7
    for name in compared:
        ours = found[name[: name.index("_ece") + 4] if "_ece" in name else name.split("_")[0]]
        assert ours == pytest.approx(recorded[name], abs=1e-6), name
    assert fit_temperature(predictions) == pytest.approx(recorded["temperature_torch"], abs=1e-6)


def test_the_recorded_predictions_are_still_those_that_the_script_makes():
    for name, (logits, labels) in make_cases().items():
        np.testing.assert_allclose(RECORDED[f"{name}/logits"], logits, rtol=1e-6)
        np.testing.assert_array_equal(RECORDED[f"{name}/labels"], labels)


# ---- derived by hand


def test_an_example_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5], [0.0, 1.0, 0.0]])
    found = score_probabilities(probabilities, np.array([0, 1, 1]))
    np.testing.assert_allclose(found.confidence, [0.7, 0.5, 1.0])
    np.testing.assert_array_equal(found.correct, [1, 0, 1])
    np.testing.assert_allclose(found.brier, [0.09 + 0.04 + 0.01, 0.01 + 0.36 + 0.25, 0], atol=1e-15)
    np.testing.assert_allclose(found.nll, -np.log([0.7, 0.4, 1]), atol=1e-15)
    assert measure_scores(found, bins=2)["ece"] == pytest.approx((0.5 + abs(2 - 1.7)) / 3)


def test_a_bin_has_its_upper_edge_and_empty_bins_are_nan():
    found = bin_by_width(make_scores([0.0, 0.25, 0.5, 0.500001, 1.0], [0, 1, 1, 0, 1]), bins=4)
    assert found.images.tolist() == [2, 1, 1, 1]
    np.testing.assert_allclose(found.accuracy, [0.5, 1, 0, 1])
    found = bin_by_width(make_scores([0.9, 0.8], [1, 0]), bins=4)
    assert found.images.tolist() == [0, 0, 0, 2]
    assert np.isnan(found.accuracy[:3]).all()
    assert found.calibration_error == pytest.approx(abs(0.5 - 0.85))


def test_bins_of_equal_mass_differ_by_one_image():
    found = bin_by_mass(make_scores([0.9, 0.2, 0.5, 0.4, 0.3], [1, 0, 1, 0, 1]), bins=2)
    assert found.images.tolist() == [3, 2]
    np.testing.assert_allclose(found.low, [0.2, 0.5])
    np.testing.assert_allclose(found.high, [0.4, 0.9])
    np.testing.assert_allclose(found.accuracy, [1 / 3, 1])
    assert found.calibration_error == pytest.approx((abs(1 - 0.9) + abs(2 - 1.4)) / 5)


def test_risk_and_coverage_by_hand():
    curve = find_risk_coverage(make_scores([0.7, 0.9, 0.8], [1, 1, 0]))
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3])
    np.testing.assert_allclose(curve.coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.confidence, [0.9, 0.8, 0.7])
    found = measure_scores(make_scores([0.7, 0.9, 0.8], [1, 1, 0]), bins=3)
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert found["excess_aurc"] == pytest.approx(found["aurc"] - 1 / 9)


def test_the_order_of_images_of_equal_confidence_has_no_effect():
    confidence, correct = [0.6, 0.6, 0.6, 0.9, 0.3], np.array([1, 0, 1, 1, 0])
    wanted = measure_scores(make_scores(confidence, correct), bins=3)
    for order in ([1, 0, 2, 3, 4], [4, 2, 1, 3, 0]):
        turned = make_scores(np.take(confidence, order), correct[order])
        assert measure_scores(turned, bins=3) == pytest.approx(wanted)
    curve = find_risk_coverage(make_scores([0.5, 0.5], [1, 0]))
    np.testing.assert_allclose(curve.risk, [0.5, 0.5])


def test_soft_labels_of_a_network_that_predicts_them():
    labels = np.array([[0.6, 0.4], [0.1, 0.9], [1.0, 0.0]])
    found = score_probabilities(labels, labels)
    np.testing.assert_allclose(found.correct, [0.6, 0.9, 1.0])
    np.testing.assert_allclose(found.brier, 0, atol=1e-15)
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    assert found.nll[0] == pytest.approx(entropy)
    assert found.nll[2] == 0
    assert measure_scores(found, bins=3)["ece"] == pytest.approx(0)


def test_images_are_scored_in_chunks(monkeypatch):
    predictions = make_predictions()
    wanted, temperature = score_predictions(predictions, 1.5), fit_temperature(predictions)
    monkeypatch.setattr(calibration, "CHUNK", 7)
    for ours, theirs in zip(score_predictions(predictions, 1.5), wanted):
        np.testing.assert_array_equal(ours, theirs)
    assert fit_temperature(predictions) == pytest.approx(temperature, rel=1e-11)


# ---- temperature


@pytest.mark.parametrize("soft", [False, True])
def test_the_temperature_of_two_classes_in_closed_form(soft):
    """Logits (a, 0), and 7 of 10 images of the first class: sigmoid(a / T) = 0.7."""
    logits = np.tile(np.float32([3, 0]), (10, 1))
    labels = np.tile([0.7, 0.3], (10, 1)) if soft else np.array([0] * 7 + [1] * 3)
    found = fit_temperature(Predictions(logits, labels))
    assert found == pytest.approx(3 / np.log(0.7 / 0.3), rel=1e-12)


def test_the_fitted_temperature_has_the_least_nll_and_keeps_the_classes():
    predictions = make_predictions(images=500)
    fitted = fit_temperature(predictions)
    nll = [score_predictions(predictions, fitted * by).nll.mean() for by in (0.99, 1, 1.01)]
    assert nll[1] < min(nll[0], nll[2])
    after = apply_temperature(predictions, fitted)
    np.testing.assert_array_equal(after.logits.argmax(-1), predictions.logits.argmax(-1))
    assert score_predictions(after).nll.mean() == pytest.approx(nll[1], rel=1e-6)
    assert fit_temperature(after) == pytest.approx(1, rel=1e-6)


def test_small_temperatures_are_found():
    predictions = make_predictions(images=500)
    wanted = fit_temperature(predictions)
    tiny = predictions._replace(logits=predictions.logits / np.float32(1024))
    assert fit_temperature(tiny) == pytest.approx(wanted / 1024, rel=1e-9)


# ---- intervals


def test_intervals_of_means_are_nearly_normal_and_changes_are_paired():
    predictions = make_predictions(images=400)
    before = score_predictions(predictions)
    after = score_predictions(predictions, fit_temperature(predictions))
    found = compare_scores([before, after], resamples=300)
    assert found.metrics[1] == measure_scores(after)
    low, high = found.intervals[0]["nll"]
    error = before.nll.std() / np.sqrt(400)
    assert low == pytest.approx(before.nll.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(before.nll.mean() + 1.96 * error, abs=0.25 * error)
    for metrics, intervals in zip(found.metrics, found.intervals):
        for name, value in metrics.items():
            assert 0 <= intervals[name][0] < value < intervals[name][1], name
    error = (after.nll - before.nll).std() / np.sqrt(400)
    assert np.ptp(found.change["nll"]) == pytest.approx(2 * 1.96 * error, rel=0.2)
    again = compare_scores([before, after], resamples=300)
    assert again == found
    same = compare_scores([before, before], resamples=20)
    np.testing.assert_allclose(list(same.change.values()), 0, atol=1e-15)


# ---- errors


def test_errors():
    predictions = make_predictions(images=20)
    with pytest.raises(UserError, match=r"14 images are too few for 15 bins.*at most 14 bins"):
        measure_scores(make_scores([0.5] * 14, [1] * 14))
    with pytest.raises(UserError, match="multilabel data: calibration is of the one predicted"):
        score_predictions(predictions._replace(task="multilabel"))
    with pytest.raises(UserError, match="label 7 is no class: expected 0 to 3"):
        score_predictions(predictions._replace(labels=np.full(20, 7)))
    with pytest.raises(UserError, match=r"soft labels: .*row 0 sums to 4"):
        score_predictions(predictions._replace(labels=np.ones((20, 4))))
    with pytest.raises(UserError, match=r"probabilities: .*row 1 sums to 1\.5"):
        score_probabilities(np.array([[0.5, 0.5], [1.0, 0.5]]), np.array([0, 1]))
    with pytest.raises(UserError, match="no images"):
        score_predictions(Predictions(np.zeros((0, 4)), np.zeros(0, int)))
    broken = predictions.logits.copy()
    broken[5, 1] = np.nan
    with pytest.raises(UserError, match="logits of image 5 are not finite"):
        score_predictions(predictions._replace(logits=broken))


def test_predictions_that_no_temperature_fits():
    predictions = make_predictions(images=20)
    best = predictions._replace(labels=predictions.logits.argmax(-1))
    with pytest.raises(UserError, match="all 20 images are classified correctly"):
        fit_temperature(best)
    worst = predictions._replace(labels=predictions.logits.argmin(-1))
    with pytest.raises(UserError, match="no better than chance"):
        fit_temperature(worst)
    infinite = predictions.logits.copy()
    infinite[3, 0] = -np.inf
    with pytest.raises(UserError, match="infinite"):
        fit_temperature(predictions._replace(logits=infinite))
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(UserError, match="expected a positive number"):
            apply_temperature(predictions, wrong)


def test_the_reference_softmax_is_a_distribution():
    np.testing.assert_allclose(softmax(np.float32([[0, np.log(3)]])), [[0.25, 0.75]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("excess", [0.0, 0.1])
def test_intervals_hold_the_mean_metrics_of_as_many_images(excess):
    """Nearly 95 % of the intervals hold the mean of the metric over many draws of 400 images, also
    that of the ECE of a calibrated network."""
    rng = np.random.default_rng(0)

    def draw():
        confidence = 0.2 + 0.8 * rng.beta(6, 1.5, 400)
        return make_scores(confidence, rng.random(400) < confidence - excess)

    names = ("ece", "adaptive_ece", "aurc")
    means = np.mean([[measure_scores(draw())[name] for name in names] for _ in range(300)], 0)
    held = np.zeros(len(names))
    for _ in range(40):
        ends = compare_scores([draw()], resamples=60).intervals[0]
        held += [ends[name][0] <= mean <= ends[name][1] for name, mean in zip(names, means)]
    assert (held >= 0.85 * 40).all(), held
