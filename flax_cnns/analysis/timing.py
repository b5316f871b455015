"""Times functions against each other: in turn (A B A B), with medians and ratios per round.

If the machine is slow for a minute, all candidates in that minute are slow. Therefore the ratio is
taken within each round, not between averages over all rounds.
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
    """The median and the range of some values."""

    median: float
    low: float  # smallest value
    high: float  # largest value

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Comparison(NamedTuple):
    """The times of several candidates."""

    seconds: dict[str, list[float]]  # name -> seconds of one call in each round
    calls: dict[str, int]  # name -> calls per round; the seconds are their mean

    def median(self, name: str) -> float:
        """Returns the median seconds of one call."""
        return self._of(name, lambda rounds: statistics.median(rounds))

    def ratio(self, name: str, baseline: str) -> Spread:
        """Returns the time of `name` divided by the time of `baseline`, over the rounds.

        A ratio below 1 means that `name` is faster.
        """
        times, others = self._of(name, list), self._of(baseline, list)
        return Spread.of([a / b for a, b in zip(times, others)])

    def as_dict(self) -> dict[str, Any]:
        """Returns all rounds, for JSON."""
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
    """Times each candidate once per round, in their order, after `warmup` calls of each.

    A candidate returns the arrays to wait for, or a function that waits (PyTorch's
    `torch.cuda.synchronize`). A candidate that takes less than `at_least` seconds is called several
    times per round, with one wait at the end. The time of a single short call would be mostly that
    of the clock and, on an accelerator, of the dispatch.

    Between candidates there is a pause of `settle` seconds, because the threads of PyTorch's OpenMP
    keep spinning for some milliseconds, which would slow down the next candidate.

    Raises `UserError` if there is no candidate or no round, or if `warmup` is negative.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise UserError(
            f"expected at least one candidate, at least one round and a warm-up of 0 or more; got "
            f"{len(candidates)} candidates, {rounds} rounds and a warm-up of {warmup}"
        )

    def time_once(candidate: Callable[[], Any], calls: int) -> float:
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
        if at_least:  # one more call shows how many calls are needed
            calls[name] = max(1, math.ceil(at_least / max(time_once(candidate, 1), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            time.sleep(settle if len(candidates) > 1 else 0)
            seconds[name].append(time_once(candidate, calls[name]))
    return Comparison(seconds, calls)


def wait(result: Any) -> None:
    """Waits until the arrays in `result` are ready; if `result` is a function, calls it instead."""
    if callable(result):
        result()
    else:
        jax.block_until_ready(result)


def geometric_mean(values: list[float]) -> float:
    """Returns the geometric mean, the right mean for ratios: the mean of 2 and 1/2 is 1."""
    return statistics.geometric_mean(values)
