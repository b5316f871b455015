"""Decides which trials to stop early.

A decision is a function of the logged validations: of the trial's own up to some step, and of those
of the other trials. A trial that ran a little further before it was stopped changes nothing: it is
pruned at the step at which the rule says so, and its later validations are dropped. A trial is
never pruned at its last step.

median      Optuna's median pruner: after five complete trials, a trial stops if its best validation
            so far is worse than the median of the complete trials at this step. The first tenth of
            the run never stops a trial.
halving     asynchronous successive halving (Li et al. 2020, MLSys, section 3.2) without pauses, as
            in Optuna: a trial that reaches a rung goes on if it is among the best third of those
            that have reached it. The rungs are r, 3r, 9r, ... steps.
hyperband   Hyperband (Li et al. 2018, JMLR 18) over such halvings, as in Optuna: bracket s begins
            with rung r * 3^s, and a trial's number decides its bracket.

r is a 27th of the run, at least the steps to the first validation.
"""

from __future__ import annotations

import binascii
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.studies.search.tuning.records import TrialRecord
from flax_cnns.studies.search.tuning.storage import STUDY_NAME

PRUNERS = ("none", "median", "halving", "hyperband")
STARTUP_TRIALS = 5  # complete trials without which the median is not used
WARMUP = 0.1  # the part of the run in which the median is not used
REDUCTION = 3  # one trial of so many goes on at a rung

Curve = Sequence[tuple[int, float]]  # (step, validation), by step


def check_pruner(pruner: str) -> None:
    """Raises UserError for an unknown pruner."""
    if pruner not in PRUNERS:
        raise UserError(f"--pruner: unknown {pruner!r}{did_you_mean(pruner, PRUNERS)}")


class Decision(NamedTuple):
    """Whether a trial goes on."""

    prune_at: int | None  # the step at which the trial is pruned; None: it goes on
    rungs: int = 0  # rungs that the trial has reached


class Pruner:
    """The rule of a study. `total_steps` and `first_validation` are those of the config's run."""

    def __init__(self, name: str, mode: str, total_steps: int, first_validation: int):
        check_pruner(name)
        self.name, self.mode, self.total_steps = name, mode, total_steps
        self.first_rung = max(total_steps // REDUCTION**3, first_validation, 1)
        self.brackets = 1
        while self.first_rung * REDUCTION**self.brackets <= total_steps:
            self.brackets += 1

    def decide(
        self, number: int, curve: Curve, others: Iterable[TrialRecord], last_step: int
    ) -> Decision:
        """Follows a trial along its validations. `last_step`: the last one of its run.

        `others`: the other trials of the study, those that run too.
        """
        if self.name == "none":
            return Decision(None)
        others, rungs = list(others), 0
        for i, (step, value) in enumerate(curve):
            if step >= last_step:
                break
            seen = curve[: i + 1]
            if self.name == "median":
                pruned = self._is_below_median(seen, others)
            else:
                pruned, rungs = self._halve(number, step, value, rungs, others)
            if pruned:
                return Decision(step, rungs)
        return Decision(None, rungs)

    def get_bracket(self, number: int) -> int:
        """Returns the bracket of a trial, from 0: as in Optuna, by a hash of its number."""
        if self.name != "hyperband":
            return 0
        budgets = [
            math.ceil(self.brackets * REDUCTION ** (self.brackets - 1 - b) / (self.brackets - b))
            for b in range(self.brackets)
        ]
        place = binascii.crc32(f"{STUDY_NAME}_{number}".encode()) % sum(budgets)
        ends = itertools.accumulate(budgets)
        return next(bracket for bracket, end in enumerate(ends) if place < end)

    def _is_below_median(self, seen: Curve, others: Sequence[TrialRecord]) -> bool:
        step = seen[-1][0]
        complete = [trial for trial in others if trial.state == "complete"]
        if len(complete) < STARTUP_TRIALS or step < WARMUP * self.total_steps:
            return False
        own = [value for _, value in seen if not math.isnan(value)]
        if not own:
            return True
        # Trials with other batch sizes validate at other steps: their newest value counts.
        values = [_find_newest(trial.curve, step) for trial in complete]
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return False
        middle = float(np.median(known))
        return max(own) < middle if self.mode == "max" else min(own) > middle

    def _halve(
        self, number: int, step: int, value: float, rungs: int, others: Sequence[TrialRecord]
    ) -> tuple[bool, int]:
        """Returns (whether a trial that has passed `rungs` rungs is pruned, rungs that it has
        reached)."""
        bracket = self.get_bracket(number)
        rivals = [trial for trial in others if self.get_bracket(trial.number) == bracket]
        while step >= self._rung_step(bracket, rungs):
            if math.isnan(value):
                return True, rungs
            values = [self._find_rung_value(trial, bracket, rungs) for trial in rivals]
            known = sorted([v for v in values if v is not None] + [value])
            promoted = max(len(known) // REDUCTION, 1)
            rungs += 1
            if self.mode == "max" and value < known[-promoted]:
                return True, rungs
            if self.mode == "min" and value > known[promoted - 1]:
                return True, rungs
        return False, rungs

    def _rung_step(self, bracket: int, rung: int) -> int:
        return self.first_rung * REDUCTION ** (bracket + rung)

    def _find_rung_value(self, trial: TrialRecord, bracket: int, rung: int) -> float | None:
        """Returns the value with which a trial reached a rung; None if it did not reach it."""
        if trial.state != "running" and trial.rungs <= rung:
            return None
        at = self._rung_step(bracket, rung)
        return next((v for s, v in trial.curve if s >= at and not math.isnan(v)), None)


def _find_newest(curve: Curve, step: int) -> float:
    """Returns the newest value up to a step; NaN if there is none."""
    return next((value for s, value in reversed(curve) if s <= step), math.nan)
