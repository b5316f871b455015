from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from flax_cnns.errors import UserError
from flax_cnns.train import schedules


def values(schedule, steps):
    return np.array([float(schedule(jnp.int32(s))) for s in steps])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20 epochs", 250), ("1 epoch", 12), ("500 steps", 500), ("0.5 epochs", 6), ("1 step", 1)],
)
def test_durations(text, expected):
    assert schedules.parse_duration(text, 12.5) == expected


@pytest.mark.parametrize("text", ["20", "epochs", "-3 steps", 7, "3 weeks"])
def test_durations_that_say_nothing(text):
    with pytest.raises(UserError, match="expected '20 epochs' or '500 steps'"):
        schedules.parse_duration(text, 12.5, what="log.every")


def make(total=100, **fields):
    config = get_config().schedule
    config.learning_rate = 0.4
    config.update(fields)
    return schedules.make_schedule(config, total_steps=total, steps_per_epoch=10.0)


def test_steps_divide_at_the_boundary():
    rate = make(name="steps", boundaries=("3 epochs", "60 steps"))
    found = values(rate, [0, 29, 30, 59, 60, 99])
    np.testing.assert_allclose(found, [0.4, 0.4, 0.04, 0.04, 0.004, 0.004], rtol=1e-6)


def test_cosine_is_the_closed_form_after_the_warmup():
    rate = make(name="cosine", warmup="1 epochs", end=0.1)
    np.testing.assert_allclose(values(rate, range(10)), 0.4 * np.arange(1, 11) / 10, rtol=1e-6)
    expected = [0.1 + 0.3 * (1 + math.cos(math.pi * t / 90)) / 2 for t in (0, 45, 90)]
    np.testing.assert_allclose(values(rate, [10, 55, 100]), expected, rtol=1e-6)


def test_exponential_falls_by_the_rate_every_so_often():
    rate = make(name="exponential", every="20 steps", rate=0.5, end=0.06)
    np.testing.assert_allclose(
        values(rate, [0, 19, 20, 40, 99]), [0.4, 0.4, 0.2, 0.1, 0.06], rtol=1e-6
    )


def test_one_cycle_rises_to_the_rate_and_ends_far_below():
    rate = make(name="one_cycle", pct_start=0.3, div_factor=10.0, final_div_factor=100.0)
    np.testing.assert_allclose(values(rate, [0, 30, 100]), [0.04, 0.4, 0.0004], rtol=1e-5)
    assert np.all(np.diff(values(rate, range(31))) > 0)
    assert np.all(np.diff(values(rate, range(30, 101))) < 0)


def test_corners_are_joined_by_lines():
    weight = schedules.piecewise_linear([(0, 1.0), (100, 0.0)])
    np.testing.assert_allclose(values(weight, [0, 25, 100, 500]), [1, 0.75, 0, 0], atol=1e-6)


@pytest.mark.oracle
def test_one_cycle_is_torchs_of_one_step_more_and_another_share():
    torch = pytest.importorskip("torch")
    total, share = 20, 0.3
    ours = schedules.one_cycle(1.0, total, share, 25.0, 1e4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total + 1, pct_start=(share * total + 1) / (total + 1)
    )
    for step in range(total + 1):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-7)
        optimizer.step()
        if step < total:
            theirs.step()


def test_one_cycle_refuses_a_second_warmup():
    with pytest.raises(UserError, match="has its own warm-up"):
        make(name="one_cycle", warmup="5 steps")
