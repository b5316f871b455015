"""Runs of the fast recipe: whitening, alternating flips, Muon, and flips in evaluation."""

from __future__ import annotations

import json

import chex
import numpy as np
import pytest

from configs import cifar10_fast
from flax_cnns import run
from flax_cnns.runs.classifier import make_classifier_from_run, predict_split
from flax_cnns.runs.evaluate import evaluate_run
from flax_cnns.runtime.preemption import Preempted
from tests.tiny_runs import arrays

pytestmark = [pytest.mark.usefixtures("no_pictures"), pytest.mark.slow]


@pytest.fixture
def config():
    config = cifar10_fast.get_config("smoke")
    config.data.name, config.data.mock, config.data.image_size = "digits", 0, 12
    with config.unlocked():
        config.model.widths = (4, 4, 4)
    config.data.batch_size = config.data.eval_batch_size = 64
    config.train.duration = "8 steps"
    config.checkpoint.every = config.train.eval_every = "4 steps"
    config.log.every = "4 steps"
    return config


def test_it_resumes_to_the_bit_and_evaluates_as_it_tested(config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config, whole)
    with pytest.raises(Preempted):
        run(config, parts, stop_when=lambda step, metrics: step == 4)
    run(config, parts)
    ours = arrays(whole)
    chex.assert_trees_all_equal(arrays(parts), ours)

    summary = json.loads((whole / "summary.json").read_text())
    found = evaluate_run(whole)
    assert found["accuracy"] == pytest.approx(summary["test/accuracy"])
    assert found["loss"] == pytest.approx(summary["test/loss"], rel=1e-5)
    classifier = make_classifier_from_run(whole)
    both = predict_split(classifier, "test").logits
    straight = predict_split(classifier, "test", apply=classifier.model.apply).logits
    turned = predict_split(
        classifier,
        "test",
        apply=lambda variables, images, **options: classifier.model.apply(
            variables, images[:, :, ::-1], **options
        ),
    ).logits
    assert abs(straight - turned).max() > 1e-3
    np.testing.assert_allclose(both, (straight + turned) / 2, atol=1e-5)

    config.train.steps_per_call = 4
    run(config, tmp_path / "calls")
    for path, leaf in arrays(tmp_path / "calls").items():
        if np.issubdtype(leaf.dtype, np.floating) and leaf.size and np.isfinite(leaf).all():
            np.testing.assert_allclose(leaf, ours[path], rtol=1e-3, atol=1e-4, err_msg=path)
