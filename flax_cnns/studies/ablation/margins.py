"""Equivalence with the baseline in the report of an ablation: a column, its note, its CSV fields.

A difference that is not significant may be large: the seeds may only be too few. Two one-sided
tests answer the other question: is the difference smaller than a margin that matters?
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flax_cnns.analysis.statistics import (
    Difference,
    MarginTest,
    check_margin,
    compare_with_margin,
    format_p,
)
from flax_cnns.runs.metric import Metric

ALPHA = 0.05
COLUMNS = ("margin", "p_not_worse", "p_equivalent")  # of report.csv


def make_test(
    difference: Difference | None,
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    metric: Metric,
    margin: float | None,
) -> MarginTest | None:
    """Tests `values` against those of the baseline, both {seed: value}; None without a margin, and
    for the baseline, which has no difference. `margin` is in points for fractions."""
    if margin is None or difference is None:
        return None
    check_margin(margin)
    return compare_with_margin(values, baseline, margin / metric.factor)


def make_title(test: MarginTest, metric: Metric) -> str:
    """Returns the heading of the column: "within ±0.5 points"."""
    unit = " points" if metric.is_fraction else ""
    return f"within ±{metric.factor * test.margin:g}{unit}"


def describe(test: MarginTest | None, metric: Metric) -> str:
    """Returns the verdict on a row: "equivalent, p 0.003", "not worse, p 0.012", "undecided"."""
    if test is None or math.isnan(test.p_equivalent):
        return "-"
    if test.p_equivalent < ALPHA:
        return f"equivalent, p {format_p(test.p_equivalent)}"
    not_worse = _get_p_not_worse(test, metric)
    return f"not worse, p {format_p(not_worse)}" if not_worse < ALPHA else "undecided"


def make_columns(test: MarginTest | None, metric: Metric) -> dict[str, Any]:
    """Returns the fields of a row of report.csv, None if unknown. The margin is in 0..1 for
    fractions."""
    if test is None:
        return dict.fromkeys(COLUMNS)
    values = test.margin, _get_p_not_worse(test, metric), test.p_equivalent
    return dict(zip(COLUMNS, values))


def make_note(test: MarginTest, metric: Metric) -> str:
    """Returns the sentences below the table."""
    margin = f"{metric.factor * test.margin:g}"
    if metric.is_fraction:
        margin += " point" if margin == "1" else " points"
    text = (
        f"Equivalent: two one-sided paired t-tests reject at {ALPHA} each that the difference is"
        f" {margin} or more in either direction."
    )
    if metric.is_fraction or metric.name == "loss":
        text += f" Not worse: one of them rejects that the row is worse by {margin} or more."
    return f"{text} Undecided: the seeds are too few. These p-values are not corrected."


def _get_p_not_worse(test: MarginTest, metric: Metric) -> float:
    """NaN if it is unknown whether more of the metric is better."""
    if metric.is_fraction:
        return test.p_not_worse
    return test.p_not_better if metric.name == "loss" else math.nan
