"""The corruptions by name, with the constants of their five severities.

    corruption = CORRUPTIONS["fog"]
    constants = prepare_constants(corruption, (32, 32, 3))  # of all severities, stacked
    images = corrupt(corruption, images, numbers, pick_severity(constants, 3))

Hendrycks & Dietterich 2019 (https://arxiv.org/abs/1903.12261). The constants are those of the
programs that made ImageNet-C and CIFAR-10-C (github.com/hendrycks/robustness, ImageNet-C/create_c:
make_imagenet_c.py and make_cifar_c.py). Images with sides up to 64 pixels get CIFAR-C's constants,
larger ones ImageNet-C's. Lengths that the programs give as a share of the side (elastic transform)
follow the side; all others are in pixels, as published.

Differences from the published sets: our random numbers; frost is procedural; no image is stored as
a JPEG afterwards (ImageNet-C's are, with quality 85); motion blur follows ImageMagick's formula
without its rounding; spatter is missing.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation.corruptions import blur, digital, jpeg, noise, weather
from flax_cnns.evaluation.corruptions.blur import Shape, Values
from flax_cnns.types import Array, PyTree

SEVERITIES = (1, 2, 3, 4, 5)
MAX_CIFAR_SIDE = 64
MIN_SIDE = 8
PIXELS_AT_ONCE = 2**20  # values of the images that are corrupted at once on a device


class Corruption(NamedTuple):
    """A corruption and its constants."""

    name: str
    group: str  # noise, blur, weather or digital: the papers' fifteen; or extra
    apply: Callable[[Array, Array, Any], Array]  # (f32 [H W C] in 0..1, key, constants)
    prepare: Callable[[Values, Shape], dict[str, np.ndarray]]  # -> constants, stacked [5 ...]
    imagenet: Values
    cifar: Values
    needs_color: bool = False  # does nothing to gray images
    is_published: bool = True  # whether errors can be compared with the papers'


def _name_values(*names: str) -> Callable[[Values, Shape], dict[str, np.ndarray]]:
    def prepare(values: Values, shape: Shape) -> dict[str, np.ndarray]:
        del shape
        return {n: np.array(row, np.float32) for n, row in zip(names, zip(*values))}

    return prepare


def _each(*values: float) -> Values:
    return [(value,) for value in values]


_SHARES = [(244 / 224 * a, 244 / 224 * b, 244 / 224 * c) for a, b, c in (
    (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
)]  # fmt: skip

_ROWS = (
    Corruption(
        "gaussian_noise", "noise", noise.add_gaussian_noise, _name_values("scale"),
        _each(0.08, 0.12, 0.18, 0.26, 0.38), _each(0.04, 0.06, 0.08, 0.09, 0.10),
    ),
    Corruption(
        "shot_noise", "noise", noise.add_shot_noise, noise.tabulate_shot_noise,
        _each(60, 25, 12, 5, 3), _each(500, 250, 100, 75, 50),
    ),
    Corruption(
        "impulse_noise", "noise", noise.add_impulse_noise, _name_values("share"),
        _each(0.03, 0.06, 0.09, 0.17, 0.27), _each(0.01, 0.02, 0.03, 0.05, 0.07),
    ),
    Corruption(
        "defocus_blur", "blur", blur.blur_defocus, blur.prepare_defocus,
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    ),
    Corruption(
        "glass_blur", "blur", blur.blur_glass, blur.prepare_glass,
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    ),
    Corruption(
        "motion_blur", "blur", blur.blur_motion, blur.prepare_motion,
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    ),
    Corruption(
        "zoom_blur", "blur", blur.blur_zoom, blur.prepare_zoom,
        [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
        [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
    ),
    Corruption(
        "snow", "weather", weather.add_snow, weather.prepare_snow,
        [(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
         (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
         (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)],
        [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
         (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
         (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
    ),
    Corruption(
        "procedural_frost", "weather", weather.add_procedural_frost, _name_values("keep", "frost"),
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
        [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        is_published=False,
    ),
    Corruption(
        "fog", "weather", weather.add_fog, _name_values("strength", "decay"),
        [(1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)],
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    ),
    Corruption(
        "brightness", "weather", weather.add_brightness, _name_values("amount"),
        _each(0.1, 0.2, 0.3, 0.4, 0.5), _each(0.05, 0.1, 0.15, 0.2, 0.3),
    ),
    Corruption(
        "contrast", "digital", digital.reduce_contrast, _name_values("factor"),
        _each(0.4, 0.3, 0.2, 0.1, 0.05), _each(0.75, 0.5, 0.4, 0.3, 0.15),
    ),
    Corruption(
        "elastic_transform", "digital", digital.deform, digital.prepare_deform,
        _SHARES,
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    ),
    Corruption(
        "pixelate", "digital", digital.pixelate, digital.prepare_pixelate,
        _each(0.6, 0.5, 0.4, 0.3, 0.25), _each(0.95, 0.9, 0.85, 0.75, 0.65),
    ),
    Corruption(
        "jpeg_compression", "digital", jpeg.compress_jpeg, jpeg.prepare_jpeg,
        _each(25, 18, 15, 10, 7), _each(80, 65, 58, 50, 40),
    ),
    Corruption(
        "speckle_noise", "extra", noise.add_speckle_noise, _name_values("scale"),
        _each(0.15, 0.2, 0.35, 0.45, 0.6), _each(0.06, 0.1, 0.12, 0.16, 0.2),
    ),
    Corruption(
        "gaussian_blur", "extra", blur.blur_gaussian, blur.prepare_gaussian,
        _each(1, 2, 3, 4, 6), _each(0.4, 0.6, 0.7, 0.8, 1),
    ),
    Corruption(
        "saturate", "extra", digital.change_saturation, _name_values("factor", "offset"),
        [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
        [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
        needs_color=True,
    ),
)  # fmt: skip

CORRUPTIONS = {row.name: row for row in _ROWS}
GROUPS = ("noise", "blur", "weather", "digital", "extra")


def select_corruptions(names: Sequence[str]) -> list[Corruption]:
    """Returns the corruptions of names, groups, and "all" (the papers' fifteen), each once, in the
    order of the table. Raises UserError for an unknown name."""
    chosen = set()
    for name in names:
        some = {
            row.name
            for row in _ROWS
            if name in (row.name, row.group) or (name == "all" and row.group != "extra")
        }
        if not some:
            known = ("all", *GROUPS, *CORRUPTIONS)
            hint = " (frost is procedural_frost here)" if name == "frost" else ""
            raise UserError(
                f"--corruptions: unknown {name!r}{did_you_mean(name, known)}{hint}; known:"
                f" {', '.join(known)}"
            )
        chosen |= some
    return [row for row in _ROWS if row.name in chosen]


def name_selection(rows: Sequence[Corruption]) -> str:
    """Returns the shortest list for which `select_corruptions` returns these rows: "all,extra"."""
    left, words = {row.name for row in rows}, []
    papers = {row.name for row in _ROWS if row.group != "extra"}
    if papers <= left:
        words, left = ["all"], left - papers
    for group in GROUPS:
        members = [row.name for row in _ROWS if row.group == group]
        words += [group] if left.issuperset(members) else [n for n in members if n in left]
    return ",".join(words)


def name_constants(shape: Shape) -> str:
    """Returns whose constants images of this shape get: "cifar" or "imagenet"."""
    return "cifar" if max(shape[:2]) <= MAX_CIFAR_SIDE else "imagenet"


def prepare_constants(corruption: Corruption, shape: Shape) -> dict[str, np.ndarray]:
    """Returns the constants of all severities, each stacked [5 ...], for images [H W C].

    Raises UserError if the images are smaller than 8 pixels or have neither 1 nor 3 channels.
    """
    if min(shape[:2]) < MIN_SIDE or shape[2] not in (1, 3):
        raise UserError(
            f"corruptions need images of at least {MIN_SIDE}x{MIN_SIDE} pixels with 1 or 3"
            f" channels; these are {'x'.join(map(str, shape))}"
        )
    values = getattr(corruption, name_constants(shape))
    name = zlib.crc32(corruption.name.encode())
    return {
        **corruption.prepare(values, shape),
        "key": np.array([[name, severity] for severity in SEVERITIES], np.uint32),
    }


def pick_severity(constants: dict[str, np.ndarray], severity: int) -> dict[str, np.ndarray]:
    """Returns the constants of one severity, 1 to 5."""
    return {name: stacked[severity - 1] for name, stacked in constants.items()}


def corrupt(
    corruption: Corruption,
    images: Array,
    numbers: Array,
    constants: PyTree,
    seed: int | Array = 0,
) -> Array:
    """Corrupts images u8, or f32 in 0..255, [N H W C], and returns images of the same type.

    `numbers` i32 [N] are the images' numbers in their split: they choose the random numbers of an
    image, together with the seed, the corruption and the severity. So results depend neither on
    batches nor on devices. `constants`: what `pick_severity` returns; as they are arguments, all
    severities use one compiled program. u8 results are rounded down, as in the published files.
    Memory is bounded: about a million values of images at once.
    """
    key = jax.random.key(seed)
    for part in (0, 1):
        key = jax.random.fold_in(key, constants["key"][part])

    def corrupt_one(image_and_number: tuple[Array, Array]) -> Array:
        image, number = image_and_number
        image = image.astype(jnp.float32) / 255
        image = corruption.apply(image, jax.random.fold_in(key, number), constants)
        return 255 * jnp.clip(image, 0, 1)

    at_once = max(1, PIXELS_AT_ONCE // images[0].size)
    if len(images) <= at_once:
        corrupted = jax.vmap(corrupt_one)((images, numbers))
    else:
        corrupted = jax.lax.map(corrupt_one, (images, numbers), batch_size=at_once)
    if images.dtype == jnp.uint8:
        return jnp.floor(corrupted + 1e-3).astype(jnp.uint8)  # 1e-3: float32's 99.9999 is 100
    return corrupted.astype(images.dtype)


@functools.cache
def make_corrupt(name: str) -> Callable[..., Array]:
    """Returns the compiled `corrupt(images, numbers, constants, seed)` of a corruption."""
    return jax.jit(functools.partial(corrupt, CORRUPTIONS[name]))
