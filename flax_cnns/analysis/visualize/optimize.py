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
from flax_cnns.analysis.explain.backward_rules import redirect_gradients
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.visualize import parameters as images_of
from flax_cnns.analysis.visualize.objectives import Objective, diversity
from flax_cnns.analysis.visualize.transforms import draw_crops, transform
from flax_cnns.errors import UserError
from flax_cnns.types import Array, PyTree

STEPS = {"fourier": 512, "pixels": 512, "maco": 256}
LEARNING_RATES = {"fourier": 0.05, "pixels": 0.05, "maco": 1.0}
REDIRECTED_STEPS = 16  # in which a dead ReLU passes a gradient
FIRST_SIDE, LAST_SIDE = 0.5, 0.05  # mean side of MaCo's crops in the first and the last step


class Visualization(NamedTuple):
    images: np.ndarray  # f32 [N H W C] in 0..1
    scores: np.ndarray  # f32 [N]: the objective of these images
    losses: np.ndarray  # f32 [steps]: minus the objective, of the randomly transformed images
    # f32 [N H W]: the sum over steps and channels of the gradient's absolute values
    importance: np.ndarray


class _Settings(NamedTuple):
    """What the compiled program depends on."""

    size: tuple[int, int]
    kind: images_of.Kind
    normalize: Callable[[Array], Array]
    robust: bool
    diverse: float
    crops: int
    crop_size: tuple[int, int]


