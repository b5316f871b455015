"""Targets of saliency maps: one number per image, a function of its logits or of a feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
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


@struct.dataclass
class Feature:
    """The activation of channel `unit` of the module `path`.

    `positions`: i32 [N 2], the row and the column for each image; None: the largest activation of
    the map. It is a target of gradients with respect to the images, not of class activation maps.
    Features that differ in `unit` or `positions` alone share a compiled program.
    """

    path: str = struct.field(pytree_node=False)
    unit: int | Array = 0
    positions: Array | np.ndarray | None = None

    def score(self, output: Array) -> Array:
        """Returns the activations f32 [N] for the module's output [N h w C] or [N C]."""
        channel = output[..., self.unit].astype(jnp.float32)
        if self.positions is None:
            return channel.reshape(len(channel), -1).max(1)
        rows, columns = jnp.asarray(self.positions).T
        return channel[jnp.arange(len(channel)), rows, columns]


TargetLike = Target | Callable[[Array], Array] | int | Sequence[int] | np.ndarray | Array | None

FeatureLike = Feature | TargetLike


def make_target(target: TargetLike, model: nn.Module, variables: PyTree, images: Array) -> Target:
    """Makes the target for images [N H W C].

    `target` is None (the logit of the predicted class), one class or N classes (their logits), a
    tuple of two of these (the difference of the two logits), or a function of the logits.
    Raises `UserError` for a class out of range, another number of classes than images, no images,
    or a network without logits.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, Feature):
        raise UserError(
            "expected a target made of logits; a Feature is a target of gradient, smooth_grad,"
            " integrated_gradients, guided_backprop and deconvnet"
        )
    if callable(target):
        return Target(function=target)
    shape = tracing.get_logits_shape(model, variables, images)
    if len(shape) != 2:
        raise UserError(f"expected logits [N K] of the network, got {list(shape)}")
    if not shape[0]:
        raise UserError("no images: expected at least one to explain")
    if target is None:
        return Target(_predict(model, variables, images))
    if isinstance(target, tuple) and len(target) == 2:
        classes, against = (_check_classes(given, shape) for given in target)
        return Target(classes, against)
    return Target(_check_classes(target, shape))


def make_feature_or_target(
    target: FeatureLike, model: nn.Module, variables: PyTree, images: Array
) -> Feature | Target:
    """Makes the target for images [N H W C], as `make_target` does, or checks a `Feature`.

    Raises `UserError` as `make_target` does, and for a `Feature` with an unknown path, unit or
    position.
    """
    if not isinstance(target, Feature):
        return make_target(target, model, variables, images)
    outputs = tap.list_outputs(model, variables, images)
    tap.check_path(target.path, outputs)
    shape = outputs[target.path].shape
    check_unit(target.path, int(target.unit), shape)
    if target.positions is None:
        return Feature(target.path, jnp.asarray(target.unit, jnp.int32))
    positions = np.asarray(target.positions)
    if len(shape) != 4 or positions.shape != (shape[0], 2):
        raise UserError(
            f"positions: expected [{shape[0]} 2] in maps [N H W C], got {list(positions.shape)} in"
            f" the output {list(shape)} of {target.path!r}"
        )
    if ((positions < 0) | (positions >= shape[1:3])).any():
        raise UserError(f"positions: expected rows and columns in maps of {shape[1]}x{shape[2]}")
    return Feature(
        target.path, jnp.asarray(target.unit, jnp.int32), jnp.asarray(positions, jnp.int32)
    )


def check_unit(path: str, unit: int, shape: Sequence[int]) -> None:
    """Raises `UserError` if the output of the module `path`, of shape [N ... C], lacks the unit."""
    if not 0 <= unit < shape[-1]:
        raise UserError(
            f"unit {unit} is out of range: {path or 'the network'} has {shape[-1]} units, 0 to"
            f" {shape[-1] - 1}"
        )


def trace_output(
    model: nn.Module,
    variables: PyTree,
    images: Array,
    target: Feature | Target,
    *,
    capture: bool = False,
) -> Array:
    """Returns what `target.score` takes: the logits, or the output of the feature's module.

    With `capture`, or for a feature, the network must be unrolled (see `features.unroll`).
    """
    if isinstance(target, Feature):
        place = target.path.partition("[")[0]
        return tap.capture(model, variables, images, {place})[target.path]
    more: dict[str, Any] = {"mutable": ["intermediates"]} if capture else {}
    logits: Any = model.apply(variables, images, train=False, **more)
    return logits[0] if capture else logits


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
