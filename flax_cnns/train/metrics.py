"""Metrics as sums and counts, which are added over steps and devices and divided once, at the end.

A user's metric is a function (logits f32 [N K], labels f32 [N K], mask f32 [N]) that returns
(sum, count) or {"sum", "count"}. Both are numbers, or arrays [M] for a metric that is the mean of M
ratios; ratios with count 0 are left out of the mean. The two are stored as "metric/NAME/sum" and
"metric/NAME/count".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.train import checks
from flax_cnns.types import Array

Metric = Callable[[Array, Array, Array], Any]

# Name of a sum -> name of the metric that is this sum divided by the number of examples.
_PER_EXAMPLE = {
    "loss": "loss",
    "correct": "accuracy",
    "correct5": "top5",
    "correct_labels": "label_accuracy",
    "correct_subsets": "subset_accuracy",
}
_OWN = "metric/"

# The sums of a step, apart from the values of penalties and a user's metrics.
SUM_NAMES = frozenset({*_PER_EXAMPLE, "count", "bad", "norm", "rate", "steps", "confusion"})
# Names that a user's metric cannot have.
RESERVED_NAMES = frozenset(
    {
        *(*_PER_EXAMPLE.values(), "learning_rate", "bad_steps", "images_per_second", "norm/grads"),
        # other keys of summary.json and of an evaluation's file
        *("step", "examples", "split", "checkpoint", "classes", "confusion", "changed_data"),
        *("intervals", "protocol"),
    }
)


def sum_task_metrics(
    losses: Array,
    logits: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    task: str = "classes",
) -> dict[str, Array]:
    """Losses [N], logits [N K], labels i32 [N] or f32 [N K], mask f32 [N] -> sums by name.

    Every task has "loss" and "count". The task "classes" has "correct", and with more than five
    classes "correct5": how often the label is among the five highest logits. If labels are [N K],
    the label of an example is its largest entry. The task "multilabel" has "correct_labels", the
    fraction of an example's K labels that are predicted correctly (a logit above 0 predicts the
    label), and "correct_subsets": 1 if all K labels are predicted correctly.
    """
    if task == "classes" and labels.ndim > 1:
        labels = jnp.argmax(labels, -1)
    mask = jnp.ones_like(losses) if mask is None else mask
    # A masked row may hold anything, even NaN, and 0 * NaN is NaN.
    total = {"loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)), "count": jnp.sum(mask)}
    if task == "multilabel":
        right = (logits > 0) == (labels > 0.5)
        total["correct_labels"] = jnp.sum(mask * jnp.mean(right, axis=-1, dtype=jnp.float32))
        total["correct_subsets"] = jnp.sum(mask * jnp.all(right, axis=-1))
        return total
    total["correct"] = jnp.sum(mask * (jnp.argmax(logits, -1) == labels))
    if logits.shape[-1] > 5:
        # lax.top_k breaks ties toward the lower class, as argmax does.
        _, top = jax.lax.top_k(logits.astype(jnp.float32), 5)
        total["correct5"] = jnp.sum(mask * jnp.any(top == labels[:, None], axis=-1))
    return total


def sum_metrics(
    losses: Array,
    logits: Array,
    labels: Array,
    soft_labels: Array,
    mask: Array | None = None,
    *,
    task: str = "classes",
    own_metrics: Mapping[str, Metric] = {},
) -> dict[str, Array]:
    """Returns all sums over some examples: the task's, and those of the user's metrics.

    labels: i32 [N] or f32 [N K]; soft_labels: the same labels as f32 [N K].
    """
    labels = labels if task == "classes" else soft_labels
    total = sum_task_metrics(losses, logits, labels, mask, task=task)
    return total | sum_own_metrics(own_metrics, logits, soft_labels, mask)


def sum_own_metrics(
    own_metrics: Mapping[str, Metric], logits: Array, labels: Array, mask: Array | None = None
) -> dict[str, Array]:
    """Returns the sums of a user's metrics: logits [N K], labels f32 [N K], mask f32 [N].

    Masked rows are replaced by the first unmasked row, so that a NaN in them does no harm. A device
    with only masked rows adds 0. Raises `UserError` while tracing if a metric does not return a sum
    and a count.
    """
    if not own_metrics:
        return {}
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    counts: Any = True
    if mask is None:
        mask = jnp.ones(len(logits), jnp.float32)
    else:
        first, seen = jnp.argmax(mask > 0), mask[:, None] > 0
        logits = jnp.where(seen, logits, logits[first])
        labels = jnp.where(seen, labels, labels[first])
        counts = jnp.any(seen)
    total = {}
    for name, metric in own_metrics.items():
        with checks.explain_errors(f"metric {name!r}", "f32: logits [N K], labels [N K], mask [N]"):
            result = metric(logits, labels, mask)
        sum_and_count = _sum_and_count(name, result)
        _check_added(name, metric, sum_and_count[0], (logits, labels, mask))
        for key, value in zip(("sum", "count"), sum_and_count):
            total[f"{_OWN}{name}/{key}"] = jnp.where(counts, value, 0.0)
    return total


def _sum_and_count(name: str, result: Any) -> tuple[Array, Array]:
    """Returns the sum and the count in a metric's `result`, both f32, [] or [M]."""
    pair = result
    if isinstance(result, Mapping):
        pair = (result["sum"], result["count"]) if result.keys() == {"sum", "count"} else ()
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(checks.is_array, pair)):
        raise UserError(
            f"metric {name!r}: expected (sum, count) or a dict of 'sum', 'count', got"
            f" {checks.describe(result)}"
        )
    total, count = (jnp.asarray(value, jnp.float32) for value in pair)
    if total.ndim > 1 or count.shape not in ((), total.shape):
        raise UserError(
            f"metric {name!r}: expected a sum and a count of one shape, [] or [M], got"
            f" {checks.describe(result)}"
        )
    return total, jnp.broadcast_to(count, total.shape)


