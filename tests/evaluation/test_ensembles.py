"""Ensembles: the average beside each member, and the difference between two classifiers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from flax_cnns.errors import UserError
from flax_cnns.evaluation.ensembles import Ensemble, compare_accuracy
from flax_cnns.evaluation.predictions import Predictions, RunningAverage, average

rng = np.random.default_rng(0)
LABELS = np.array([0, 1, 2])


def log(rows):
    return Predictions(np.log(np.float32(rows)), LABELS)


def test_two_members_outvoted_by_a_sure_one():
    """By hand, mean probabilities of image 1: (0.9 + 0.2 + 0.3) / 3 = 0.467, (0.05 + 0.7 + 0.4) / 3
    = 0.383. Two of three members are wrong there, and the average is right."""
    right = [[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    ensemble = Ensemble()
    ensemble.add("sure", log([[0.9, 0.05, 0.05], *right]))
    ensemble.add("wrong", log([[0.2, 0.7, 0.1], *right]))
    ensemble.add("worse", log([[0.3, 0.4, 0.3], right[0], [0.1, 0.8, 0.1]]))
    assert [member.accuracy for member in ensemble.members] == [1, 2 / 3, 1 / 3]
    assert ensemble.best.name == "sure"
    found = ensemble.predictions
    np.testing.assert_allclose(found.probabilities[0], [1.4 / 3, 1.15 / 3, 0.45 / 3], rtol=1e-5)
    assert found.is_correct().all()
    difference = compare_accuracy(found.is_correct(), ensemble.members[1].correct)
    assert difference.difference == pytest.approx(1 / 3)
    assert difference.p == 1.0  # one image that only the average gets right
    assert difference.interval[0] < 0 < difference.interval[1]


def test_another_number_of_images_is_refused_by_name():
    ensemble = Ensemble()
    ensemble.add("runs/a", log(np.full((3, 3), 1 / 3)))
    few = Predictions(np.zeros((2, 3)), LABELS[:2])
    with pytest.raises(UserError, match="runs/a and runs/b: predictions of 3 images"):
        ensemble.add("runs/b", few)
    assert len(ensemble.members) == 1
    with pytest.raises(UserError, match="at least one network"):
        Ensemble().predictions  # noqa: B018


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_a_running_average_is_the_average_of_the_members_so_far(of):
    members = [Predictions(rng.normal(size=(3, 3)).astype(np.float32), LABELS) for _ in range(4)]
    running = RunningAverage(of)
    for count, member in enumerate(members, 1):
        running.add(member)
        stack = [each.probabilities if of != "logits" else each.logits for each in members[:count]]
        found = running.result()
        found = found.probabilities if of != "logits" else found.logits
        np.testing.assert_allclose(found, np.mean(stack, 0), rtol=1e-5)


def test_labels_of_which_all_members_are_sure_stay_finite():
    """The sigmoid of 50 is 1 in float64, and log(1 - 1) is -inf; of one member it stays 50."""
    sure = Predictions(np.float32([[50, -50, 1]]), np.float32([[1, 0, 1]]), "multilabel")
    np.testing.assert_allclose(average([sure, sure]).logits, sure.logits, rtol=1e-6)
    other = sure._replace(logits=np.float32([[0, 0, -1]]))
    wanted = (expit(sure.logits) + expit(other.logits)) / 2
    np.testing.assert_allclose(average([sure, other]).probabilities, wanted, rtol=1e-5)
