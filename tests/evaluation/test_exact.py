from __future__ import annotations

import itertools

import numpy as np
import pytest

from flax_cnns.errors import Interrupted
from flax_cnns.evaluation import exact


def test_sums_are_fetched_while_the_next_batch_is_computed_and_added_in_float64(monkeypatch):
    events = []

    def step(variables, batch, key):
        assert (variables, key) == ("variables", None)
        events.append(batch)
        return {"number": batch, "loss": np.float32(2.0**24), "count": np.float32(1)}

    def fetch(sums):
        if sums:
            events.append(-sums["number"])
        return dict(sums)

    monkeypatch.setattr(exact.jax, "device_get", fetch)
    total = exact.evaluate(step, "variables", [1, 2, 3])
    assert events == [1, 2, -1, 3, -2, -3]
    assert (total["loss"], total["count"]) == (3 * 2.0**24, 3)
    assert total["loss"].dtype == np.float64


def test_it_gives_up_between_two_batches(monkeypatch):
    seen = []

    def step(variables, batch, key):
        seen.append(batch)
        return {}

    with pytest.raises(Interrupted):
        exact.evaluate(step, None, itertools.count(), should_stop=lambda: len(seen) == 2)
    assert seen == [0, 1]
