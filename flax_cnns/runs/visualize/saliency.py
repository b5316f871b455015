"""Saliency maps of a run's or of published weights' network, and their picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis.explain import backward_rules, cams, gradients, perturbations, targets
from flax_cnns.analysis.plots import maps as plots
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs.subject import Subject
from flax_cnns.types import Array

DEFAULT_METHODS = ("gradient", "smooth_grad", "integrated_gradients", "grad_cam", "layer_cam")


def _pixel_map(method: Callable[..., Array], subject: Subject, images: Array, goal: Any) -> Array:
    return gradients.summarize_channels(method(subject.model, subject.variables, images, goal))


def _weighed_map(
    method: Callable[..., Array], subject: Subject, images: Array, goal: Any, path: str | None
) -> Array:
    found = method(subject.model, subject.variables, images, goal, path)
    return cams.show_map(found, images.shape[1:3])


def _above_lowest(maps: Array) -> Array:
    return maps - maps.min((1, 2), keepdims=True)


# Every method gives maps [N H W], not negative, of (subject, images, target, path, key).
METHODS: dict[str, Callable[..., Array]] = {
    "gradient": lambda s, x, t, path, key: _pixel_map(gradients.gradient, s, x, t),
    "gradient_times_input": lambda s, x, t, path, key: _pixel_map(
        gradients.gradient_times_input, s, x, t
    ),
    "smooth_grad": lambda s, x, t, path, key: _pixel_map(
        partial(gradients.smooth_grad, key=key, samples=25), s, x, t
    ),
    "integrated_gradients": lambda s, x, t, path, key: _pixel_map(
        partial(gradients.integrated_gradients, steps=25), s, x, t
    ),
    "guided_backprop": lambda s, x, t, path, key: _pixel_map(
        backward_rules.guided_backprop, s, x, t
    ),
    "deconvnet": lambda s, x, t, path, key: _pixel_map(backward_rules.deconvnet, s, x, t),
    "cam": lambda s, x, t, path, key: cams.show_map(
        cams.cam(s.model, s.variables, x, t), x.shape[1:3]
    ),
    "grad_cam": lambda s, x, t, path, key: _weighed_map(cams.grad_cam, s, x, t, path),
    "grad_cam_plus_plus": lambda s, x, t, path, key: _weighed_map(
        cams.grad_cam_plus_plus, s, x, t, path
    ),
    "layer_cam": lambda s, x, t, path, key: _weighed_map(cams.layer_cam, s, x, t, path),
    "occlusion": lambda s, x, t, path, key: jnp.maximum(
        perturbations.occlusion(
            s.model,
            s.variables,
            x,
            t,
            window=max(min(x.shape[1:3]) // 7, 1),
            stride=max(min(x.shape[1:3]) // 14, 1),
        ),
        0,
    ),
    "rise": lambda s, x, t, path, key: _above_lowest(
        perturbations.rise(s.model, s.variables, x, t, key=key, masks=500)
    ),
}


def draw_saliency(
    subject: Subject,
    png: str | os.PathLike,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    classes: int | Sequence[int] | None = None,
    path: str | None = None,
    seed: int = 0,
) -> list[str]:
    """Draws maps of each method for each image, and returns the names of the explained classes.

    `classes`: None explains the class that the network predicts. `path`: the module of the class
    activation maps, by default the last one with spatial maps. Raises UserError.
    """
    for name in methods:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    subject.check_images()
    images = subject.normalize(jnp.asarray(subject.pixels))
    goal = targets.make_target(classes, subject.model, subject.variables, images)
    assert goal.classes is not None
    explained = [subject.class_names[int(k)] for k in goal.classes]
    key = jax.random.key(seed)
    found = {name: np.asarray(METHODS[name](subject, images, goal, path, key)) for name in methods}
    labels = [f"{name}: {label}" for name, label in zip(subject.names, explained)]
    plots.draw_saliency(subject.pixels, found, labels, png, subject.title)
    return explained
