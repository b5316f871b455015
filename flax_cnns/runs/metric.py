"""Logged metrics by name: whether they are fractions, and how to format their values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Fractions of examples or labels, from 0 to 1; more is better. Other metrics are plain numbers.
FRACTION_METRICS = ("accuracy", "top5", "label_accuracy", "subset_accuracy")
SIGNIFICANT_DIGITS = 4  # of a plain number


class Metric(NamedTuple):
    """A logged metric `test/NAME` and the format of its values.

    A fraction is written as a percentage and its differences in points; other metrics as they are.
    """

    name: str
    decimals: int = 2

    @property
    def is_fraction(self) -> bool:
        return self.name in FRACTION_METRICS

    @property
    def factor(self) -> int:
        """The number that a value is multiplied by to be in its unit."""
        return 100 if self.is_fraction else 1

    @property
    def unit(self) -> str:
        """The unit that follows the metric's name in a heading."""
        return ", %" if self.is_fraction else ""

    @property
    def difference_unit(self) -> str:
        """The unit that follows the name of a difference in a heading."""
        return ", points" if self.is_fraction else ""

    def round(self, value: float) -> float:
        """Rounds a value in its unit to the printed decimals. Zero has no sign."""
        return round(self.factor * value, self.decimals) + 0.0

    def format(self, value: float, sign: str = "") -> str:
        """Formats a value without its unit. `sign="+"` also marks positive values."""
        return f"{self.round(value):{sign}.{self.decimals}f}"


def make_metric(name: str, values: Iterable[float] = ()) -> Metric:
    """Returns the format of a metric.

    A plain number gets enough decimals to show `SIGNIFICANT_DIGITS` digits of the median of
    `values`.
    """
    if name in FRACTION_METRICS:
        return Metric(name)
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return Metric(name, SIGNIFICANT_DIGITS)
    first = math.floor(math.log10(float(np.median(sizes))))  # power of ten of the first digit
    return Metric(name, min(max(SIGNIFICANT_DIGITS - 1 - first, 0), 12))


def describe_test_value(name: str, value: float) -> str:
    """Describes a test value: "97.20% test", "test top5 99.00%", "test loss 0.3123"."""
    digits = SIGNIFICANT_DIGITS
    if name == "accuracy":
        return f"{value:.2%} test"
    is_fraction = name in FRACTION_METRICS
    return f"test {name} {value:.2%}" if is_fraction else f"test {name} {value:.{digits}g}"
