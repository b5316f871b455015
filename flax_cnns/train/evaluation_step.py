"""The evaluation step, written as if there were one device.

It runs inside `parallel.parallelize`, which names the mapped axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from flax_cnns.errors import UserError
from flax_cnns.train import losses
from flax_cnns.train.metrics import Metric, check_own_metrics, sum_metrics
from flax_cnns.train.mirror import average_mirrored
from flax_cnns.types import Array, Batch, PyTree


def make_eval_step(
    apply_fn: Callable,
    *,
    normalize: Callable[[Array], Array],
    num_classes: int,
    loss: losses.Loss | None = None,
    metrics: Mapping[str, Metric] = {},
    task: str = "classes",
    confusion: bool = False,
    flip: bool = False,
    axis_name: str = "batch",
) -> Callable[[PyTree, Batch, Any], dict[str, Array]]:
    """Returns `step(variables, batch, key) -> sums` over the global batch; the key is not used.

    batch: {"image" u8 [n H W C], "label" i32 [n] or f32 [n K], "mask" f32 [n]}; rows with mask 0
    are not counted. `loss`, `metrics` and `task` are as in `StepConfig` (steps.py). `flip` averages
    the logits of each image and its mirror image. `confusion` adds the sum "confusion" f32 [K K]:
    rows are true classes, columns predicted ones.

    Raises `UserError` as `make_train_step` does, and for a confusion matrix of multilabel data.
    """
    check_own_metrics(metrics)
    loss = losses.select_loss(loss, task)
    apply = average_mirrored(apply_fn) if flip else apply_fn
    if confusion and task == "multilabel":
        raise UserError("a confusion matrix needs one class per example, not multilabel data")

    def eval_step(variables: PyTree, batch: Batch, key: Any = None):
        del key
        labels, mask = batch["label"], batch["mask"]
        logits = apply(variables, normalize(batch["image"]), train=False)
        soft = losses.soft_labels(labels, num_classes)
        losses.check_logits(logits, *soft.shape)
        each = loss(logits, soft)
        sums = sum_metrics(each, logits, labels, soft, mask, task=task, own_metrics=metrics)
        if confusion:
            labels = labels if labels.ndim == 1 else jnp.argmax(soft, -1)
            empty = jnp.zeros((num_classes, num_classes), jnp.float32)
            sums["confusion"] = empty.at[labels, jnp.argmax(logits, -1)].add(mask)
        return lax.psum(sums, axis_name)

    return eval_step