def visualize(
    model: nn.Module,
    variables: Variables,
    objective: Objective,
    *,
    key: Array,
    normalize: Callable[[Array], Array],
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    count: int = 1,
    steps: int | None = None,
    learning_rate: float | None = None,
    kind: images_of.Kind = "fourier",
    robust: bool = True,
    diverse: float = 0.0,
    crops: int = 32,
    crop_size: tuple[int, int] | None = None,
    magnitude: Array | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Visualization:
    """Returns images that make the objective large.

    `kind` "fourier" and "pixels" are the parameters of Olah, Mordvintsev & Schubert 2017
    (https://distill.pub/2017/feature-visualization): 512 steps of Adam at 0.05. In the first 16
    steps, gradients of ReLU and ReLU6 are redirected (`redirect_gradients`); other activations keep
    their gradient. `robust` moves, scales and rotates the images anew in each step. `diverse` is
    the weight of the similarity of the `count` images, which is made small.

    "maco" is MaCo (Fel et al. 2023, arXiv 2306.06805): phases with the fixed `magnitude` of
    `make_images`, 256 steps of Nadam at 1. The network sees `crops` crops of each image, of
    `crop_size` pixels (by default the network's `input_size`), and the scores are those of the
    whole images at that size. It takes no `robust` and no `diverse`.

    `normalize` turns images in 0..1 into what the network takes. `size` is that of the images, by
    default the network's `input_size`, and `channels` is theirs, by default that of `input_size` or
    3. `on_step` is called with the number of finished steps. Equal keys give equal images. Raises
    `UserError` for an unknown module, unit or kind, and for numbers below 1.
    """
    images_of.check_kind(kind)
    steps = STEPS[kind] if steps is None else steps
    rate = LEARNING_RATES[kind] if learning_rate is None else learning_rate
    if steps < 1 or count < 1 or crops < 1 or rate <= 0:
        raise UserError(
            "expected steps, count and crops of at least 1 and a learning rate above 0, got"
            f" {steps}, {count}, {crops} and {rate}"
        )
    maco = kind == "maco"
    if maco and diverse:
        raise UserError("maco takes no diversity; take fourier parameters")
    model, variables = tap.unroll(model, variables)
    own = getattr(model, "input_size", None)
    if size is None:
        if own is None:
            raise UserError(f"{type(model).__name__} has no input_size: give the images' size")
        size, channels = (own[0], own[1]), own[2]
    if channels is None:
        channels = 3 if own is None else own[2]
    if crop_size is None or not maco:
        crop_size = (own[0], own[1]) if own is not None and maco else size
    shape = jax.ShapeDtypeStruct((count, *crop_size, channels), jnp.float32)
    outputs = tap.list_outputs(model, variables, shape)
    tap.check_path(objective.path, outputs)
    objective.check(outputs[objective.path])
    objective = dataclasses.replace(objective, vector=jnp.asarray(objective.vector, jnp.float32))

    params = images_of.draw_parameters(key, count, size, channels, kind)
    if maco:
        robust, magnitude = False, _check_magnitude(magnitude, size, channels)
    settings = _Settings(size, kind, normalize, robust, diverse, crops if maco else 1, crop_size)
    tx = _make_optimizer(kind, rate)
    state, losses = tx.init(params), []
    importance = jnp.zeros((count, *size))
    for step in range(steps):
        # A loop in Python: inside lax.scan, XLA's convolutions are slow on a CPU.
        when = jnp.array([step, steps], jnp.float32)
        params, state, importance, loss = _step(
            model,
            variables,
            objective,
            params,
            state,
            importance,
            magnitude,
            jax.random.fold_in(key, step),
            when,
            settings,
            tx,
        )
        losses.append(loss)
        if on_step is not None:
            jax.block_until_ready(loss)
            on_step(step + 1)
    images, scores = _finish(model, variables, objective, params, magnitude, settings)
    return Visualization(
        *(np.asarray(each) for each in (images, scores, jnp.stack(losses), importance))
    )


def _check_magnitude(magnitude: Array | None, size: tuple[int, int], channels: int) -> Array:
    wanted = (size[0], size[1] // 2 + 1, channels)
    if magnitude is None:
        return jnp.broadcast_to(images_of.fourier_scale(size)[..., None], wanted)
    if jnp.shape(magnitude) != wanted:
        raise UserError(
            f"expected a magnitude of shape {list(wanted)}, got {list(jnp.shape(magnitude))}"
        )
    return jnp.asarray(magnitude, jnp.float32)


@functools.cache
def _make_optimizer(kind: images_of.Kind, learning_rate: float) -> optax.GradientTransformation:
    """Returns one object for equal arguments, so that `_step` is compiled once."""
    return optax.nadam(learning_rate) if kind == "maco" else optax.adam(learning_rate)


def _output(
    model: nn.Module,
    variables: Variables,
    images: Array,
    path: str,
    normalize: Callable[[Array], Array],
) -> Array:
    return tap.capture(model, variables, normalize(images), {path.partition("[")[0]})[path]


@tracing.jit("settings", "tx")
def _step(
    model: nn.Module,
    variables: Variables,
    objective: Objective,
    params: Array,
    state: PyTree,
    importance: Array,
    magnitude: Array | None,
    key: Array,
    when: Array,  # f32 [2]: this step from 0, and the number of steps
    settings: _Settings,
    tx: optax.GradientTransformation,
) -> tuple[Array, PyTree, Array, Array]:
    step, steps = when

    def forward(images: Array) -> Array:
        return _output(model, variables, images, objective.path, settings.normalize)

    def loss(images: Array) -> Array:
        seen = images
        if settings.kind == "maco":
            share = step / jnp.maximum(steps - 1, 1)
            side = FIRST_SIDE + (LAST_SIDE - FIRST_SIDE) * share
            seen = draw_crops(images, key, settings.crops, settings.crop_size, side)
        elif settings.robust:
            seen = transform(images, key)
        output = redirect_gradients(forward)(seen, step < REDIRECTED_STEPS)
        alike = settings.diverse * diversity(output) if settings.diverse else 0.0
        return alike - objective.measure(output).sum() / settings.crops

    def make(params: Array) -> Array:
        return images_of.make_images(params, settings.size, settings.kind, magnitude)

    images, pull = jax.vjp(make, params)
    value, by_pixels = jax.value_and_grad(loss)(images)
    (gradient,) = pull(by_pixels)
    updates, state = tx.update(gradient, state, params)
    importance += jnp.abs(by_pixels).sum(-1)
    return optax.apply_updates(params, updates), state, importance, value


@tracing.jit("settings")
def _finish(
    model: nn.Module,
    variables: Variables,
    objective: Objective,
    params: Array,
    magnitude: Array | None,
    settings: _Settings,
) -> tuple[Array, Array]:
    images = images_of.make_images(params, settings.size, settings.kind, magnitude)
    seen = images
    if settings.crop_size != settings.size:
        shape = (len(images), *settings.crop_size, images.shape[-1])
        seen = jax.image.resize(images, shape, "bilinear")
    output = _output(model, variables, seen, objective.path, settings.normalize)
    return images, objective.measure(output)
