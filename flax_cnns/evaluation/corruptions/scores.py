"""Scores over corruptions: mean error, mCE and relative mCE (Hendrycks & Dietterich 2019, section
4.1), and AlexNet's errors, which the paper divides by.

Errors are {corruption: [error of each severity]}, as fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flax_cnns.errors import UserError

Errors = Mapping[str, Sequence[float]]

# AlexNet's top-1 errors on ImageNet-C at severities 1 to 5. Their means are the "raw AlexNet
# errors" of github.com/google-research/augmix, imagenet.py, taken from hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
# The mean over the severities, from the same source: ImageNet-C's frost pastes photographs, and
# this package has no such corruption.
ALEXNET_FROST_ERROR = 0.826572
ALEXNET_CLEAN_ERROR = 0.435  # the paper's table 1


def mean_corruption_error(errors: Errors, baseline: Errors) -> float:
    """Returns the mCE: the mean over the corruptions of `errors` of sum(errors) / sum(baseline's).

    1 is the baseline (the paper multiplies by 100). Raises UserError if the baseline has no error
    under one of the corruptions.
    """
    ratios = []
    for name, row in errors.items():
        if sum(baseline[name]) <= 0:
            raise UserError(
                f"mCE: the baseline makes no error under {name}, so nothing to divide by"
            )
        ratios.append(sum(row) / sum(baseline[name]))
    return float(np.mean(ratios))


def relative_corruption_error(
    errors: Errors, clean: float, baseline: Errors, baseline_clean: float
) -> float | None:
    """Returns the relative mCE: the mean over corruptions of sum(errors - clean error) /
    sum(baseline's errors - its clean error). None if the baseline does not get worse under one of
    the corruptions, because the quotient has no meaning then."""
    ratios = []
    for name, row in errors.items():
        below = sum(baseline[name]) - len(row) * baseline_clean
        if below <= 0:
            return None
        ratios.append((sum(row) - len(row) * clean) / below)
    return float(np.mean(ratios))
