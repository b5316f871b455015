"""Ensembles: the averaged predictions of several networks, and those of each network.

ensemble = Ensemble()
for name, predictions in members:
    ensemble.add(name, predictions)
ensemble.predictions  # the average, for `predictions.measure`

Members come one after the other, so only one network and one average are in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.predictions import Predictions, RunningAverage


class Member(NamedTuple):
    """A network of an ensemble."""

    name: str
    correct: np.ndarray  # bool [N]: which images the network classifies correctly

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def interval(self) -> uncertainty.Ends:
        """Wilson's 95 % interval of the accuracy, over images."""
        return uncertainty.wilson_interval(int(self.correct.sum()), len(self.correct))


class PairedDifference(NamedTuple):
    """The accuracy of one classifier minus that of another, on the same images."""

    difference: float  # -1..1
    interval: uncertainty.Ends  # 95 %, over images
    p: float  # McNemar's test


class Ensemble:
    """The average of the members so far. `of`: "probabilities" or "logits"."""

    def __init__(self, of: str = "probabilities"):
        self.members: list[Member] = []
        self._average = RunningAverage(of)

    def add(self, name: str, predictions: Predictions) -> None:
        """Adds a network. Raises UserError, which names the network, if its labels or the number of
        its classes differ from those of the first."""
        try:
            self._average.add(predictions)
        except UserError as error:
            raise UserError(f"{self.members[0].name} and {name}: {error}") from None
        self.members.append(Member(name, uncertainty.find_correct(predictions)))

    @property
    def predictions(self) -> Predictions:
        """The average of the members. Raises UserError if there are none."""
        return self._average.result()

    @property
    def best(self) -> Member:
        """The member with the highest accuracy on these images; of equals, the first."""
        return max(self.members, key=lambda member: member.accuracy)


def compare_accuracy(ours: np.ndarray, base: np.ndarray) -> PairedDifference:
    """Compares two classifiers, both bool [N] of `uncertainty.find_correct`, on the same images."""
    pairs = uncertainty.count_pairs(base, ours)
    return PairedDifference(
        pairs.difference, uncertainty.difference_interval(pairs), uncertainty.mcnemar(pairs)
    )
