"""What is optimized in place of pixels: Fourier coefficients in decorrelated colors.

"fourier" and "pixels" follow Olah, Mordvintsev & Schubert 2017
(https://distill.pub/2017/feature-visualization) and their library Lucid. "maco" follows Fel et al.
2023 (arXiv 2306.06805): the magnitude of each frequency is fixed and its phase is optimized, so
that an image cannot gain energy in high frequencies.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.types import Array

Kind = Literal["fourier", "pixels", "maco"]

# The root of the covariance of ImageNet's colors in 0..1, from Lucid: columns are principal colors.
COLOR_ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], np.float32)


def check_kind(kind: str) -> None:
    """Raises `UserError` if there are no parameters of that kind."""
    if kind not in get_args(Kind):
        raise UserError(f"unknown parameters {kind!r}{did_you_mean(kind, get_args(Kind))}")


def draw_parameters(
    key: Array, count: int, size: tuple[int, int], channels: int, kind: Kind = "fourier"
) -> Array:
    """Returns random parameters of `count` images of `size` pixels.

    "fourier": f32 [count H W // 2 + 1 channels 2], real and imaginary parts of an image that is
    nearly gray. "pixels": f32 [count H W channels], nearly gray. "maco": f32 [count H W // 2 + 1
    channels], phases from N(0, 1).
    """
    height, width = size
    if kind == "pixels":
        return 0.01 * jax.random.normal(key, (count, height, width, channels))
    if kind == "maco":
        return jax.random.normal(key, (count, height, width // 2 + 1, channels))
    return 0.01 * jax.random.normal(key, (count, height, width // 2 + 1, channels, 2))


def make_images(
    parameters: Array,
    size: tuple[int, int],
    kind: Kind = "fourier",
    magnitude: Array | None = None,
) -> Array:
    """Returns the images f32 [count H W channels] in 0..1 of parameters from `draw_parameters`.

    `magnitude`, f32 [H W // 2 + 1 channels], is that of the frequencies of "maco" up to a factor:
    by default `fourier_scale`, otherwise what `measure_magnitude` found.
    """
    if kind == "pixels":
        raw = parameters
    elif kind == "fourier":
        spectrum = jax.lax.complex(parameters[..., 0], parameters[..., 1])
        spectrum *= fourier_scale(size)[None, :, :, None]
        raw = jnp.fft.irfft2(spectrum, size, axes=(1, 2)) / 4
    else:
        fixed = jnp.asarray(fourier_scale(size)[..., None] if magnitude is None else magnitude)
        phase = _standardize(parameters)
        spectrum = jax.lax.complex(fixed * jnp.cos(phase), fixed * jnp.sin(phase))
        raw = _standardize(jnp.fft.irfft2(spectrum, size, axes=(1, 2)))
    return jax.nn.sigmoid(correlate_colors(raw))


def fourier_scale(size: tuple[int, int]) -> np.ndarray:
    """Returns the factor of each coefficient, f32 [H W // 2 + 1].

    It is sqrt(W H) / max(f, 1 / max(W, H)) for the frequency f in cycles per pixel: every frequency
    starts with the energy that it has in natural images.
    """
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    scale = np.sqrt(width * height) / np.maximum(frequency, 1 / max(width, height))
    return scale.astype(np.float32)


def measure_magnitude(images: Array, size: tuple[int, int]) -> Array:
    """Returns the mean magnitude of each frequency of images [N H W C] in 0..1, resized to `size`:
    f32 [H W // 2 + 1 C], in decorrelated colors (Fel et al. 2023, section 3, with the images of a
    data set)."""
    images = jnp.asarray(images, jnp.float32)
    images = jax.image.resize(images, (len(images), *size, images.shape[-1]), "bilinear") - 0.5
    if images.shape[-1] == 3:
        images = images @ jnp.asarray(np.linalg.inv(_mix_colors()).T)
    return jnp.abs(jnp.fft.rfft2(images, axes=(1, 2))).mean(0)


def correlate_colors(images: Array) -> Array:
    """Returns images [... 3] whose decorrelated channels are mixed as ImageNet's colors are; images
    of another number of channels as they are."""
    if images.shape[-1] != 3:
        return images
    return images @ jnp.asarray(_mix_colors().T)


def _mix_colors() -> np.ndarray:
    return COLOR_ROOT / np.linalg.norm(COLOR_ROOT, axis=0).max()


def _standardize(values: Array) -> Array:
    """Each image's values with mean 0 and standard deviation 1, over all axes but the first."""
    axes = tuple(range(1, values.ndim))
    centered = values - values.mean(axes, keepdims=True)
    return centered / (centered.std(axes, keepdims=True) + 1e-5)
