"""DeepDream: an image in which a layer sees more of what it sees, octave by octave."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.analysis import tracing
from flax_cnns.analysis.explain import features as tap
from flax_cnns.analysis.explain.features import Variables
from flax_cnns.analysis.visualize.objectives import Objective
from flax_cnns.errors import UserError
from flax_cnns.types import Array


def deep_dream(
    model: nn.Module,
    variables: Variables,
    image: Array,
    path: str,
    *,
    key: Array,
    normalize: Callable[[Array], Array],
    unit: int | None = None,
    octaves: int = 4,
    octave_scale: float = 1.4,
    steps: int = 10,
    step_size: float = 0.01,
    tile: int = 224,
    on_step: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Returns the image [H W C] in 0..1 after gradient ascent on the mean square of the output of
    the module `path`, or on the mean of its channel `unit` (Mordvintsev, Olah & Tyka 2015).

    The image starts `octave_scale` ** (octaves - 1) times smaller; what was added to it is enlarged
    with it. The gradient is divided by its mean absolute value. It is computed by tiles of `tile`
    pixels, which are shifted at random in each step, so that memory does not grow with the image.
    A tile is at most as large as the first octave. `on_step` is called with the number of finished
    steps of all octaves. Equal keys give equal images. Raises `UserError` for an unknown module or
    unit, and for an image that is too small for the module in the first octave.
    """
    if min(octaves, steps, tile) < 1 or octave_scale <= 1 or step_size <= 0:
        raise UserError(
            "expected octaves, steps and tile of at least 1, octave_scale above 1 and step_size"
            f" above 0, got {octaves}, {steps}, {tile}, {octave_scale} and {step_size}"
        )
    model, variables = tap.unroll(model, variables)
    image = jnp.asarray(image, jnp.float32)
    height, width, channels = image.shape
    sizes = _list_sizes(height, width, octaves, octave_scale)
    side = min(tile, *sizes[0])
    shape = (height, width, channels)
    outputs = check_octaves(
        model, variables, shape, path, octaves=octaves, octave_scale=octave_scale, tile=tile
    )
    tap.check_path(path, outputs)
    if unit is not None:
        Objective(path, unit).check(outputs[path])
    added = np.zeros((*sizes[0], channels), np.float32)
    for octave, size in enumerate(sizes):
        base = np.asarray(jax.image.resize(image, (*size, channels), "bilinear"))
        added = np.array(jax.image.resize(added, (*size, channels), "bilinear"))
        for step in range(steps):
            shift = jax.random.fold_in(key, octave * 10_000 + step)
            down, right = (int(n) for n in jax.random.randint(shift, (2,), 0, side))
            # In NumPy: each shift would be another program.
            rolled = np.roll(np.clip(base + added, 0, 1), (down, right), (0, 1))
            gradient = np.zeros(rolled.shape, np.float32)
            for top in _starts(size[0], side):
                for left in _starts(size[1], side):
                    window = rolled[top : top + side, left : left + side][None]
                    found = _gradient(model, variables, window, path, unit, normalize)[0]
                    gradient[top : top + side, left : left + side] = found
            gradient = np.roll(gradient, (-down, -right), (0, 1))
            added += step_size * gradient / (np.abs(gradient).mean() + 1e-12)
            if on_step is not None:
                on_step(octave * steps + step + 1)
    return np.asarray(jnp.clip(image + added, 0, 1))


def check_octaves(
    model: nn.Module,
    variables: Variables,
    shape: tuple[int, int, int],
    path: str,
    *,
    octaves: int,
    octave_scale: float = 1.4,
    tile: int = 224,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the modules' outputs for a tile of the first octave of images [H W C].

    Raises `UserError` if the image is too small there for the network or for the module `path`.
    """
    height, width, channels = shape
    first = _list_sizes(height, width, octaves, octave_scale)[0]
    side, reason = min(tile, *first), f"too small for {path!r}"
    try:
        images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
        outputs = tap.list_outputs(model, variables, images) if side else {}
        if side and not (path in outputs and 0 in outputs[path].shape):
            return outputs
    except UserError as error:
        reason = str(error)
    raise UserError(
        f"an image of {height}x{width} pixels is {first[0]}x{first[1]} in the first of {octaves}"
        f" octaves: {reason}; take fewer octaves or a larger image"
    )


def _list_sizes(height: int, width: int, octaves: int, scale: float) -> list[tuple[int, int]]:
    """The image's sizes, smallest first."""
    return [(round(height / scale**n), round(width / scale**n)) for n in reversed(range(octaves))]


def _starts(size: int, side: int) -> list[int]:
    """First pixels of tiles that cover `size`; the last tile ends at the border."""
    return [*range(0, size - side, side), size - side]


@tracing.jit("path", "normalize")
def _gradient(
    model: nn.Module,
    variables: Variables,
    images: Array,
    path: str,
    unit: int | None,
    normalize: Callable[[Array], Array],
) -> Array:
    def score(images: Array) -> Array:
        output = tap.capture(model, variables, normalize(images), {path.partition("[")[0]})[path]
        output = output.astype(jnp.float32)
        return (output**2).mean() if unit is None else output[..., unit].mean()

    return jax.grad(score)(images)
