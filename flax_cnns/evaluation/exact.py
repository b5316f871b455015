"""Exact evaluation: every example counted once, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from flax_cnns.errors import Interrupted
from flax_cnns.train import metrics
from flax_cnns.types import PyTree


def evaluate(
    eval_step: Callable[[PyTree, Any, Any], dict[str, Any]],
    variables: PyTree,
    batches: Iterable[Any],
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The sums of `eval_step(variables, batch, None)` over `batches`, in float64.

    They are fetched while the next batch is computed: added on the device, in float32, the losses
    of many batches would be rounded. Raises `Interrupted` when `should_stop()` says so between two
    batches.
    """
    total: dict[str, Any] = {}

    def add(sums: dict[str, Any]) -> None:
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)

    late: dict[str, Any] = {}
    for batch in batches:
        if should_stop():
            raise Interrupted
        sums = eval_step(variables, batch, None)
        add(late)
        late = sums
    add(late)
    return total


def summarize(total: dict[str, Any]) -> dict[str, float]:
    """Sums -> {"loss", "accuracy", "top5"} or those of multilabel data, and own metrics by name."""
    return metrics.compute(total)


def per_class_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Counts [K K], rows true -> "count", "recall" (accuracy in the class), "precision", each [K].

    NaN where nothing is of the class, or nothing was predicted to be.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, true, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"count": true, "recall": hits / true, "precision": hits / guessed}
