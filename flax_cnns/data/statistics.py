"""Mean, standard deviation and covariance of a data set's colours."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_cnns.data.decode import read_all
from flax_cnns.data.known import IMAGENET, KNOWN, base_name
from flax_cnns.data.splits import decoding_error
from flax_cnns.data.types import Split, Subset
from flax_cnns.errors import UserError

COVARIANCE_OF = 2000  # images, evenly spread over those that are streamed
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as PIL has it


def find_mean_and_std(
    config: Any, own: int, channels: int, train: Split
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and std per channel in 0..1, and where they come from."""
    if config.mean:
        if {len(config.mean), len(config.std)} - {1, channels}:
            raise UserError(
                f"data.mean and data.std: expected 1 or {channels} numbers each, got "
                f"{tuple(config.mean)} and {tuple(config.std)}"
            )
        mean, std = (np.broadcast_to(given, channels) for given in (config.mean, config.std))
        return tuple(map(float, mean)), tuple(map(float, std)), "config"
    known, by = KNOWN.get(base_name(config.name)), "published"
    if known is None or (own == 3 and channels == 1):
        # The spread of the grey image doesn't follow from those of the colours, which go together.
        if train.images is not None:
            mean, std = moments(train.images)
            return mean, std, "training images"
        if known is None:
            known, by = IMAGENET, "ImageNet"
    mean, std = np.array(known.mean), np.array(known.std)
    if channels == 1 and len(mean) == 3:
        mean, std = _LUMA @ mean[:, None], _LUMA @ std[:, None]
    mean, std = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
    return tuple(map(float, mean)), tuple(map(float, std)), by


def moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of u8 [N H W C], in 0..1, exactly, by counting the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[-1]):
        share = np.zeros(256)
        for start in range(0, len(images), 4096):  # bincount makes int64 of what it counts
            part = images[start : start + 4096, ..., channel]
            share += np.bincount(part.ravel(), minlength=256)
        share /= share.sum()
        mean.append(float(share @ values))
        # A constant channel is left at 0, not divided by 0.
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return tuple(mean), tuple(std)


def find_covariance(
    config: Any, size: int, channels: int, train: Split
) -> tuple[tuple[float, ...], ...]:
    """Of the colours of all training images; of up to COVARIANCE_OF where they are streamed."""
    if not config.augment.pca:
        return ()
    images = train.images
    if images is None:
        count = min(COVARIANCE_OF, len(train))
        some = Subset(train.source, np.arange(count) * len(train) // count, "for colours")
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


def covariance(images: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Between the channels of u8 [N H W C], over all pixels, of values in 0..1: [C C]."""
    channels = images.shape[-1]
    total, products = np.zeros(channels), np.zeros((channels, channels))
    for start in range(0, len(images), 1024):
        pixels = images[start : start + 1024].reshape(-1, channels) / 255
        total += pixels.sum(0)
        products += pixels.T @ pixels
    count = images.size // channels
    mean = total / count
    return tuple(map(tuple, (products / count - np.outer(mean, mean)).tolist()))
