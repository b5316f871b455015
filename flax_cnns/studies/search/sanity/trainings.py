"""Short trainings: overfitting a few images, the learning-rate range test, and several widths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from flax_cnns import config as configs
from flax_cnns.analysis.cost import cost
from flax_cnns.errors import UserError
from flax_cnns.runs.build import RunComponents
from flax_cnns.runs.network import make_model
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.start import make_initial_variables
from flax_cnns.studies.search.sanity.bench import (
    HostBatch,
    Meter,
    SanityBench,
    Trainer,
    drop_axis,
)
from flax_cnns.studies.search.sanity.initial import compare_weights

Tick = Callable[[int, int], None]  # (steps done, steps in all): shows the progress

# ---------------------------------------------------------------------------- overfitting

FEW = 20  # images, as in the lectures
FACTORS = (1.0, 0.1, 0.01, 10.0)  # of the config's rate, tried in this order
MAX_STEPS = 150  # with each rate
SETTLED = 3  # steps in a row with all images right
EXPLODED = 20  # times the first loss
PATIENCE = 60  # steps without a loss that is lower by a hundredth


def measure_overfit(
    bench: SanityBench, train: HostBatch, tick: Tick = lambda done, total: None
) -> dict[str, Any]:
    """Returns the numbers of the check `overfit`: for each rate tried, the losses, the best
    accuracy, and the step from which on all images were right (None: never).

    `moved` has {layer: change of its kernel relative to it} of the last attempt.
    """
    count = -(-FEW // bench.devices) * bench.devices
    rows = np.arange(count) % len(train["label"])
    few = {name: x[rows] for name, x in train.items()}
    trainer = Trainer(bench.components, bench.variables, quiet=True)
    batch = trainer.components.shard(few)
    numbers: dict[str, Any] = {"images": count, "attempts": []}
    for factor in FACTORS:
        rate = bench.config.schedule.learning_rate * factor
        state, losses, accuracies, right = trainer.start(), [], [], 0
        for number in range(MAX_STEPS):
            tick(number, MAX_STEPS)
            state, found = trainer.step(state, batch, rate)
            losses.append(found["loss"])
            accuracies.append(found["accuracy"])
            right = right + 1 if found["accuracy"] == 1 else 0
            exploded = not losses[-1] < EXPLODED * max(losses[0], 0.1) or not math.isfinite(
                losses[0]
            )
            stuck = number >= PATIENCE and not min(losses[-PATIENCE:]) < 0.99 * min(
                losses[:-PATIENCE]
            )
            if right == SETTLED or exploded or stuck:
                break
        reached = len(losses) - SETTLED + 1 if right == SETTLED else None
        numbers["attempts"].append(
            {"rate": rate, "steps": reached, "best": max(accuracies), "losses": losses}
        )
        if reached:
            break
    numbers["moved"] = compare_weights(bench.variables, jax.device_get(state.params))
    return numbers


# ---------------------------------------------------------------------------- the range test

LOWEST, HIGHEST = 1e-6, 10.0  # rates, unless the config's own is near or beyond one of them
STEPS = 100
STOP = 4.0  # times the lowest loss, as in fast.ai


def measure_rates(
    bench: SanityBench,
    trainer: Trainer,
    steps: int = STEPS,
    tick: Tick = lambda done, total: None,
) -> dict[str, Any]:
    """Returns the numbers of the check `rate`: the rates of an exponentially growing learning rate
    (Smith 2017, https://arxiv.org/abs/1506.01186, section 3.3) and the loss of each step's batch.

    The test ends early if the smoothed loss exceeds `STOP` times its lowest value and the loss of
    the first steps.
    """
    own = bench.config.schedule.learning_rate
    low, high = min(LOWEST, own / 100), max(HIGHEST, 10 * own)
    rates = np.geomspace(low, high, steps)
    used: list[float] = []
    losses: list[float] = []
    state = trainer.start()
    with trainer.batches() as stream:
        for rate, batch in zip(rates, stream):
            tick(len(losses), steps)
            state, found = trainer.step(state, batch, float(rate))
            used.append(float(rate))
            losses.append(found["loss"])
            recent = np.mean(losses[-3:])
            lowest = min(smooth(losses)) if len(losses) > 5 else math.inf
            if not math.isfinite(recent) or recent > max(STOP * lowest, 1.5 * losses[0]):
                break
    return {"own": own, "steps": steps, "rates": used, "losses": losses}


def smooth(losses: Sequence[float], width: float = 2.0) -> np.ndarray:
    """Returns the losses averaged with a normal window, whose standard deviation is `width` steps.

    Values that are not finite count as ten times the highest finite one.
    """
    values = np.asarray(losses, np.float64)
    finite = values[np.isfinite(values)]
    ceiling = 10 * finite.max() if finite.size else 1e30
    values = np.where(np.isfinite(values), values, ceiling)
    at = np.arange(len(values))
    weights = np.exp(-0.5 * ((at[:, None] - at) / width) ** 2)
    return weights @ values / weights.sum(1)


# ---------------------------------------------------------------------------- widths

WIDTHS = (0.5, 1.0, 2.0)
MACS = 5e11  # of all forward passes of the trainings together, unless `steps` is given
LEAST_STEPS, MOST_STEPS = 40, 300
WARMUP = 0.1  # share of a short training
_FIELDS = ("width_mult", "widths", "width")


def measure_capacity(
    bench: SanityBench,
    trainer: Trainer,
    meter: Meter,
    train: HostBatch,
    validation: HostBatch | None,
    steps: int = 0,
    highest: float = math.inf,
    tick: Tick = lambda done, total: None,
) -> dict[str, Any]:
    """Returns the numbers of the check `capacity`: loss and accuracy on training and validation
    examples after equally long trainings of the network at each width.

    The rate rises linearly to the config's, or to `highest` if that is lower, and then falls to 0
    as a cosine. If `highest` is lower, the network also trains at the config's own rate (`trial`).
    `steps`: of each training; 0 takes what fits into `MACS`. A network without a field for its
    width trains once.
    """
    widths, macs, steps = plan_capacity(bench, steps)
    own = bench.config.schedule.learning_rate
    numbers: dict[str, Any] = {
        "field": find_width_field(bench.components),
        "grafted": bool(bench.config.graft.source),
        "steps": steps,
        "epochs": steps / bench.plan.steps_per_epoch,
        "rate": min(own, highest),
        "widths": [],
        "trial": None,
    }
    for (width, components), each in zip(widths, macs):
        used = trainer, meter
        before = steps * len(numbers["widths"])

        def show(done: int, total: int, before: int = before) -> None:
            tick(before + done, total * (len(widths) + (highest < own)))

        if width != 1:
            plan = RunPlan(components)
            variables = jax.device_get(components.stack_if_scanned(make_initial_variables(plan)[0]))
            used = (
                Trainer(components, variables),
                Meter(components, bench.optimizer.batchnorm_modes, meter.size),
            )
        state, losses = train_shortly(used[0], steps, numbers["rate"], show)
        row = {"width": width, "macs": each, "losses": losses}
        row["params"] = int(sum(np.size(x) for x in jax.tree.leaves(used[0].variables["params"])))
        variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        row["train"] = used[1].measure(variables, train)
        if validation is not None:
            row["validation"] = used[1].measure(variables, validation)
        numbers["widths"].append(row)
    if highest < own:
        state, losses = train_shortly(trainer, steps, own)
        variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        measured = meter.measure(variables, train)
        numbers["trial"] = {"rate": own, "losses": losses, "train": measured}
    return numbers


def plan_capacity(
    bench: SanityBench, steps: int = 0
) -> tuple[list[tuple[float, RunComponents]], list[int], int]:
    """Returns (the widths, the MACs of an image at each, the steps of each training)."""
    widths = list(make_widths(bench))
    shape = (1, *bench.dataset.image_shape)
    macs = [cost(drop_axis(each.model), shape).macs for _, each in widths]
    budget = round(MACS / max(sum(macs) * bench.config.data.batch_size, 1))
    most = min(MOST_STEPS, bench.plan.total_steps)
    return widths, macs, steps or min(max(budget, LEAST_STEPS), most)


def train_shortly(
    trainer: Trainer, steps: int, rate: float, tick: Tick = lambda done, total: None
) -> tuple[Any, list[float]]:
    """Returns the state after a short training at the rates of `list_rates`, and its losses."""
    losses: list[float] = []
    state = trainer.start()
    with trainer.batches() as stream:
        for now, batch in zip(list_rates(steps, rate), stream):
            tick(len(losses), steps)
            state, found = trainer.step(state, batch, now)
            losses.append(found["loss"])
    return state, losses


def list_rates(steps: int, rate: float) -> list[float]:
    """Returns the rate of each step: a linear rise over `WARMUP` of the steps, then a cosine."""
    warmup = max(round(WARMUP * steps), 1)
    rest = max(steps - warmup, 1)
    rise = [rate * (i + 1) / warmup for i in range(min(warmup, steps))]
    return rise + [rate * 0.5 * (1 + math.cos(math.pi * i / rest)) for i in range(steps - warmup)]


def find_width_field(components: RunComponents) -> str | None:
    """Returns the field that sets the network's width, or None if it has none."""
    model = components.model
    names = {field.name for field in dataclasses.fields(model)}
    return next((f for f in _FIELDS if f in names and getattr(model, f)), None)


def make_widths(bench: SanityBench) -> Iterator[tuple[float, RunComponents]]:
    """Yields (factor, components) of the network at each width, narrow to wide; widths that the
    network does not take are left out."""
    components = bench.components
    field = find_width_field(components)
    for width in WIDTHS:
        if width == 1:
            yield 1.0, components
        elif field is not None and not bench.config.graft.source:  # weights fit one width
            config = configs.complete(bench.config)
            value = scale_width(getattr(components.model, field), width)
            configs.set_config_field(config, f"model.{field}", value)
            try:
                model = make_model(config, bench.dataset, components.own_parts.network)
                jax.eval_shape(components._replace(model=model, config=config).init_variables)
            except (UserError, ValueError, TypeError):
                continue
            if model != components.model:
                yield width, components._replace(model=model, config=config)


def scale_width(value: Any, factor: float) -> Any:
    """Multiplies a width, or each of several widths; whole numbers stay whole and above 0."""
    if isinstance(value, tuple | list):
        return tuple(scale_width(each, factor) for each in value)
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor
