"""Pictures of a module's channels, and of the filters of the first convolution."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.analysis.explain import features
from flax_cnns.analysis.plots import maps as plots
from flax_cnns.errors import UserError
from flax_cnns.runs.subject import Subject


def draw_features(subject: Subject, png: str | os.PathLike, path: str | None = None) -> str:
    """Draws the channels of a module's output for the first image, each from its own lowest to its
    own highest value. Returns the module's path, by default that of the first module with spatial
    maps. Raises UserError."""
    subject.check_images()
    images = subject.normalize(jnp.asarray(subject.pixels[:1]))
    outputs = features.list_outputs(subject.model, subject.variables, images)
    if path is None:
        path = next((name for name, output in outputs.items() if features.is_map(output)), "")
    features.check_path(path, outputs, spatial=True)
    maps = np.asarray(features.features(subject.model, subject.variables, images, [path])[path])[0]
    tiles = [maps[..., k] for k in range(maps.shape[-1])]
    labels = [f"channel {k}" for k in range(len(tiles))]
    title = f"{subject.title}: {path} of {subject.names[0]}; each channel has its own scale"
    plots.draw_tiles(tiles, labels, png, title)
    return path


def draw_filters(subject: Subject, png: str | os.PathLike) -> str:
    """Draws the filters of the first convolution, all with one scale. Returns the kernel's path.

    Filters on three channels are drawn in colors, with gray for 0. Others are drawn as the mean
    over their channels, with white for 0, red above it and blue below. Raises UserError if the
    network has no convolution on images.
    """
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
