"""Losses, one number an example, in float32 whatever the network computes in; and those of
auxiliary heads with their weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flax_cnns import tree as pytree
from flax_cnns.train import schedules
from flax_cnns.train.schedules import Schedule
from flax_cnns.types import Array, PyTree


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-sum_k labels_k log softmax(logits)_k: logits [N K], labels [N K] (rows sum to 1) -> [N]."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def aux_loss(
    aux_logits: PyTree, labels: Array, weights: list[tuple[str, Schedule]], step: Array
) -> Array:
    """The weighted sum of the mean losses of all heads sown into `aux_logits`, by head name."""
    # A head `aux1` sows its "logits", and sow keeps a tuple of all that is sown under a name.
    heads = {
        path.rpartition("/")[0].removesuffix("/logits"): logits
        for path, logits in pytree.flatten(aux_logits).items()
    }
    if not heads:
        return jnp.zeros(())
    chosen = pytree.match(weights, heads, what="train.aux_weight")
    return sum(
        chosen[name](step) * jnp.mean(cross_entropy(logits, labels))
        for name, logits in heads.items()
    )


def aux_weights(config: Any, steps_per_epoch: float) -> list[tuple[str, Schedule]]:
    """`config.aux_weight`, of the section `config.train`, as rules (regex of the head's name,
    schedule of the step). Raises `UserError` for a duration that is none."""

    def schedule(weight: Any) -> Schedule:
        if isinstance(weight, (int, float)):
            return schedules.constant(float(weight))
        what = "train.aux_weight"
        points = [(schedules.steps(at, steps_per_epoch, what=what), w) for at, w in weight]
        return schedules.corners(points)

    spec = tuple(config.aux_weight) or (0.0,)
    is_rule = not isinstance(spec[0], (int, float)) and isinstance(spec[0][0], str)
    if not is_rule:  # one weight for every head
        spec = ((".*", spec[0]),)
    return [(pattern, schedule(weight)) for pattern, weight in spec]
