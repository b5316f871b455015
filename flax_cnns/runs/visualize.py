"""Pictures of what a network sees: one function for each kind, each writes one picture."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flax_cnns import files
from flax_cnns import tree as pytree
from flax_cnns.analysis.explain import (
    backward_rules,
    cams,
    features,
    gradients,
    perturbations,
    targets,
)
from flax_cnns.analysis.plots import maps as plots
from flax_cnns.analysis.visualize.deep_dream import deep_dream
from flax_cnns.analysis.visualize.objectives import Objective
from flax_cnns.analysis.visualize.optimize import visualize
from flax_cnns.data.images import Photo, load_upright, open_photo
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs.subject import Subject
from flax_cnns.types import Array

MAX_DREAM = 512  # pixels of the longer side
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
    _check_images(subject)
    images = subject.normalize(jnp.asarray(subject.pixels))
    goal = targets.make_target(classes, subject.model, subject.variables, images)
    assert goal.classes is not None
    explained = [subject.class_names[int(k)] for k in goal.classes]
    key = jax.random.key(seed)
    found = {name: np.asarray(METHODS[name](subject, images, goal, path, key)) for name in methods}
    labels = [f"{name}: {label}" for name, label in zip(subject.names, explained)]
    plots.draw_saliency(subject.pixels, found, labels, png, subject.title)
    return explained


def draw_features(subject: Subject, png: str | os.PathLike, path: str | None = None) -> str:
    """Draws the channels of a module's output for the first image. Returns the module's path, by
    default that of the first module with spatial maps. Raises UserError."""
    _check_images(subject)
    images = subject.normalize(jnp.asarray(subject.pixels[:1]))
    outputs = features.list_outputs(subject.model, subject.variables, images)
    if path is None:
        path = next((name for name, output in outputs.items() if features.is_map(output)), "")
    features.check_path(path, outputs, spatial=True)
    maps = np.asarray(features.features(subject.model, subject.variables, images, [path])[path])[0]
    tiles = [maps[..., k] for k in range(maps.shape[-1])]
    labels = [f"channel {k}" for k in range(len(tiles))]
    title = f"{subject.title}: {path} of {subject.names[0]}"
    plots.draw_tiles(tiles, labels, png, title)
    return path


def draw_filters(subject: Subject, png: str | os.PathLike) -> str:
    """Draws the filters of the first convolution, in colors if it takes three channels. Returns
    the kernel's path. Raises UserError if the network has no convolution on images."""
    model, variables = features.unroll(subject.model, subject.variables)
    flat = pytree.flatten(variables["params"])
    channels = subject.pixels.shape[-1]
    images = jax.ShapeDtypeStruct((1, *subject.pixels.shape[1:]), jnp.float32)
    called = features.list_calls(model, variables, images)
    kernels = [
        (path, flat[path])
        for path in (f"{layer}/kernel" for layer in called)
        if path in flat
        and flat[path].ndim == 4
        and flat[path].shape[2] == channels
        and max(flat[path].shape[:2]) > 1
    ]
    if not kernels:
        raise UserError(f"{subject.title}: no convolution takes images of {channels} channels")
    path, kernel = kernels[0]
    kernel = np.asarray(kernel, np.float32)
    tiles = [kernel[..., k] for k in range(kernel.shape[-1])]
    if channels == 3:
        reach = np.abs(kernel).max()
        tiles = [0.5 + tile / (2 * reach) for tile in tiles]
    else:
        tiles = [tile.mean(-1) for tile in tiles]
    labels = [f"filter {k}" for k in range(len(tiles))]
    plots.draw_tiles(tiles, labels, png, f"{subject.title}: {path}", signed=channels != 3)
    return path


def draw_units(
    subject: Subject,
    png: str | os.PathLike,
    path: str,
    units: Sequence[int],
    *,
    steps: int = 256,
    size: int = 0,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Draws an image that each unit of a module wants, and returns the units' activations.

    `path` "" means the logits. `size`: the images' side in pixels; 0: the network's own. Raises
    UserError.
    """
    channels = subject.pixels.shape[-1]
    sides = (size, size) if size else subject.pixels.shape[1:3]
    tiles, scores = [], []
    for unit in units:
        found = visualize(
            subject.model,
            subject.variables,
            Objective(path, unit),
            key=jax.random.key(seed),
            normalize=subject.normalize,
            size=(int(sides[0]), int(sides[1])),
            channels=channels,
            steps=steps,
        )
        tiles.append(found.images[0])
        scores.append(float(found.scores[0]))
        say(f"{path or 'logit'} {unit}: {scores[-1]:.4g} after {steps} steps")
    names = [subject.class_names[unit] if path == "" else f"unit {unit}" for unit in units]
    plots.draw_tiles(tiles, names, png, f"{subject.title}: {path or 'logits'}")
    return scores


def draw_dream(
    subject: Subject,
    picture: str | os.PathLike,
    path: str,
    *,
    photo: Photo | None = None,
    unit: int | None = None,
    octaves: int = 3,
    steps: int = 10,
    seed: int = 0,
) -> None:
    """Writes `photo`, or else the first image, after DeepDream on a module's output.

    The photo is taken whole, at most `MAX_DREAM` pixels wide and high. The picture's suffix says
    its format. Raises UserError.
    """
    if photo is None:
        _check_images(subject)
        pixels = subject.pixels[0]
    else:
        with open_photo(photo) as opened:
            image = load_upright(opened, subject.pixels.shape[-1]).copy()
        image.thumbnail((MAX_DREAM, MAX_DREAM))
        pixels = np.asarray(image, np.float32).reshape(*image.size[::-1], -1) / 255
    found = deep_dream(
        subject.model,
        subject.variables,
        jnp.asarray(pixels),
        path,
        key=jax.random.key(seed),
        normalize=subject.normalize,
        unit=unit,
        octaves=octaves,
        steps=steps,
    )
    _write_image(found, picture)


def _write_image(pixels: np.ndarray, path: str | os.PathLike) -> None:
    """Writes pixels f32 [H W 1 or 3] in 0..1 atomically. Raises UserError."""
    image = Image.fromarray(np.squeeze(np.uint8(np.round(255 * pixels))))
    kind = Image.registered_extensions().get(pathlib.Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"cannot write the picture {path}: use a suffix such as .png or .jpg")
    try:
        with files.replace_atomically(path) as temporary:
            image.save(temporary, format=kind)
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from error


def _check_images(subject: Subject) -> None:
    if not len(subject.pixels):
        raise UserError(f"{subject.title}: expected at least one photo, got none")
