"""Seeds that a difference needs, in the report of an ablation: a column, its note, CSV fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_cnns.analysis import power as powers
from flax_cnns.analysis.power import MAX_SEEDS, SeedsNeeded
from flax_cnns.analysis.statistics import Difference
from flax_cnns.runs.metric import Metric

COLUMNS = ("power_difference", "spread", "seeds_needed", "seeds_needed_safe")  # of report.csv


def plan_row(
    difference: Difference | None,
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    metric: Metric,
    power: float | None,
) -> SeedsNeeded | None:
    """Plans the seeds of a row from its complete cells and the baseline's, both {seed: value}.

    `power`: the difference to find, in points for fractions. None without it, for the baseline, and
    if the spread is unknown.
    """
    if power is None or difference is None:
        return None
    return powers.plan_seeds(values, baseline, power / metric.factor)


def make_title(power: float, metric: Metric) -> str:
    """Returns the heading of the column: "seeds for 0.5 points"."""
    return f"seeds for {_format_difference(power, metric)}"


def describe(needed: SeedsNeeded | None) -> str:
    """Returns the seeds of a row: "9 (to be safe 38)", "-" if unknown."""
    if needed is None:
        return "-"
    return f"{_format(needed.expected)} (to be safe {_format(needed.safe)})"


def make_columns(needed: SeedsNeeded | None, power: float, metric: Metric) -> dict[str, Any]:
    """Returns the fields of a row of report.csv, None if unknown. Differences and spreads are in
    0..1 for fractions."""
    if needed is None:
        return dict.fromkeys(COLUMNS)
    values = power / metric.factor, needed.spread, needed.expected, needed.safe
    return dict(zip(COLUMNS, values))


def make_note(power: float, metric: Metric) -> str:
    """Returns the sentences below the table."""
    difference = _format_difference(power, metric)
    return (
        f"Seeds for {difference}: with so many seeds, the paired t-test at {powers.ALPHA:g}"
        f" finds a true difference of {difference} with {powers.POWER:.0%} probability, if the"
        " standard deviation of the paired differences is that of the complete seeds; to be safe,"
        f" if it is the upper end of its one-sided {powers.CONFIDENCE:.0%} interval. Holm's"
        " correction needs more."
    )


def _format_difference(power: float, metric: Metric) -> str:
    unit = (" point" if power == 1 else " points") if metric.is_fraction else ""
    return f"{power:g}{unit}"


def _format(seeds: int | None) -> str:
    return f"over {MAX_SEEDS:,}" if seeds is None else f"{seeds:,}"
