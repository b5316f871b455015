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

MAX_COVARIANCE_IMAGES = 2000  # images, evenly spread over those that are streamed
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as PIL has it


def find_mean_and_std(
    config: Any, name: str, own: int, channels: int, train: Split
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and std per channel in 0..1 of the data set `name`, which has `own` channels itself, and
    where they come from."""
    if config.mean:
        return *broadcast_to_channels(
            config.mean, config.std, channels, "data.mean and data.std"
        ), "config"
    known, by = KNOWN_DATASETS.get(base_name(name)), "published"
    if known is None or (own == 3 and channels == 1):
        # The spread of the gray image doesn't follow from those of the colors, which go together.
        if train.images is not None:
            mean, std = moments(train.images)
            return mean, std, "training images"
        if known is None:
            known, by = IMAGENET, "ImageNet"
    return *convert_to_channels(known, channels), by


def convert_to_channels(
    known: KnownDataset, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Published mean and std, of images turned to so many channels."""
    mean, std = np.array(known.mean), np.array(known.std)
    if channels == 1 and len(mean) == 3:
        mean, std = _LUMA @ mean[:, None], _LUMA @ std[:, None]
    mean, std = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
    return tuple(map(float, mean)), tuple(map(float, std))


def broadcast_to_channels(
    mean: Sequence[float], std: Sequence[float], channels: int, what: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for each channel, of one number or of one for each. Raises UserError."""
    if {len(mean), len(std)} - {1, channels}:
        raise UserError(
            f"{what}: expected 1 or {channels} numbers each, got {tuple(mean)} and {tuple(std)}"
        )
    mean, std = (np.broadcast_to(given, channels) for given in (mean, std))
    return tuple(map(float, mean)), tuple(map(float, std))


def moments(images: np.ndarray | ArrayRows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel in 0..1: of u8 [N H W C], exactly, by counting the 256 values; of
    f32 in 0..1, of their values to 20 bits."""
    if images.dtype != np.uint8:
        return _moments_of_floats(images)
    values = np.arange(256) / 255
    shares = np.zeros((images.shape[-1], 256))
    for start in range(0, len(images), 4096):  # bincount makes int64 of what it counts
        part = images[start : start + 4096]
        for channel, share in enumerate(shares):
            share += np.bincount(part[..., channel].ravel(), minlength=256)
    mean, std = [], []
    for share in shares:
        share /= share.sum()
        mean.append(float(share @ values))
        # A constant channel is left at 0, not divided by 0.
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return tuple(mean), tuple(std)


def _moments_of_floats(
    images: np.ndarray | ArrayRows,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sums of whole numbers do not depend on their order, and so not on the machine."""
    channels, one = images.shape[-1], 2**20
    total, squares = [0] * channels, [0] * channels
    for pixels in _pixels(images):
        whole = np.rint(pixels.astype(np.float64) * one).astype(np.int64)
        for channel in range(channels):
            total[channel] += int(whole[:, channel].sum())
            squares[channel] += int((whole[:, channel] ** 2).sum())
    count = images.size // channels
    # In Python's whole numbers, of any size: a difference of large numbers.
    variance = [(count * b - a * a) / (count * one) ** 2 for a, b in zip(total, squares)]
    return tuple(a / (count * one) for a in total), tuple(math.sqrt(v) or 1.0 for v in variance)


def _pixels(images: np.ndarray | ArrayRows) -> Iterator[np.ndarray]:
    """[n C], at most 2**20 of them at a time."""
    height, width, channels = images.shape[1:]
    some = max(1, 2**20 // (height * width))
    for start in range(0, len(images), some):
        pixels = images[start : start + some].reshape(-1, channels)
        yield from np.array_split(pixels, -(-len(pixels) // 2**20))


def find_covariance(
    config: Any, size: int, channels: int, train: Split
) -> tuple[tuple[float, ...], ...]:
    """The covariance of the colors of all training images, or of up to MAX_COVARIANCE_IMAGES if
    they are streamed."""
    if not config.augment.pca:
        return ()
    images = train.images
    if images is None:
        count = min(MAX_COVARIANCE_IMAGES, len(train))
        some = Subset(train.source, np.arange(count) * len(train) // count, "for colors")
        images, _, _ = read_all(
            some,
            size,
            channels,
            share=1.0,
            threads=config.threads,
            skip_damaged=config.skip_damaged,
        )
        if not len(images):
            raise decoding_error("train", some)
    return covariance(images)


def covariance(images: np.ndarray | ArrayRows) -> tuple[tuple[float, ...], ...]:
    """Between the channels of u8 [N H W C], or f32 in 0..1, over all pixels, of values in 0..1:
    [C C]."""
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
