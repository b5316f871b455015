"""Pictures of what a network's units respond to: feature visualization and DeepDream."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flax_cnns import files
from flax_cnns.analysis.explain import features
from flax_cnns.analysis.plots import maps as plots
from flax_cnns.analysis.visualize import optimize, parameters
from flax_cnns.analysis.visualize.deep_dream import check_octaves, deep_dream
from flax_cnns.analysis.visualize.objectives import Objective
from flax_cnns.data.images import Photo, load_upright, open_photo
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs.subject import Subject

OCTAVES = 3  # of a dream
MAX_DREAM = 512  # pixels of the longer side
REPORT_EVERY = 10.0  # seconds
OPAQUE = 80  # percentile of the importance above which MaCo's pixels are opaque


def draw_units(
    subject: Subject,
    picture: str | os.PathLike,
    paths: str | Sequence[str],
    units: Sequence[int | str],
    *,
    objective: str = "channel",
    directions: np.ndarray | None = None,
    kind: parameters.Kind = "fourier",
    steps: int | None = None,
    rate: float | None = None,
    size: int = 0,
    count: int = 1,
    diverse: float = 0.0,
    crops: int = 32,
    crop_size: int = 0,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Draws images to which each unit of a module responds, and returns the units' activations.

    The path "" means the logits, whose units may be class names. With several paths, each has a
    row. `objective`: "channel" or "neuron". `directions`, f32 [K C] or [C], are shown in place of
    units. `size`: the images' side in pixels; 0: the network's own. `count` images are drawn for
    each unit. `crop_size`: the side of "maco"'s crops; 0: the network's. The other arguments are
    those of `visualize`.

    "maco" takes the frequencies' magnitudes from the subject's images if it has some. In its
    picture, pixels that hardly mattered are transparent. Raises UserError.
    """
    channels = subject.pixels.shape[-1]
    height, width = (size, size) if size else subject.pixels.shape[1:3]
    paths = [paths] if isinstance(paths, str) else list(paths)
    goals = [
        goal for path in paths for goal in _list_goals(subject, path, units, objective, directions)
    ]
    _check_goals(subject, [goal for goal, _ in goals], (count, height, width, channels))
    if len(goals) * count > plots.MAX_TILES:
        raise UserError(
            f"{len(goals)} units x {count} images do not fit in one picture of {plots.MAX_TILES}"
        )
    magnitude = None
    if kind == "maco" and len(subject.pixels):
        magnitude = parameters.measure_magnitude(jnp.asarray(subject.pixels), (height, width))
    if kind in optimize.STEPS and steps is None:
        steps = optimize.STEPS[kind]
    report = _make_reporter(len(goals) * (steps or 1), say)
    tiles, labels, scores = [], [], []
    for number, (goal, name) in enumerate(goals):
        found = optimize.visualize(
            subject.model,
            subject.variables,
            goal,
            key=jax.random.key(seed),
            normalize=subject.normalize,
            size=(int(height), int(width)),
            channels=channels,
            count=count,
            steps=steps,
            learning_rate=rate,
            kind=kind,
            diverse=diverse,
            crops=crops,
            crop_size=(crop_size, crop_size) if crop_size else None,
            magnitude=magnitude,
            on_step=lambda step, done=number * (steps or 1): report(done + step),  # type: ignore[misc]
        )
        faded = kind == "maco"
        for image, importance in zip(found.images, found.importance):
            tiles.append(fade(image, importance) if faded else image)
            labels.append(f"{goal.path} {name}" if len(paths) > 1 else name)
        scores.append(float(found.scores.mean()))
        say(f"{goal.path or 'logit'}: {name}: {scores[-1]:.4g} after {steps} steps")
    rows = len(paths) if len(paths) > 1 else len(goals) if count > 1 else 0
    columns = len(tiles) // rows if rows else None
    title = f"{subject.title}: {', '.join(path or 'logits' for path in paths)}"
    plots.draw_tiles(tiles, labels, picture, title, columns=columns)
    return scores


def _list_goals(
    subject: Subject,
    path: str,
    units: Sequence[int | str],
    objective: str,
    directions: np.ndarray | None,
) -> list[tuple[Objective, str]]:
    """The objectives of a module, with names for the picture."""
    if directions is not None:
        rows = np.atleast_2d(directions)
        return [
            (Objective(path, kind="direction", vector=tuple(map(float, row))), f"direction {n}")
            for n, row in enumerate(rows)
        ]
    found = []
    for unit in units:
        number = unit if isinstance(unit, int) else _find_class(subject, path, unit)
        known = path == "" and 0 <= number < len(subject.class_names)
        name = subject.class_names[number] if known else f"unit {number}"
        found.append((Objective(path, number, objective), name))  # type: ignore[arg-type]
    return found


