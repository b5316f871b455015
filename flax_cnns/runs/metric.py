"""Logged metrics by name: which of them are shares, and how their values are written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Of examples or labels, from 0 to 1, the more the better. All other metrics are plain numbers.
FRACTION_METRICS = ("accuracy", "top5", "label_accuracy", "subset_accuracy")
SIGNIFICANT_DIGITS = 4  # of a plain number


class Metric(NamedTuple):
    """`test/NAME` of a log. A share is written in per cent and its differences in points, any other
    metric as it is."""

    name: str
    decimals: int = 2

    @property
    def is_share(self) -> bool:
        return self.name in FRACTION_METRICS

    @property
    def factor(self) -> int:
        return 100 if self.is_share else 1

    @property
    def unit(self) -> str:
        """What follows the name in a heading."""
        return ", %" if self.is_share else ""

    @property
    def points(self) -> str:
        """What follows the name of a difference in a heading."""
        return ", points" if self.is_share else ""

    def round(self, value: float) -> float:
        """The value in its unit, as it is written; zero has no sign."""
        return round(self.factor * value, self.decimals) + 0.0

    def write(self, value: float, sign: str = "") -> str:
        """The value without its unit; `sign` "+" shows that of positive ones too."""
        return f"{self.round(value):{sign}.{self.decimals}f}"


def make_metric(name: str, values: Iterable[float] = ()) -> Metric:
    """A plain number has as many decimals as show `DIGITS` digits of the median of `values`."""
    if name in FRACTION_METRICS:
        return Metric(name)
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return Metric(name, SIGNIFICANT_DIGITS)
    first = math.floor(math.log10(float(np.median(sizes))))  # the place of the first digit
    return Metric(name, min(max(SIGNIFICANT_DIGITS - 1 - first, 0), 12))


def describe_test_value(name: str, value: float) -> str:
    """A test's value in words: "97.20% test", "test top5 99.00%", "test loss 0.3123"."""
    if name == "accuracy":
        return f"{value:.2%} test"
    return f"test {name} " + (
        f"{value:.2%}" if name in FRACTION_METRICS else f"{value:.{SIGNIFICANT_DIGITS}g}"
    )
