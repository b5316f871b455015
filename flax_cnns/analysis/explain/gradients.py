"""Saliency from gradients with respect to the image: signed, f32 [N H W C].

`summarize_channels` turns them into maps [N H W], as the papers draw them.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain.features import Variables, unroll
from flax_cnns.analysis.explain.targets import (
    Feature,
    FeatureLike,
    Target,
    make_feature_or_target,
    trace_output,
)
from flax_cnns.errors import UserError
from flax_cnns.types import Array


def gradient(
    model: nn.Module, variables: Variables, images: Array, target: FeatureLike = None
) -> Array:
    """Returns the target's gradient with respect to the images.

    Simonyan et al. 2014, arXiv 1312.6034, section 3. `images` are the network's input: f32
    [N H W C], normalized. `target` is a function of the logits, or a `Feature`. Raises `UserError`
    if the images are not floats, and for the targets that `make_feature_or_target` refuses.
    """
    images = take_floats(images)
    model, variables, goal = _prepare(model, variables, images, target)
    return _gradient(model, variables, images, goal)


def gradient_times_input(
    model: nn.Module, variables: Variables, images: Array, target: FeatureLike = None
) -> Array:
    """Returns gradient times image (Shrikumar et al. 2016, arXiv 1605.01713)."""
    return gradient(model, variables, images, target) * images


def smooth_grad(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: FeatureLike = None,
    *,
    key: Array,
    samples: int = 50,
    noise: float = 0.15,
    squared: bool = False,
) -> Array:
    """Returns the mean gradient over noisy copies of each image (SmoothGrad).

    Smilkov et al. 2017, arXiv 1706.03825. The noise's standard deviation is `noise` times the range
    of the image's values. `squared` averages squared gradients. If `target` is None, the class is
    the one predicted without noise. Equal keys give equal maps. Raises `UserError` if `samples` is
    below 1.
    """
    if samples < 1:
        raise UserError(f"samples: expected at least 1, got {samples}")
    images = take_floats(images)
    model, variables, goal = _prepare(model, variables, images, target)
    low, high = images.min((1, 2, 3), keepdims=True), images.max((1, 2, 3), keepdims=True)
    spread = noise * (high - low)
    total = jnp.zeros_like(images)
    for step in range(samples):
        drawn = jax.random.normal(jax.random.fold_in(key, step), images.shape, images.dtype)
        found = _gradient(model, variables, images + spread * drawn, goal)
        total += found**2 if squared else found
    return total / samples


def integrated_gradients(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: FeatureLike = None,
    *,
    baseline: Array | float = 0.0,
    steps: int = 50,
) -> Array:
    """Returns integrated gradients: (image - baseline) times the mean gradient on the line between
    them, at `steps` midpoints.

    Sundararajan et al. 2017, arXiv 1703.01365, equation 3. Their sum over an image is the
    difference of the target between image and baseline, up to the error of the midpoint rule
    (completeness). `baseline` is one image, one image per row, or one value; 0 is the mean color of
    normalized images. Raises `UserError` if `steps` is below 1.
    """
    if steps < 1:
        raise UserError(f"steps: expected at least 1, got {steps}")
    images = take_floats(images)
    model, variables, goal = _prepare(model, variables, images, target)
    difference = images - baseline
    total = jnp.zeros_like(images)
    for step in range(steps):
        total += _gradient(model, variables, baseline + (step + 0.5) / steps * difference, goal)
    return difference * total / steps


def take_floats(images: Array) -> Array:
    """Returns the images in f32, in which gradients are summed without loss. Raises `UserError` if
    they are integers, which have no gradient."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"expected images of floats, normalized as the network takes them, got {images.dtype}"
        )
    return jnp.asarray(images, jnp.float32)


def summarize_channels(maps: Array, how: Literal["max", "sum", "norm", "signed"] = "max") -> Array:
    """Reduces the channels, [N H W C] -> [N H W], by `how`.

    "max": largest absolute value (Simonyan et al.); "sum": sum of absolute values; "norm":
    Euclidean norm; "signed": sum. Raises `UserError` for another name.
    """
    ways = {
        "max": lambda a: jnp.abs(a).max(-1),
        "sum": lambda a: jnp.abs(a).sum(-1),
        "norm": lambda a: jnp.linalg.norm(a, axis=-1),
        "signed": lambda a: a.sum(-1),
    }
    if how not in ways:
        raise UserError(f"expected {', '.join(ways)}, got {how!r}")
    return ways[how](maps)


def _prepare(
    model: nn.Module, variables: Variables, images: Array, target: FeatureLike
) -> tuple[nn.Module, Variables, Feature | Target]:
    goal = make_feature_or_target(target, model, variables, images)
    if isinstance(goal, Feature):
        model, variables = unroll(model, variables)  # the module has a name then
    return model, variables, goal


@tracing.jit()
def _gradient(
    model: nn.Module, variables: Variables, images: Array, target: Feature | Target
) -> Array:
    def score(images: Array) -> Array:
        return target.score(trace_output(model, variables, images, target)).sum()

    return jax.grad(score)(images)