def _find_class(subject: Subject, path: str, name: str) -> int:
    names = list(subject.class_names)
    if path:
        raise UserError(f"{path!r} has numbered units, got {name!r}; class names are for logits")
    if names.count(name) != 1:
        if name in names:
            places = ", ".join(str(n) for n, other in enumerate(names) if other == name)
            raise UserError(f"several classes are called {name!r}; give a number: {places}")
        raise UserError(f"{subject.title}: no class {name!r}{did_you_mean(name, names)}")
    return names.index(name)


def _check_goals(
    subject: Subject, goals: Sequence[Objective], shape: tuple[int, int, int, int]
) -> None:
    """Raises UserError for an unknown module or unit before the first one is drawn."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    outputs = features.list_outputs(subject.model, subject.variables, images)
    for goal in goals:
        features.check_path(goal.path, outputs)
        goal.check(outputs[goal.path])


def fade(image: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Returns the image [H W C] on white; pixels whose importance [H W] is below the 80th
    percentile are transparent to that degree (Fel et al. 2023, section 3)."""
    top = max(float(np.percentile(importance, OPAQUE)), 1e-12)
    alpha = np.minimum(importance / top, 1)[..., None]
    return alpha * image + 1 - alpha


def _make_reporter(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Returns a function of the number of finished steps. It says now and then how many steps are
    done and about how many seconds are left. The time is measured from the first step on."""
    start, said = None, 0.0

    def report(step: int) -> None:
        nonlocal start, said
        now = time.monotonic()
        if start is None:
            start, said = (step, now), now
        elif now - said >= REPORT_EVERY and step < total:
            left = (now - start[1]) / (step - start[0]) * (total - step)
            say(f"step {step} of {total}, about {left:.0f} s left")
            said = now

    return report


def draw_dream(
    subject: Subject,
    picture: str | os.PathLike,
    path: str,
    *,
    photo: Photo | None = None,
    unit: int | None = None,
    octaves: int | None = None,
    steps: int = 10,
    rate: float = 0.01,
    tile: int = 224,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Writes `photo`, or else the first image, after DeepDream on a module's output.

    The photo is taken whole, at most `MAX_DREAM` pixels wide and high. The picture's suffix says
    its format. `octaves`: None takes three, or fewer if the network cannot take so small an image.
    The other arguments are those of `deep_dream`. Raises UserError.
    """
    _choose_format(picture)
    if photo is None:
        subject.check_images()
        pixels = subject.pixels[0]
    else:
        with open_photo(photo) as opened:
            image = load_upright(opened, subject.pixels.shape[-1]).copy()
        image.thumbnail((MAX_DREAM, MAX_DREAM))
        pixels = np.asarray(image, np.float32).reshape(*image.size[::-1], -1) / 255
    if octaves is None:
        octaves = _choose_octaves(subject, pixels.shape, path, tile)
        if octaves < OCTAVES:
            say(f"octaves: {octaves}, because the network takes no smaller images")
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
        step_size=rate,
        tile=tile,
        on_step=_make_reporter(octaves * steps, say),
    )
    _write_image(found, picture)


def _choose_octaves(subject: Subject, shape: tuple[int, ...], path: str, tile: int) -> int:
    height, width, channels = shape
    for octaves in range(OCTAVES, 1, -1):
        with contextlib.suppress(UserError):
            check_octaves(
                *(subject.model, subject.variables, (height, width, channels), path),
                octaves=octaves,
                tile=tile,
            )
            return octaves
    return 1


def _write_image(pixels: np.ndarray, path: str | os.PathLike) -> None:
    """Writes pixels f32 [H W 1 or 3] in 0..1 atomically. Raises UserError."""
    image = Image.fromarray(np.squeeze(np.uint8(np.round(255 * pixels))))
    try:
        with files.replace_atomically(path) as temporary:
            image.save(temporary, format=_choose_format(path))
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from error


def _choose_format(path: str | os.PathLike) -> str:
    kind = Image.registered_extensions().get(pathlib.Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"cannot write the picture {path}: use a suffix such as .png or .jpg")
    return kind
