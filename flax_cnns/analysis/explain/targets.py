"""Targets of saliency maps: one number per image, a function of its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_cnns.analysis import tracing
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree


@struct.dataclass
class Target:
    """The logit of `classes`, minus that of `against` if there is one, or `function(logits)`.

    `classes`, `against`: i32 [N]. `function`: logits f32 [N K] -> f32 [N]. With `of_probabilities`,
    probabilities are used instead of logits.
    """

    classes: Array | None = None
    against: Array | None = None
    function: Callable[[Array], Array] | None = struct.field(pytree_node=False, default=None)
    of_probabilities: bool = struct.field(pytree_node=False, default=False)

    def score(self, logits: Array) -> Array:
        """Returns the target's value f32 [N] for logits f32 [N K]."""
        if self.function is not None:
            return self.function(logits)
        if self.of_probabilities:
            logits = nn.softmax(logits)
        assert self.classes is not None  # `make_target` gives a function or classes
        score = _take_class(logits, self.classes)
        return score if self.against is None else score - _take_class(logits, self.against)


TargetLike = Target | Callable[[Array], Array] | int | Sequence[int] | np.ndarray | Array | None


def make_target(target: TargetLike, model: nn.Module, variables: PyTree, images: Array) -> Target:
    """Makes the target for images [N H W C].

    `target` is None (the logit of the predicted class), one class or N classes (their logits), a
    tuple of two of these (the difference of the two logits), or a function of the logits.
    Raises `UserError` for a class out of range, another number of classes than images, or a
    network without logits.
    """
    if isinstance(target, Target):
        return target
    if callable(target):
        return Target(function=target)
    shape = tracing.get_logits_shape(model, variables, images)
    if len(shape) != 2:
        raise UserError(f"expected logits [N K] of the network, got {list(shape)}")
    if target is None:
        return Target(_predict(model, variables, images))
    if isinstance(target, tuple) and len(target) == 2:
        classes, against = (_check_classes(given, shape) for given in target)
        return Target(classes, against)
    return Target(_check_classes(target, shape))


def _check_classes(given: int | Sequence[int] | np.ndarray | Array, shape: Sequence[int]) -> Array:
    count, classes = shape
    values = np.asarray(given)
    if not np.issubdtype(values.dtype, np.integer) or values.ndim > 1:
        raise UserError(f"expected a class or {count} of them, whole numbers, got {given!r}")
    if values.ndim and len(values) != count:
        raise UserError(f"expected a class for each of {count} images, got {len(values)}")
    if ((values < 0) | (values >= classes)).any():
        wrong = values[(values < 0) | (values >= classes)] if values.ndim else values
        raise UserError(
            f"class {int(np.ravel(wrong)[0])} is out of range: the network has {classes} classes,"
            f" 0 to {classes - 1}"
        )
    return jnp.broadcast_to(jnp.asarray(values, jnp.int32), (count,))


@tracing.jit()
def _predict(model: nn.Module, variables: PyTree, images: Array) -> Array:
    logits: Any = model.apply(variables, images, train=False)
    return jnp.argmax(logits, -1).astype(jnp.int32)


def _take_class(logits: Array, classes: Array) -> Array:
    return jnp.take_along_axis(logits, classes[:, None], 1)[:, 0]


@tracing.jit()
def compute_scores(model: nn.Module, variables: PyTree, images: Array, target: Target) -> Array:
    """Returns the target's value for images [N H W C]: f32 [N]."""
    logits: Any = model.apply(variables, images, train=False)
    return target.score(logits)
