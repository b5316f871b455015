"""Several training steps in one call: a compiled loop over examples that stay on the devices.

One call costs Python and the runtime once, whatever the number of its steps. Small networks on an
accelerator gain most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from flax_cnns.errors import UserError
from flax_cnns.train import parallel
from flax_cnns.train.state import TrainState
from flax_cnns.types import Array, Batch


def list_axes(*, mirror: bool = False) -> dict[str, int | None]:
    """Returns the axis of each array of a call that is split over the devices; None: replicated.

    `mirror`: whether the batches say which images are mirrored.
    """
    return {"image": None, "label": None, "rows": 1} | ({"mirror": 1} if mirror else {})


def loop_steps(
    step: Callable, context: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Any]]:
    """Returns `call(state, batch, key) -> (state, sums)`, which takes K training steps in a loop.

    `step` is that of `steps.make_train_step`, and is traced in `context()`. batch: {"image"
    [N H W C] and "label" [N ...]: all training examples; "rows" i32 [K n]: the examples of each
    step on this device; "mirror" bool [K n], if images are mirrored by epochs}. The sums have a new
    first axis [K].
    """

    def call(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Any]:
        def take(state: TrainState, of_step: Batch) -> tuple[TrainState, Any]:
            rows = of_step.pop("rows")
            examples = {name: batch[name][rows] for name in ("image", "label")}
            with context():
                return step(state, examples | of_step, key)

        changing: Batch = {name: batch[name] for name in ("rows", "mirror") if name in batch}
        return lax.scan(take, state, changing)

    return call


def stack(batches: Iterable[Batch]) -> Batch:
    """Stacks the arrays of the batches of one call: {"rows": i32 [n]} -> {"rows": i32 [K n]}."""
    several = list(batches)
    return {name: np.stack([batch[name] for batch in several]) for name in several[0]}


def yield_calls(
    images: np.ndarray,
    labels: np.ndarray,
    rows: Iterable[Batch],
    mesh: Mesh,
    *,
    mode: str = "shard_map",
) -> Generator[Batch]:
    """Yields the batches of calls. The examples are put on each device once.

    rows: {"rows": i32 [K n]} for each call, n rows of this process for each of its K steps, and
    perhaps {"mirror": bool [K n]}.
    """
    examples = parallel.replicate({"image": images, "label": labels}, mesh)
    for call in rows:
        yield examples | parallel.shard_batch(call, mesh, mode, axis=1)


def check_periods(steps_per_call: int, periods: dict[str, int]) -> None:
    """Raises `UserError` unless each period, in steps by its field, is a multiple of the steps.

    The message names the nearest number of steps that divides all periods. Periods of 0 are never.
    """
    lengths = [period for period in periods.values() if period]
    bad = [f"{name} ({n} steps)" for name, n in periods.items() if n % steps_per_call]
    if not bad:
        return
    common = math.gcd(*lengths)
    divisors = [k for k in range(1, common + 1) if common % k == 0]
    nearest = min(divisors, key=lambda k: (abs(k - steps_per_call), k))
    raise UserError(
        f"train.steps_per_call={steps_per_call}: a run logs, validates and saves between two calls,"
        f" and {steps_per_call} does not divide {', '.join(bad)}; set"
        f" train.steps_per_call={nearest}, or these periods to multiples of {steps_per_call} steps"
    )


def split_sums(sums: dict[str, Any], n: int, steps_per_call: int) -> list[dict[str, Any]]:
    """Returns the sums of each of the n steps of a call, fetched to the host."""
    values = jax.device_get(sums)
    if steps_per_call == 1:
        return [values]
    return [{name: value[i] for name, value in values.items()} for i in range(n)]
