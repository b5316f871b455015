"""An honest clock: candidates in turn, A B A B, waited for, medians, ratios with their spread.

A machine that slows down for a minute slows down all candidates of that minute, so what is compared
is each round's ratio and not two averages from different times.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from flax_cnns.errors import UserError, did_you_mean


class Spread(NamedTuple):
    median: float
    low: float  # the smallest
    high: float  # the largest

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Comparison(NamedTuple):
    seconds: dict[str, list[float]]  # name -> seconds of one call, round by round
    calls: dict[str, int]  # name -> calls a round, over which the seconds are the mean

    def median(self, name: str) -> float:
        """Seconds of one call."""
        return self._of(name, lambda rounds: statistics.median(rounds))

    def ratio(self, name: str, baseline: str) -> Spread:
        """The time of `name` over that of `baseline`, round by round: below 1 is faster."""
        own, other = self._of(name, list), self._of(baseline, list)
        return Spread.of([a / b for a, b in zip(own, other)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every round."""
        return {
            name: {"median": self.median(name), "rounds": rounds, "calls": self.calls[name]}
            for name, rounds in self.seconds.items()
        }

    def _of(self, name: str, function: Callable[[list[float]], Any]) -> Any:
        if name not in self.seconds:
            raise UserError(f"nothing was timed as {name!r}{did_you_mean(name, self.seconds)}")
        return function(self.seconds[name])


def time_candidates(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    at_least: float = 0.0,
    settle: float = 0.03,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Times each candidate once a round, in their order, after `warmup` calls of each.

    A candidate returns the arrays that must be ready, or a function that waits for them (PyTorch's
    `torch.cuda.synchronize`). What takes less than `at_least` seconds is called so many times a
    round, waited for at the end: short times would measure the clock, and on an accelerator how
    long it takes to ask. Between candidates there is a pause of `settle` seconds: the threads of
    PyTorch's OpenMP go on spinning for some milliseconds, on the next candidate's account.

    Raises `UserError` for no candidate, or no round.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise UserError(
            f"expected a candidate, a round and no negative warm-up, got {len(candidates)} "
            f"candidates, {rounds} rounds and a warm-up of {warmup}"
        )

    def once(candidate: Callable[[], Any], calls: int) -> float:
        began = clock()
        for _ in range(calls):
            result = candidate()
        wait(result)
        return (clock() - began) / calls

    calls = {}
    for name, candidate in candidates.items():
        for _ in range(warmup):
            wait(candidate())
        calls[name] = 1
        if at_least:  # one call more tells how many fit
            calls[name] = max(1, math.ceil(at_least / max(once(candidate, 1), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            time.sleep(settle if len(candidates) > 1 else 0)
            seconds[name].append(once(candidate, calls[name]))
    return Comparison(seconds, calls)


def wait(result: Any) -> None:
    """Until the arrays are there; what is a function waits by itself."""
    if callable(result):
        result()
    else:
        jax.block_until_ready(result)


def geometric_mean(values: list[float]) -> float:
    """Of ratios: the mean to which 2 and 1/2 together are 1."""
    return statistics.geometric_mean(values)
