"""Exact evaluation: every example counts once, on any number of devices."""

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
    """Returns the sums of `eval_step(variables, batch, None)` over `batches`, in float64.

    The sums of a batch are fetched while the next batch is computed. They are not added on the
    device, because float32 would round the losses of many batches. Raises `Interrupted` if
    `should_stop()` returns True between two batches.
    """
    total: dict[str, Any] = {}

    def add_to_total(sums: dict[str, Any]) -> None:
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)

    pending: dict[str, Any] = {}
    for batch in batches:
        if should_stop():
            raise Interrupted
        sums = eval_step(variables, batch, None)
        add_to_total(pending)
        pending = sums
    add_to_total(pending)
    return total


def summarize(total: dict[str, Any]) -> dict[str, float]:
    """Converts sums to metrics by name: the task's ("loss", "accuracy" and "top5", or the metrics
    of multilabel data) and the user's."""
    return metrics.compute(total)


def per_class_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {"count", "recall", "precision"}, each [K], of a confusion matrix [K K].

    The rows of the matrix are true classes. The recall of a class is NaN if the class has no
    examples; its precision is NaN if it was never predicted.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"count": true, "recall": hits / true, "precision": hits / predicted}
