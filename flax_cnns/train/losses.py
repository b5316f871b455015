"""Losses of single examples, computed in float32, and the weighted losses of auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.train import checks, schedules
from flax_cnns.train.schedules import Schedule
from flax_cnns.types import Array, PyTree

TASKS = ("classes", "multilabel")

Loss = Callable[[Array, Array], Array]  # logits [N K], labels f32 [N K] -> [N]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-sum_k labels_k log softmax(logits)_k: logits [N K], labels [N K] (rows sum to 1) -> [N]."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def sigmoid_cross_entropy(logits: Array, labels: Array) -> Array:
    """-sum_k (labels_k log sigmoid(logits_k) + (1 - labels_k) log(1 - sigmoid(logits_k))).

    logits [N K], labels [N K] in 0..1 -> [N].

    The loss is summed over the labels, as in big_vision; PyTorch's BCEWithLogitsLoss takes the
    mean. The sum is the negative log-likelihood of an example, as in `cross_entropy`, and the
    gradient of a logit does not depend on the number of labels.
    """
    logits = logits.astype(jnp.float32)
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(labels * yes + (1.0 - labels) * no, axis=-1)


def select_loss(loss: Loss | None, task: str) -> Loss:
    """Returns the loss of a step: the user's `loss`, or the task's if `loss` is None.

    A user's loss is called with float32 arrays, and its result is checked while the step is traced.
    Raises `UserError` if the loss takes other arguments or the task is unknown.
    """
    if task not in TASKS:
        raise UserError(f"task: unknown {task!r}{did_you_mean(task, TASKS)}")
    if loss is None:
        return sigmoid_cross_entropy if task == "multilabel" else cross_entropy
    name = f"train.loss: {checks.name_of(loss)}"
    checks.check_arguments(name, loss, ("logits", "labels"))

    def checked(logits: Array, labels: Array) -> Array:
        with checks.explain_errors(name, "f32: logits [N K] and labels [N K], one row per example"):
            each = loss(logits.astype(jnp.float32), labels)
        if not checks.is_float_array(each, logits.shape[:1]):
            raise UserError(
                f"{name} returned {checks.describe(each)}, expected float32 [{len(logits)}]: one"
                " number per example (the step takes their mean)"
            )
        return jnp.asarray(each, jnp.float32)

    return checked


def check_logits(logits: Any, n: int, num_classes: int) -> None:
    """Raises `UserError` unless `logits` is a floating-point array [n num_classes]."""
    if not checks.is_float_array(logits, (n, num_classes)):
        raise UserError(
            f"the network returned {checks.describe(logits)}, expected logits float32"
            f" [{n} {num_classes}]: one row per image, one column per class"
        )


def soft_labels(labels: Array, num_classes: int) -> Array:
    """Labels i32 [n] or f32 [n k] -> f32 [n K], where K is `num_classes`.

    Classes that the data set lacks get 0. Raises `UserError` while tracing if k is larger than K.
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    missing = num_classes - labels.shape[-1]
    if missing < 0:
        raise UserError(
            f"labels have {labels.shape[-1]} columns, but the network has {num_classes} classes"
        )
    return jnp.pad(labels.astype(jnp.float32), ((0, 0), (0, missing)))


def aux_loss(
    aux_logits: PyTree,
    labels: Array,
    weights: Sequence[tuple[str, Schedule]],
    step: Array,
    loss: Loss = cross_entropy,
) -> Array:
    """Returns the weighted sum of the mean losses of all heads that are sown into `aux_logits`.

    `weights`: (regex of a head's name, its weight as a schedule); the first match decides.
    """
    # The path of the head `aux1` is "aux1/logits/0": `sow` collects values of one name in a tuple.
    heads = {
        path.rpartition("/")[0].removesuffix("/logits"): logits
        for path, logits in pytree.flatten(aux_logits).items()
    }
    if not heads:
        return jnp.zeros(())
    chosen = pytree.match(weights, heads, what="train.aux_weight")
    return sum(
        chosen[name](step) * jnp.mean(loss(logits, labels)) for name, logits in heads.items()
    )


def make_aux_weights(config: Any, steps_per_epoch: float) -> list[tuple[str, Schedule]]:
    """Returns `config.aux_weight` as rules (regex of the head's name, weight as a schedule).

    `config` is the section `config.train`. Raises `UserError` if a duration is invalid.
    """

    def schedule(weight: Any) -> Schedule:
        if isinstance(weight, (int, float)):
            return schedules.constant(float(weight))
        what = "train.aux_weight"
        points = [(schedules.parse_duration(at, steps_per_epoch, what=what), w) for at, w in weight]
        return schedules.piecewise_linear(points)

    spec = tuple(config.aux_weight) or (0.0,)
    is_rule = not isinstance(spec[0], (int, float)) and isinstance(spec[0][0], str)
    if not is_rule:  # one weight for every head
        spec = ((".*", spec[0]),)
    return [(pattern, schedule(weight)) for pattern, weight in spec]
