"""Learning rates as functions of the step, and durations such as "20 epochs"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Array

Schedule = Callable[[Array], Array]

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*")


def parse_duration(duration: str, steps_per_epoch: float, *, what: str = "duration") -> int:
    """ "20 epochs" or "500 steps" -> steps, rounded to the nearest; 0 only for "0 ...".

    Raises `UserError` if `duration` is not of this form.
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None:
        raise UserError(f"{what}: expected '20 epochs' or '500 steps', got {duration!r}")
    number, unit = match.groups()
    count = float(number) * (steps_per_epoch if unit == "epoch" else 1)
    return max(round(count), 1) if count else 0


def constant(rate: float) -> Schedule:
    """Returns the schedule that is `rate` at every step."""
    return lambda step: jnp.full((), rate, jnp.float32)


def piecewise_constant(rate: float, boundaries: list[int], factor: float) -> Schedule:
    """`rate`, multiplied by `factor` at each boundary; the boundary's step has the new rate."""
    edges = jnp.asarray(sorted(boundaries), jnp.int32)
    return lambda step: rate * jnp.float32(factor) ** jnp.sum(step >= edges)


def cosine(rate: float, total: int, end: float = 0.0) -> Schedule:
    """end + (rate - end) (1 + cos(pi t / T)) / 2: Loshchilov & Hutter 2016, eq. 5, no restarts."""

    def schedule(step: Array) -> Array:
        share = jnp.clip(step / max(total, 1), 0.0, 1.0)
        return end + (rate - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))

    return schedule


def exponential(rate: float, every: int, factor: float, end: float = 0.0) -> Schedule:
    """max(rate * factor^floor(step / every), end), as in the Inception and EfficientNet papers."""
    return lambda step: jnp.maximum(rate * jnp.float32(factor) ** (step // max(every, 1)), end)


def one_cycle(
    rate: float, total: int, pct_start: float, div_factor: float, final_div_factor: float
) -> Schedule:
    """Rises to `rate` and falls again, both as cosines: Smith & Topin 2017, with fast.ai's curves.

    Only the rate changes; momentum is constant. The final rate is reached at step `total`, one step
    after the run's last. PyTorch's OneCycleLR gives the same curve with `total_steps` = total + 1
    and `pct_start` = (pct_start * total + 1) / (total + 1).
    """
    first, last = rate / div_factor, rate / div_factor / final_div_factor
    peak = max(pct_start * total, 1e-6)

    def between(start: float, stop: float, share: Array) -> Array:
        return stop + (start - stop) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(share, 0.0, 1.0)))

    def schedule(step: Array) -> Array:
        down = between(rate, last, (step - peak) / max(total - peak, 1e-6))
        return jnp.where(step < peak, between(first, rate, step / peak), down)

    return schedule


def with_warmup(schedule: Schedule, warmup: int) -> Schedule:
    """Rises linearly over `warmup` steps to the first value of `schedule`, then follows `schedule`.

    The rate of the first step is 1 / warmup of that value, not 0: a step at rate 0 would be wasted.
    """
    if not warmup:
        return schedule
    first = schedule(jnp.zeros((), jnp.int32))

    def rising(step: Array) -> Array:
        return jnp.where(step < warmup, first * (step + 1) / warmup, schedule(step))

    return rising


def piecewise_linear(points: list[tuple[int, float]]) -> Schedule:
    """Interpolates linearly between (step, value) points; constant before and after them."""
    xs, ys = zip(*sorted(points))
    at, values = jnp.asarray(xs, jnp.float32), jnp.asarray(ys, jnp.float32)
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), at, values)


def make_schedule(config: Any, *, total_steps: int, steps_per_epoch: float) -> Schedule:
    """Makes the schedule that `config`, the section `config.schedule`, describes.

    The schedule of `plateau` is constant: its factor is in the optimizer's state, because it
    depends on the validation error. Raises `UserError` if the name or a duration is invalid.
    """

    def count(duration: str, field: str) -> int:
        return parse_duration(duration, steps_per_epoch, what=f"schedule.{field}")

    rate, warmup = config.learning_rate, count(config.warmup, "warmup")

    def shifted(schedule: Schedule) -> Schedule:  # runs from the end of the warm-up
        return lambda step: schedule(jnp.maximum(step - warmup, 0))

    remaining = max(total_steps - warmup, 1)
    match config.name:
        case "constant" | "plateau":
            schedule = constant(rate)
        case "steps":
            schedule = piecewise_constant(
                rate, [count(b, "boundaries") for b in config.boundaries], config.factor
            )
        case "cosine":
            schedule = shifted(cosine(rate, remaining, config.end))
        case "exponential":
            every = count(config.every, "every")
            schedule = shifted(exponential(rate, every, config.rate, config.end))
        case "one_cycle":
            if warmup:
                raise UserError("schedule.warmup: one_cycle has its own warm-up; set '0 steps'")
            schedule = one_cycle(
                rate, total_steps, config.pct_start, config.div_factor, config.final_div_factor
            )
        case other:
            names = ["constant", "steps", "cosine", "exponential", "one_cycle", "plateau"]
            raise UserError(f"schedule.name: unknown {other!r}{did_you_mean(other, names)}")
    return with_warmup(schedule, warmup)