def _check_added(name: str, metric: Metric, total: Array, given: Sequence[Array]) -> None:
    """Raises `UserError` if a metric returns a value per example, not a sum over the examples."""
    if total.shape != given[-1].shape:
        return
    larger = [jax.ShapeDtypeStruct((len(x) + 1, *x.shape[1:]), x.dtype) for x in given]
    more, _ = jax.eval_shape(lambda *x: _sum_and_count(name, metric(*x)), *larger)
    if more.shape != total.shape:
        raise UserError(
            f"metric {name!r}: expected the sum and the count over the examples, got"
            f" {checks.describe(total)}, one number per example; return its .sum() and mask.sum()"
        )


def check_own_metrics(own_metrics: Mapping[str, Metric], taken: Iterable[str] = ()) -> None:
    """Checks the names and the arguments of a user's metrics.

    Raises `UserError` if a name is reserved or in `taken` (the penalties' names), or if a metric
    takes other arguments.
    """
    for name, metric in own_metrics.items():
        if name in RESERVED_NAMES or name in taken:
            raise UserError(
                f"metric {name!r}: the name is taken by"
                f" {'a built-in metric' if name in RESERVED_NAMES else 'a penalty'}; choose"
                " another, as in 'NAME=package.module:function'"
            )
        checks.check_arguments(f"metric {name!r}", metric, ("logits", "labels", "mask"))


def list_names(
    num_classes: int, *, task: str = "classes", own_metrics: Iterable[str] = ()
) -> list[str]:
    """Returns the names of the metrics that `compute` returns: the task's, then the user's."""
    built_in = ["loss", "accuracy", *(["top5"] if num_classes > 5 else [])]
    if task == "multilabel":
        built_in = ["loss", "label_accuracy", "subset_accuracy"]
    return [*built_in, *own_metrics]


def check_best_by(name: str, known: Iterable[str]) -> None:
    """Raises `UserError` unless a validation has the metric `name`; it has the metrics `known`."""
    known = list(known)
    if name not in known:
        raise UserError(
            f"train.best_by: a validation has no metric {name!r}{did_you_mean(name, known)}; set"
            f" validation/NAME, where NAME is one of {', '.join(known)}"
        )


def is_penalty(name: str) -> bool:
    """Whether the sum `name` of a step is the value of a penalty."""
    return name not in SUM_NAMES and not name.startswith(_OWN)


def add_sums(total: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Adds `more` to `total` in float64, so that many small numbers lose no precision.

    Returns Python floats; for arrays [M], lists of floats.
    """
    return {
        name: (
            np.asarray(total.get(name, 0.0), np.float64) + np.asarray(value, np.float64)
        ).tolist()
        for name, value in more.items()
    }


def compute(total: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Converts sums to metrics by name: the means over the examples, and a user's metrics.

    A metric is NaN if its count is 0.
    """
    count = float(total.get("count", 0.0))
    metrics = {
        prefix + name: float(total[key]) / count if count else float("nan")
        for key, name in _PER_EXAMPLE.items()
        if key in total
    }
    for key in total:
        if key.startswith(_OWN) and key.endswith("/count"):
            name = key.removesuffix("/count")
            ratios = _ratios(total[f"{name}/sum"], total[key])
            metrics[prefix + name.removeprefix(_OWN)] = (
                float(np.mean(ratios)) if ratios.size else float("nan")
            )
    return metrics


def _ratios(total: Any, count: Any) -> np.ndarray:
    """Returns the ratios whose count is not 0."""
    total, count = (np.ravel(np.asarray(value, np.float64)) for value in (total, count))
    return total[count != 0] / count[count != 0]
