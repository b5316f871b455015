"""Feature visualization: images that make an objective large, by gradient ascent."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.visualize import parameters as images_of
from flax_cnns.analysis.visualize.objectives import Objective, diversity
from flax_cnns.analysis.visualize.transforms import transform
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree


class Visualization(NamedTuple):
    images: np.ndarray  # f32 [N H W C] in 0..1
    scores: np.ndarray  # f32 [N]: the objective of these images
    losses: np.ndarray  # f32 [steps]: what was made small, after random transformations


def visualize(
    model: nn.Module,
    variables: Variables,
    objective: Objective,
    *,
    key: Array,
    normalize: Callable[[Array], Array],
    size: tuple[int, int] | None = None,
    channels: int = 3,
    count: int = 1,
    steps: int = 512,
    learning_rate: float = 0.05,
    kind: images_of.Kind = "fourier",
    robust: bool = True,
    diverse: float = 0.0,
) -> Visualization:
    """Returns images that make the objective large (Olah, Mordvintsev & Schubert 2017,
    https://distill.pub/2017/feature-visualization), by Adam.

    `normalize` turns images in 0..1 into what the network takes. `size` is that of the images, by
    default the network's `input_size`. `robust` moves, scales and rotates them anew in each step.
    `diverse` is the weight of the similarity of the `count` images, which is made small. Equal keys
    give equal images. Raises `UserError` for an unknown module or unit, and for steps below 1.
    """
    if steps < 1 or count < 1:
        raise UserError(f"expected steps and count of at least 1, got {steps} and {count}")
    model, variables = tap.unroll(model, variables)
    if size is None:
        if not hasattr(model, "input_size"):
            raise UserError(f"{type(model).__name__} has no input_size: give the images' size")
        size, channels = tuple(model.input_size[:2]), model.input_size[2]
    shape = jax.ShapeDtypeStruct((count, *size, channels), jnp.float32)
    outputs = tap.list_outputs(model, variables, shape)
    tap.check_path(objective.path, outputs)
    objective.check(outputs[objective.path])
    objective = dataclasses.replace(objective, vector=jnp.asarray(objective.vector, jnp.float32))

    params = images_of.draw_parameters(key, count, size, channels, kind)
    tx = _make_optimizer(learning_rate)
    settings = (size, kind, normalize)
    state, losses = tx.init(params), []
    for step in range(steps):
        step_key = jax.random.fold_in(key, step)
        params, state, loss = _step(
            model, variables, objective, params, state, step_key, settings, tx, robust, diverse
        )
        losses.append(loss)
    images, scores = _finish(model, variables, objective, params, settings)
    return Visualization(np.asarray(images), np.asarray(scores), np.asarray(losses))


@functools.cache
def _make_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Returns one object for equal rates, so that `_step` is compiled once."""
    return optax.adam(learning_rate)


Settings = tuple[tuple[int, int], images_of.Kind, Callable[[Array], Array]]


def _output(
    model: nn.Module,
    variables: Variables,
    images: Array,
    path: str,
    normalize: Callable[[Array], Array],
) -> Array:
    return tap.capture(model, variables, normalize(images), {path.partition("[")[0]})[path]


@tracing.jit("settings", "tx", "robust", "diverse")
def _step(
    model: nn.Module,
    variables: Variables,
    objective: Objective,
    params: Array,
    state: PyTree,
    key: Array,
    settings: Settings,
    tx: optax.GradientTransformation,
    robust: bool,
    diverse: float,
) -> tuple[Array, PyTree, Array]:
    size, kind, normalize = settings

    def loss(params: Array) -> Array:
        images = images_of.make_images(params, size, kind)
        images = transform(images, key) if robust else images
        output = _output(model, variables, images, objective.path, normalize)
        alike = diverse * diversity(output) if diverse else 0.0
        return alike - objective.measure(output).sum()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


@tracing.jit("settings")
def _finish(
    model: nn.Module,
    variables: Variables,
    objective: Objective,
    params: Array,
    settings: Settings,
) -> tuple[Array, Array]:
    size, kind, normalize = settings
    images = images_of.make_images(params, size, kind)
    return images, objective.measure(_output(model, variables, images, objective.path, normalize))
