"""A run's temperature: fitted on validation, written, used by `predict`, and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.evaluation import calibration
from flax_cnns.evaluation.calibration import measure_scores, score_predictions
from flax_cnns.runs import evaluate_calibration, predict
from flax_cnns.runs.classifier import make_classifier_from_run, predict_split
from flax_cnns.runs.evaluate_calibration import calibrate_run, fit_classifier_temperature
from flax_cnns.runs.temperature import load_temperature


@pytest.fixture(scope="module")
def calibrated(finished, tmp_path_factory):
    """(A copy of the finished run with its calibration, what `calibrate_run` returned)."""
    run = tmp_path_factory.mktemp("calibration") / "run"
    shutil.copytree(finished[0], run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "RESAMPLES", 20)
        return run, calibrate_run(run)


@pytest.fixture(scope="module")
def classifier(calibrated):
    return make_classifier_from_run(calibrated[0])


def test_the_temperature_has_the_least_nll_on_validation(calibrated, classifier):
    run, found = calibrated
    validation = predict_split(classifier, "validation")
    temperature = found["temperature"]
    nll = [score_predictions(validation, temperature * by).nll.mean() for by in (0.98, 1, 1.02)]
    assert nll[1] < min(nll[0], nll[2])
    assert found["fitted"] == {"split": "validation", "examples": len(validation.labels)}
    assert load_temperature(run) == load_temperature(run, str(found["step"])) == temperature


def test_the_metrics_are_those_of_the_test_split(calibrated, classifier):
    run, found = calibrated
    test = predict_split(classifier, "test")
    for name, temperature in (("before", 1.0), ("after", found["temperature"])):
        wanted = measure_scores(score_predictions(test, temperature))
        assert {metric: found[name][metric] for metric in wanted} == pytest.approx(wanted)
        for metric in wanted:
            low, high = found[name]["intervals"][metric]
            assert low <= found[name][metric] <= high
    assert json.loads((run / "calibration.json").read_text())["after"]["ece"] == wanted["ece"]
    assert (run / "calibration.png").stat().st_size > 10_000
    written = json.loads((run / f"evaluation_test_{found['step']}_calibrated.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert written["accuracy"] == summary["test/accuracy"]
    assert written["loss"] == pytest.approx(wanted["nll"], rel=1e-5)
    assert written["protocol"] == {"temperature": found["temperature"], "bins": 15}


def test_predict_divides_logits_by_the_temperature_and_says_so(calibrated):
    run, found = calibrated
    plain = predict.make_predictor_from_folder(run)
    scaled = predict.make_predictor_from_folder(run, calibrated=True)
    assert scaled.title == f"{plain.title}, temperature {found['temperature']:.4g}"
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 1), dtype=np.uint8)
    powers = np.asarray(plain.probabilities(image), np.float64) ** (1 / found["temperature"])
    np.testing.assert_allclose(scaled.probabilities(image), powers / powers.sum(), rtol=1e-4)


def test_the_temperature_of_another_step_is_refused(calibrated, tmp_path):
    run, found = calibrated
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/calibration.json"
    other = found["step"] - 2  # the checkpoint before the last
    with pytest.raises(UserError, match=rf"step {found['step']}, and step {other} is used; fit"):
        predict.make_predictor_from_folder(f"{tmp_path}/run@{other}", calibrated=True)
    path.write_text(json.dumps({**found, "temperature": -1}))
    with pytest.raises(UserError, match=r"calibration.json: temperature: expected a positive"):
        load_temperature(tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match=r"no calibration.json.*--calibrate"):
        load_temperature(tmp_path / "run")
    (tmp_path / "run/about.json").write_text("{}")
    with pytest.raises(UserError, match="converted weights, which have no temperature"):
        predict.make_predictor_from_folder(tmp_path / "run", calibrated=True)


def test_where_no_temperature_is_fitted(classifier):
    for split, reason in (("test", "metrics too good"), ("train", "trained on"), ("x", "uses")):
        with pytest.raises(UserError, match=f"not on {split}: .*{reason}"):
            fit_classifier_temperature(classifier, split)
    splits = {name: classifier.dataset.splits[name] for name in ("train", "test")}
    lacking = dataclasses.replace(classifier.dataset, splits=splits)
    with pytest.raises(UserError, match=r"no validation split.*--config\.data\.validation=0\.1"):
        fit_classifier_temperature(classifier._replace(dataset=lacking))
    with pytest.raises(UserError, match="multilabel data predicts no single class"):
        fit_classifier_temperature(classifier._replace(task="multilabel"))
    with pytest.raises(UserError, match="published weights have no validation split"):
        fit_classifier_temperature(classifier._replace(run=None, dataset=None))


def test_more_bins_than_images_and_an_unknown_split(calibrated, classifier, monkeypatch):
    monkeypatch.setattr(
        evaluate_calibration, "make_classifier_from_run", lambda *_, **__: classifier
    )
    with pytest.raises(UserError, match=r"test: .*360 images are too few for 361 bins"):
        calibrate_run(calibrated[0], bins=361)
    with pytest.raises(UserError, match="no split 'tst'; did you mean 'test'"):
        calibrate_run(calibrated[0], split="tst")
