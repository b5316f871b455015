"""Saliency maps of a run's or of published weights' network, and their picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis.explain import backward_rules, cams, gradients, perturbations, targets
from flax_cnns.analysis.explain.targets import Target
from flax_cnns.analysis.plots import maps as plots
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs.subject import Subject
from flax_cnns.types import Array

DEFAULT_METHODS = ("gradient", "smooth_grad", "integrated_gradients", "grad_cam", "layer_cam")


# (subject, normalized images, target, module's path, key) -> maps [N H W], not negative
Method = Callable[[Subject, Array, Target, str | None, Array], Array]


def _make_pixel_method(function: Callable[..., Array], **options: Any) -> Method:
    """Returns a method of a function that gives [N H W C]: the largest absolute value over C."""

    def method(
        subject: Subject, images: Array, target: Target, path: str | None, key: Array
    ) -> Array:
        found = function(subject.model, subject.variables, images, target, **options)
        return gradients.summarize_channels(found)

    return method


def _make_cam_method(function: Callable[..., Array]) -> Method:
    """Returns a method of a function that weighs the maps of the module `path`."""

    def method(
        subject: Subject, images: Array, target: Target, path: str | None, key: Array
    ) -> Array:
        found = function(subject.model, subject.variables, images, target, path)
        return cams.show_map(found, images.shape[1:3])

    return method


def _smooth_grad(
    subject: Subject, images: Array, target: Target, path: str | None, key: Array
) -> Array:
    found = gradients.smooth_grad(
        subject.model, subject.variables, images, target, key=key, samples=25
    )
    return gradients.summarize_channels(found)


def _cam(subject: Subject, images: Array, target: Target, path: str | None, key: Array) -> Array:
    found = cams.cam(subject.model, subject.variables, images, target)
    return cams.show_map(found, images.shape[1:3])


def _occlusion(
    subject: Subject, images: Array, target: Target, path: str | None, key: Array
) -> Array:
    side = min(images.shape[1:3])
    found = perturbations.occlusion(
        subject.model,
        subject.variables,
        images,
        target,
        window=max(side // 7, 1),
        stride=max(side // 14, 1),
    )
    return jnp.maximum(found, 0)


def _rise(subject: Subject, images: Array, target: Target, path: str | None, key: Array) -> Array:
    found = perturbations.rise(subject.model, subject.variables, images, target, key=key, masks=500)
    return found - found.min((1, 2), keepdims=True)


METHODS: dict[str, Method] = {
    "gradient": _make_pixel_method(gradients.gradient),
    "gradient_times_input": _make_pixel_method(gradients.gradient_times_input),
    "smooth_grad": _smooth_grad,
    "integrated_gradients": _make_pixel_method(gradients.integrated_gradients, steps=25),
    "guided_backprop": _make_pixel_method(backward_rules.guided_backprop),
    "deconvnet": _make_pixel_method(backward_rules.deconvnet),
    "cam": _cam,
    "grad_cam": _make_cam_method(cams.grad_cam),
    "grad_cam_plus_plus": _make_cam_method(cams.grad_cam_plus_plus),
    "layer_cam": _make_cam_method(cams.layer_cam),
    "occlusion": _occlusion,
    "rise": _rise,
}


def check_methods(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not in `METHODS`, and if there is none."""
    if not names:
        raise UserError(f"expected at least one method of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")


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
    check_methods(methods)
    subject.check_images()
    images = subject.normalize(jnp.asarray(subject.pixels))
    goal = targets.make_target(classes, subject.model, subject.variables, images)
    assert goal.classes is not None
    explained = [subject.class_names[int(k)] for k in goal.classes]
    key = jax.random.key(seed)
    found = {name: np.asarray(METHODS[name](subject, images, goal, path, key)) for name in methods}
    labels = [f"{name}\nexplained: {label}" for name, label in zip(subject.names, explained)]
    plots.draw_saliency(subject.pixels, found, labels, png, subject.title)
    return explained
