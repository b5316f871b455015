"""Mean, standard deviation and covariance of a data set's colors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flax_cnns.data.decode import read_all
from flax_cnns.data.known_datasets import IMAGENET, KNOWN_DATASETS, KnownDataset, base_name
from flax_cnns.data.splits import decoding_error
from flax_cnns.data.types import ArrayRows, Split, Subset
from flax_cnns.errors import UserError

MAX_COVARIANCE_IMAGES = 2000  # for streamed images, evenly spaced
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in PIL


def find_mean_and_std(
    config: Any, name: str, own_channels: int, channels: int, train: Split
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Returns mean and std per channel in 0..1, and their origin.

    They come from the config, otherwise from KNOWN_DATASETS, otherwise from the training images if
    these are in memory, otherwise from ImageNet. `own_channels` is the data set's own number of
    channels, before conversion to `channels`.
    """
    if config.mean:
        return *broadcast_to_channels(
            config.mean, config.std, channels, "data.mean and data.std"
        ), "config"
    known, origin = KNOWN_DATASETS.get(base_name(name)), "published"
    if known is None or (own_channels == 3 and channels == 1):
        # The std of gray images does not follow from those of the colors, which are correlated.
        if train.images is not None:
            mean, std = moments(train.images)
            return mean, std, "training images"
        if known is None:
            known, origin = IMAGENET, "ImageNet"
    return *convert_to_channels(known, channels), origin


def convert_to_channels(
    known: KnownDataset, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the published mean and std for images converted to `channels` channels. From color to
    gray, the std is an upper bound, reached if the colors are fully correlated."""
    mean, std = np.array(known.mean), np.array(known.std)
    if channels == 1 and len(mean) == 3:
        mean, std = _LUMA @ mean[:, None], _LUMA @ std[:, None]
    mean, std = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
    return tuple(map(float, mean)), tuple(map(float, std))


def broadcast_to_channels(
    mean: Sequence[float], std: Sequence[float], channels: int, name: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std per channel, each given as one number or one per channel. Raises
    UserError, which names `name`, for another length."""
    if {len(mean), len(std)} - {1, channels}:
        raise UserError(
            f"{name}: expected 1 or {channels} numbers each, got {tuple(mean)} and {tuple(std)}"
        )
    means, stds = (np.broadcast_to(given, channels) for given in (mean, std))
    return tuple(map(float, means)), tuple(map(float, stds))


def moments(images: np.ndarray | ArrayRows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std per channel in 0..1, of images [N H W C]. For u8 they are exact, because
    the 256 values are counted. Values f32 in 0..1 are first rounded to multiples of 2**-20."""
    if images.dtype != np.uint8:
        return _moments_of_floats(images)
    values = np.arange(256) / 255
    shares = np.zeros((images.shape[-1], 256))
    for start in range(0, len(images), 4096):  # in parts: bincount converts to int64
        part = images[start : start + 4096]
        for channel, share in enumerate(shares):
            share += np.bincount(part[..., channel].ravel(), minlength=256)
    mean, std = [], []
    for share in shares:
        share /= share.sum()
        mean.append(float(share @ values))
        # A constant channel gets std 1, so that normalization makes it 0 instead of dividing by 0.
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return tuple(mean), tuple(std)


def _moments_of_floats(
    images: np.ndarray | ArrayRows,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes `moments` of floats in fixed point. Integer sums do not depend on the order of the
    terms, so every machine gets the same result."""
    channels, scale = images.shape[-1], 2**20
    total, squares = [0] * channels, [0] * channels
    for pixels in _iterate_pixels(images):
        whole = np.rint(pixels.astype(np.float64) * scale).astype(np.int64)
        for channel in range(channels):
            total[channel] += int(whole[:, channel].sum())
            squares[channel] += int((whole[:, channel] ** 2).sum())
    count = images.size // channels
    # The difference of large numbers is exact, because Python's integers do not overflow.
    variance = [(count * b - a * a) / (count * scale) ** 2 for a, b in zip(total, squares)]
    return tuple(a / (count * scale) for a in total), tuple(math.sqrt(v) or 1.0 for v in variance)


def _iterate_pixels(images: np.ndarray | ArrayRows) -> Iterator[np.ndarray]:
    """Yields all pixels, at most 2**20 at a time: [n C]."""
    height, width, channels = images.shape[1:]
    step = max(1, 2**20 // (height * width))
    for start in range(0, len(images), step):
        pixels = images[start : start + step].reshape(-1, channels)
        yield from np.array_split(pixels, -(-len(pixels) // 2**20))


def find_covariance(
    config: Any, size: int, channels: int, train: Split
) -> tuple[tuple[float, ...], ...]:
    """Returns the covariance of the training images' colors; () if `config.augment.pca` is off.

    Streamed images are sampled: at most MAX_COVARIANCE_IMAGES are read. Raises UserError if none of
    them can be decoded.
    """
    if not config.augment.pca:
        return ()
    images = train.images
    if images is None:
        assert train.source is not None
        count = min(MAX_COVARIANCE_IMAGES, len(train))
        sample = Subset(train.source, np.arange(count) * len(train) // count, "for colors")
        images, _, _ = read_all(
            sample,
            size,
            channels,
            share=1.0,
            threads=config.threads,
            skip_damaged=config.skip_damaged,
            decoder=config.decoder,
        )
        if not len(images):
            raise decoding_error("train", sample)
    return covariance(images)


def covariance(images: np.ndarray | ArrayRows) -> tuple[tuple[float, ...], ...]:
    """Returns the covariance of the channels over all pixels, for values in 0..1: [C C]. Images are
    u8 [N H W C], or f32 in 0..1."""
    scale = 255 if images.dtype == np.uint8 else 1.0
    channels = images.shape[-1]
    total, products = np.zeros(channels), np.zeros((channels, channels))
    for start in range(0, len(images), 1024):
        pixels = images[start : start + 1024].reshape(-1, channels).astype(np.float64) / scale
        total += pixels.sum(0)
        products += pixels.T @ pixels
    count = images.size // channels
    mean = total / count
    return tuple(map(tuple, (products / count - np.outer(mean, mean)).tolist()))
