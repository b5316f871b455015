"""Saliency by gradients of a logit by the image: [N H W C], signed, as they come.

`summarize_channels` makes a map [N H W] of them, as the papers draw it.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.explain.targets import Target, TargetLike, make_target
from flax_cnns.errors import UserError
from flax_cnns.types import Array


def gradient(
    model: nn.Module, variables: Variables, images: Array, target: TargetLike = None
) -> Array:
    """The gradient of the target by the images (Simonyan et al. 2014, arXiv 1312.6034, section 3).

    `images` are what the network takes: f32 [N H W C], normalized. Raises `UserError` as
    `make_target` does.
    """
    check_floats(images)
    goal = make_target(target, model, variables, images)
    return _gradient(model, variables, images, goal)


def gradient_times_input(
    model: nn.Module, variables: Variables, images: Array, target: TargetLike = None
) -> Array:
    """Gradient times image (Shrikumar et al. 2016, arXiv 1605.01713)."""
    return gradient(model, variables, images, target) * images


def smooth_grad(
    model: nn.Module,
    variables: Variables,
    images: Array,
    target: TargetLike = None,
    *,
    key: Array,
    samples: int = 50,
    noise: float = 0.15,
    squared: bool = False,
) -> Array:
    """The mean gradient of noisy copies (Smilkov et al. 2017, arXiv 1706.03825).

    The standard deviation of the noise is `noise` times (largest - smallest value) of each image.
    `squared` averages squares of gradients. The target, None too, is that of the images without
    noise. Equal keys give equal maps. Raises `UserError` if `samples` is below 1.
    """
    if samples < 1:
        raise UserError(f"samples: expected at least 1, got {samples}")
    check_floats(images)
    goal = make_target(target, model, variables, images)
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
    target: TargetLike = None,
    *,
    baseline: Array | float = 0.0,
    steps: int = 50,
) -> Array:
    """(image - baseline) times the mean gradient between them (Sundararajan et al. 2017, arXiv
    1703.01365, equation 3), by `steps` midpoints.

    The sum over an image is the difference of the target between image and baseline, up to the
    error of the midpoints (completeness). `baseline` is an image, images, or one value; 0 is the
    mean color of normalized images. Raises `UserError` if `steps` is below 1.
    """
    if steps < 1:
        raise UserError(f"steps: expected at least 1, got {steps}")
    check_floats(images)
    goal = make_target(target, model, variables, images)
    difference = images - baseline
    total = jnp.zeros_like(images)
    for step in range(steps):
        total += _gradient(model, variables, baseline + (step + 0.5) / steps * difference, goal)
    return difference * total / steps


def check_floats(images: Array) -> None:
    """Raises `UserError` for images of whole numbers, which have no gradient."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"expected images of floats, normalized as the network takes them, got {images.dtype}"
        )


def summarize_channels(maps: Array, how: Literal["max", "sum", "norm", "signed"] = "max") -> Array:
    """[N H W C] -> [N H W]: the largest absolute value over the channels (Simonyan et al.), the sum
    of absolute values, the Euclidean norm, or the signed sum."""
    ways = {
        "max": lambda a: jnp.abs(a).max(-1),
        "sum": lambda a: jnp.abs(a).sum(-1),
        "norm": lambda a: jnp.linalg.norm(a, axis=-1),
        "signed": lambda a: a.sum(-1),
    }
    if how not in ways:
        raise UserError(f"expected {', '.join(ways)}, got {how!r}")
    return ways[how](maps)


@tracing.jit()
def _gradient(model: nn.Module, variables: Variables, images: Array, target: Target) -> Array:
    def score(images: Array) -> Array:
        logits: Any = model.apply(variables, images, train=False)
        return target.score(logits).sum()

    return jax.grad(score)(images)
