"""Metrics travel as sums and counts, are added over steps and devices, and divided once.

A user's own metric is a function (logits f32 [N K], labels f32 [N K], mask f32 [N]) -> (sum, count)
or {"sum", "count"}, of numbers, or of arrays [M] for M ratios whose mean it is (those that counted
nothing left out). Its sums are "metric/NAME/sum" and "metric/NAME/count".
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

# Sum -> the metric that it is divided by the number of examples.
_PER_EXAMPLE = {
    "loss": "loss",
    "correct": "accuracy",
    "correct5": "top5",
    "correct_labels": "label_accuracy",
    "correct_subsets": "subset_accuracy",
}
_OWN = "metric/"

# What a step's sums may hold besides the values of penalties and a user's own metrics.
SUM_NAMES = frozenset({*_PER_EXAMPLE, "count", "bad", "norm", "rate", "steps", "confusion"})
# Names of metrics that a user's own cannot have.
RESERVED_NAMES = frozenset(
    {
        *(*_PER_EXAMPLE.values(), "learning_rate", "bad_steps", "images_per_second", "norm/grads"),
        # what stands beside metrics in summary.json and in the file of an evaluation
        *("step", "examples", "split", "checkpoint", "classes", "confusion", "changed_data"),
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
    """losses [N], logits [N K], labels i32 [N] or f32 [N K], mask f32 [N] -> sums.

    "loss" and "count"; for classes "correct", and with more than five classes also "correct5": how
    often the label, the largest of a row [K], is among the five highest logits. For the task
    "multilabel" instead "correct_labels", the share of an example's K labels that are right where a
    logit above 0 says yes, and "correct_subsets": whether all of them are.
    """
    if task == "classes" and labels.ndim > 1:
        labels = jnp.argmax(labels, -1)
    mask = jnp.ones_like(losses) if mask is None else mask
    # A masked row may hold anything, a NaN too, and 0 * NaN is NaN.
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
    """All sums of some examples: labels i32 [N] or f32 [N K], and as f32 [N K] in any case."""
    labels = labels if task == "classes" else soft_labels
    total = sum_task_metrics(losses, logits, labels, mask, task=task)
    return total | sum_own_metrics(own_metrics, logits, soft_labels, mask)


def sum_own_metrics(
    own_metrics: Mapping[str, Metric], logits: Array, labels: Array, mask: Array | None = None
) -> dict[str, Array]:
    """The sums of a user's own metrics, by name: logits [N K], labels f32 [N K], mask f32 [N].

    Masked rows are copies of the first one that is not, so that a NaN there does no harm, and a
    device that has none but masked rows adds 0. Raises `UserError` while tracing for what is no sum
    and count.
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
            found = metric(logits, labels, mask)
        found = _sum_and_count(name, found)
        _check_added(name, metric, found[0], (logits, labels, mask))
        for what, value in zip(("sum", "count"), found):
            total[f"{_OWN}{name}/{what}"] = jnp.where(counts, value, 0.0)
    return total


def _sum_and_count(name: str, found: Any) -> tuple[Array, Array]:
    """Both f32, [] or [M]."""
    pair = found
    if isinstance(found, Mapping):
        pair = (found["sum"], found["count"]) if found.keys() == {"sum", "count"} else ()
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(checks.is_array, pair)):
        raise UserError(
            f"metric {name!r}: expected (sum, count) or a dict of 'sum', 'count', came"
            f" {checks.describe(found)}"
        )
    total, count = (jnp.asarray(value, jnp.float32) for value in pair)
    if total.ndim > 1 or count.shape not in ((), total.shape):
        raise UserError(
            f"metric {name!r}: expected a sum and a count of one shape, [] or [M], came"
            f" {checks.describe(found)}"
        )
    return total, jnp.broadcast_to(count, total.shape)


def _check_added(name: str, metric: Metric, total: Array, given: Sequence[Array]) -> None:
    """Raises `UserError` for numbers of single examples, which would be added over batches."""
    if total.shape != given[-1].shape:
        return
    larger = [jax.ShapeDtypeStruct((len(x) + 1, *x.shape[1:]), x.dtype) for x in given]
    more, _ = jax.eval_shape(lambda *x: _sum_and_count(name, metric(*x)), *larger)
    if more.shape != total.shape:
        raise UserError(
            f"metric {name!r}: expected the sum and the count over the examples, came"
            f" {checks.describe(total)}, a number an example; give its .sum() and mask.sum()"
        )


def check_own_metrics(own_metrics: Mapping[str, Metric], taken: Iterable[str] = ()) -> None:
    """Raises `UserError` for a metric whose name is taken, such as by a penalty (`taken`), and for
    a function that takes other arguments."""
    for name, metric in own_metrics.items():
        if name in RESERVED_NAMES or name in taken:
            raise UserError(
                f"metric {name!r}: the name is taken by"
                f" {'a built-in metric' if name in RESERVED_NAMES else 'a penalty'}; give it"
                " another, as in 'NAME=package.module:function'"
            )
        checks.check_arguments(f"metric {name!r}", metric, ("logits", "labels", "mask"))


def list_names(
    num_classes: int, *, task: str = "classes", own_metrics: Iterable[str] = ()
) -> list[str]:
    """What `compute` gives of an evaluation: those of the task, then a user's own."""
    built_in = ["loss", "accuracy", *(["top5"] if num_classes > 5 else [])]
    if task == "multilabel":
        built_in = ["loss", "label_accuracy", "subset_accuracy"]
    return [*built_in, *own_metrics]


def check_best_by(name: str, known: Iterable[str]) -> None:
    """Raises `UserError` if a validation gives no metric of this name."""
    known = list(known)
    if name not in known:
        raise UserError(
            f"train.best_by: a validation has no {name!r}{did_you_mean(name, known)}; take"
            f" validation/NAME, NAME one of {', '.join(known)}"
        )


def is_penalty(name: str) -> bool:
    """Whether a step's sum of this name is the value of a penalty."""
    return name not in SUM_NAMES and not name.startswith(_OWN)


def add_sums(total: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Sums of two parts, as Python floats (float64), so that many small ones lose nothing; of
    arrays [M] as lists."""
    return {
        name: (
            np.asarray(total.get(name, 0.0), np.float64) + np.asarray(value, np.float64)
        ).tolist()
        for name, value in more.items()
    }


def compute(total: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Sums -> {"loss", "accuracy", "top5"} per example, and a user's own metrics by name; NaN where
    nothing was counted."""
    count = float(total.get("count", 0.0))
    found = {
        prefix + name: float(total[key]) / count if count else float("nan")
        for key, name in _PER_EXAMPLE.items()
        if key in total
    }
    for key in total:
        if key.startswith(_OWN) and key.endswith("/count"):
            name = key.removesuffix("/count")
            ratios = _ratios(total[f"{name}/sum"], total[key])
            found[prefix + name.removeprefix(_OWN)] = (
                float(np.mean(ratios)) if ratios.size else float("nan")
            )
    return found


def _ratios(total: Any, count: Any) -> np.ndarray:
    """Of those that counted anything."""
    total, count = (np.ravel(np.asarray(value, np.float64)) for value in (total, count))
    return total[count != 0] / count[count != 0]
