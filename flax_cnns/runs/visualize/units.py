"""Pictures of what a network's units respond to: feature visualization and DeepDream."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flax_cnns import files
from flax_cnns.analysis.plots import maps as plots
from flax_cnns.analysis.visualize.deep_dream import deep_dream
from flax_cnns.analysis.visualize.objectives import Objective
from flax_cnns.analysis.visualize.optimize import visualize
from flax_cnns.data.images import Photo, load_upright, open_photo
from flax_cnns.errors import UserError
from flax_cnns.runs.subject import Subject

MAX_DREAM = 512  # pixels of the longer side


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
        subject.check_images()
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
