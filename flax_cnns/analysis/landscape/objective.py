"""The loss of a network over fixed images, with its gradient and its Hessian times a vector.

    loss = Loss(model, [(images, labels)])
    loss(variables)

The network runs in evaluation: nothing is dropped. BatchNorm uses the running statistics of the
variables, or, with `Loss(..., batchnorm="batch")`, those of each batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis import tracing
from flax_cnns.analysis.batchnorm import use_statistics
from flax_cnns.errors import UserError
from flax_cnns.layers.conv import inside_control_flow
from flax_cnns.types import Array, PyTree

Variables = dict[str, PyTree]
EachFunction = Callable[[Array, Array], Array]  # logits f32 [N K], labels [N] or [N K] -> [N]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross-entropy of each image [N]; labels i32 [N], or f32 [N K] with sums of 1."""
    log_probabilities = nn.log_softmax(logits)
    if labels.ndim == 1:
        return -jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    return -jnp.sum(labels * log_probabilities, -1)


def is_top_class(logits: Array, labels: Array) -> Array:
    """Returns 1 for each image whose label has the largest logit, otherwise 0: [N]."""
    classes = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    return (jnp.argmax(logits, -1) == classes).astype(jnp.float32)


class Levels(NamedTuple):
    """Means over all images, at one or more points of the space of parameters."""

    losses: np.ndarray  # f32 [...]
    accuracies: np.ndarray  # f32 [...] in 0..1


@dataclasses.dataclass(frozen=True)
class Loss:
    """The mean loss of a network over batches of images [N H W C] and labels i32 [N] or f32 [N K].

    `each` gives the loss of each image, and `right` its accuracy from 0 to 1. Penalties of the
    parameters are not included.
    """

    model: nn.Module
    batches: Sequence[tuple[Array, Array]]
    batchnorm: Literal["running", "batch"] = "running"
    each: EachFunction = cross_entropy
    right: EachFunction = is_top_class

    def __call__(self, variables: Variables) -> float:
        """Returns the loss of `variables`."""
        return float(self.measure(variables).losses)

    def measure(self, variables: Variables) -> Levels:
        """Returns the loss and the accuracy of `variables`: f32 []."""
        return Levels(*np.asarray(self._average(_measure_sums, variables)))

    def measure_row(
        self, variables: Variables, directions: PyTree, xs: Array, y: float
    ) -> np.ndarray:
        """Returns f32 [2 len(xs)], losses and accuracies, at params + x * directions[0] + y *
        directions[1] for every x."""
        return np.asarray(self._average(_row_sums, variables, directions, jnp.asarray(xs), y)).T

    def gradient(self, variables: Variables) -> PyTree:
        """Returns the gradient by `variables["params"]`."""
        return self._average(_gradient_sum, variables)

    def hessian_times(self, variables: Variables, direction: PyTree) -> PyTree:
        """Returns the Hessian by the parameters, times `direction`, forward over reverse."""
        return self._average(_hessian_sum, variables, direction)

    @property
    def count(self) -> int:
        """The number of images."""
        return sum(len(labels) for _, labels in self.batches)

    def _average(self, function: Callable, *args: Any) -> Any:
        if not self.count:
            raise UserError("no images: the loss is a mean over at least one")
        how = self.model, self.batchnorm, self.each, self.right
        # One batch after the other: XLA's CPU backend once waited for ever with several under way.
        parts = (jax.block_until_ready(function(*how, *batch, *args)) for batch in self.batches)
        total = next(parts)
        for part in parts:
            total = jax.tree.map(jnp.add, total, part)
        return jax.tree.map(lambda leaf: leaf / self.count, total)


# ---- one batch

_jit = tracing.jit("batchnorm", "each", "right")


def _sums(model, batchnorm, each, right, images, labels, variables) -> Array:
    """The sums over a batch of the loss and of the right answers: f32 [2]."""
    if batchnorm == "batch":
        with use_statistics(batchnorm):
            logits, _ = model.apply(variables, images, train=False, mutable=["batch_stats"])
    else:
        logits = model.apply(variables, images, train=False)
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.stack([each(logits, labels).sum(), right(logits, labels).sum()])


@_jit
def _measure_sums(model, batchnorm, each, right, images, labels, variables):
    return _sums(model, batchnorm, each, right, images, labels, variables)


def _loss_of_params(model, batchnorm, each, right, images, labels, variables):
    def loss(params: PyTree) -> Array:
        moved = {**variables, "params": params}
        return _sums(model, batchnorm, each, right, images, labels, moved)[0]

    return loss


@_jit
def _gradient_sum(model, batchnorm, each, right, images, labels, variables):
    loss = _loss_of_params(model, batchnorm, each, right, images, labels, variables)
    return jax.grad(loss)(variables["params"])


@_jit
def _hessian_sum(model, batchnorm, each, right, images, labels, variables, direction):
    loss = _loss_of_params(model, batchnorm, each, right, images, labels, variables)
    return jax.jvp(jax.grad(loss), (variables["params"],), (direction,))[1]


@_jit
def _row_sums(model, batchnorm, each, right, images, labels, variables, directions, xs, y):
    first, second = directions

    def measure(x: Array) -> Array:
        with inside_control_flow():
            moved = jax.tree.map(
                lambda w, d, e: w + x * d + y * e, variables["params"], first, second
            )
            moved = {**variables, "params": moved}
            return _sums(model, batchnorm, each, right, images, labels, moved)

    return jax.lax.map(measure, xs)
