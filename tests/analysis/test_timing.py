"""Timing, with a fake clock."""

from __future__ import annotations

import pytest

from flax_cnns.analysis.timing import Spread, time_candidates
from flax_cnns.errors import UserError


class Fake:
    """Functions with given durations, and a clock that advances by them."""

    def __init__(self):
        self.now, self.log, self.waited = 0.0, [], 0

    def function(self, name, *seconds):
        times = iter(seconds)

        def call():
            self.log.append(name)
            self.now += next(times)
            return self.wait

        return call

    def wait(self):
        self.waited += 1


def test_candidates_run_in_turn_and_the_warm_up_counts_for_nothing():
    fake = Fake()
    found = time_candidates(
        {"a": fake.function("a", 99, 1, 2, 6), "b": fake.function("b", 99, 2, 2, 2)},
        rounds=3,
        clock=lambda: fake.now,
    )
    assert "".join(fake.log) == "ab" + "ababab"
    assert fake.waited == 8
    assert found.seconds == {"a": [1, 2, 6], "b": [2, 2, 2]}
    assert found.median("a") == 2
    assert found.as_dict()["b"] == {"median": 2, "rounds": [2, 2, 2], "calls": 1}


def test_ratios_are_taken_round_by_round():
    fake = Fake()
    found = time_candidates(
        # Both are ten times slower in the second round, which does not change the ratio.
        {"a": fake.function("a", 2, 20, 3), "b": fake.function("b", 1, 10, 1)},
        rounds=3,
        warmup=0,
        clock=lambda: fake.now,
    )
    assert found.ratio("a", "b") == Spread(median=2, low=2, high=3)
    assert str(found.ratio("b", "b")) == "1.00 (1.00 to 1.00)"


def test_what_is_short_is_called_often_and_waited_for_once_a_round():
    fake = Fake()
    short, long = fake.function("s", *[0.01] * 100), fake.function("l", *[0.5] * 100)
    found = time_candidates(
        {"short": short, "long": long}, rounds=2, at_least=0.1, clock=lambda: fake.now
    )
    assert found.calls == {"short": 10, "long": 1}
    # A warm-up call, a call to estimate the time, two rounds.
    assert fake.log.count("s") == 1 + 1 + 2 * 10
    assert found.median("short") == pytest.approx(0.01)
    assert found.median("long") == pytest.approx(0.5)
    assert fake.waited == 2 * (1 + 1 + 2)


def test_it_waits_for_arrays():
    class Array:  # jax.block_until_ready calls this method of any object
        ready = False

        def block_until_ready(self):
            self.ready = True
            return self

    arrays = [Array(), Array()]
    time_candidates({"a": lambda: {"x": arrays}}, rounds=1, warmup=0)
    assert all(array.ready for array in arrays)


def test_mistakes():
    with pytest.raises(UserError, match="0 candidates"):
        time_candidates({})
    with pytest.raises(UserError, match="0 rounds"):
        time_candidates({"a": lambda: None}, rounds=0)
    found = time_candidates({"ours": lambda: None}, rounds=1)
    with pytest.raises(UserError, match="did you mean 'ours'"):
        found.median("our")
