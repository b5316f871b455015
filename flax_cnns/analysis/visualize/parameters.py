"""What is optimized in place of pixels: Fourier coefficients in decorrelated colors.

The formulas are those of Olah, Mordvintsev & Schubert 2017 (https://distill.pub/2017/feature-visualization)
and their library Lucid.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_cnns.types import Array

Kind = Literal["fourier", "pixels"]

# The root of the covariance of ImageNet's colors in 0..1, from Lucid: columns are principal colors.
COLOR_ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], np.float32)


def draw_parameters(
    key: Array, count: int, size: tuple[int, int], channels: int, kind: Kind = "fourier"
) -> Array:
    """Returns random parameters of `count` images of `size` pixels, nearly gray.

    "fourier": f32 [count H W // 2 + 1 channels 2], real and imaginary parts. "pixels": f32 [count H
    W channels].
    """
    height, width = size
    if kind == "pixels":
        return 0.01 * jax.random.normal(key, (count, height, width, channels))
    return 0.01 * jax.random.normal(key, (count, height, width // 2 + 1, channels, 2))


def make_images(parameters: Array, size: tuple[int, int], kind: Kind = "fourier") -> Array:
    """Returns the images f32 [count H W channels] in 0..1 of parameters from `draw_parameters`."""
    if kind == "fourier":
        spectrum = jax.lax.complex(parameters[..., 0], parameters[..., 1])
        spectrum *= fourier_scale(size)[None, :, :, None]
        raw = jnp.fft.irfft2(spectrum, size, axes=(1, 2)) / 4
    else:
        raw = parameters
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


def correlate_colors(images: Array) -> Array:
    """Returns images [... 3] whose decorrelated channels are mixed as ImageNet's colors are; images
    of another number of channels as they are."""
    if images.shape[-1] != 3:
        return images
    mix = COLOR_ROOT / np.linalg.norm(COLOR_ROOT, axis=0).max()
    return images @ jnp.asarray(mix.T)
