"""Which statistics BatchNorm uses while all else of a network is in evaluation."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import flax.linen as nn

# "running": the running statistics of the variables, as in evaluation. "batch": those of the batch,
# as in training. At initialization the running statistics are 0 and 1, so that with "running" a
# BatchNorm does nothing.
BatchNormMode = Literal["running", "batch"]


def use_statistics(batchnorm: BatchNormMode) -> AbstractContextManager:
    """Returns a context in which every BatchNorm uses these statistics.

    With "batch", the network must be applied with `mutable=["batch_stats", ...]`. The statistics
    are those of this program's batch alone: an `axis_name` has no effect.
    """
    if batchnorm == "running":
        return contextlib.nullcontext()
    return nn.intercept_methods(_normalize_by_batch)


def _normalize_by_batch(
    function: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    layer = context.module
    if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
        return function(*args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != "use_running_average"}
    # A clone would be a second call, whose output would be captured too.
    wanted = {"use_running_average": False, "axis_name": None}
    before = {name: getattr(layer, name) for name in wanted}
    try:
        for name, value in wanted.items():
            object.__setattr__(layer, name, value)
        return function(*args[:1], **kwargs)
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)
