"""Summarizes the rows of an ablation: intervals, differences from the baseline, costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flax_cnns.analysis import statistics
from flax_cnns.analysis.power import SeedsNeeded
from flax_cnns.analysis.statistics import Difference, Interval, MarginTest
from flax_cnns.runs.metric import Metric
from flax_cnns.studies.ablation import margins, seeds_needed
from flax_cnns.studies.ablation.reading import RowResults, count_params_and_macs

ALPHA = 0.05  # a difference may be printed bold if its corrected p-value is below this


class RowSummary(NamedTuple):
    """One line of the report's tables; NaN or None for unknown values."""

    row: RowResults
    value: Interval  # of the metric
    error: Interval  # 1 - metric, for a metric that is a fraction
    difference: Difference | None  # from the baseline; None for the baseline
    p_holm: float
    gap: float | None  # the metric on the training examples minus that on the test split
    size: tuple[int, int | None] | None  # parameters, MACs
    seconds_per_step: float | None
    seconds: float | None
    metric: Metric = Metric("accuracy")
    margin: MarginTest | None = None  # None without --margin, and for the baseline
    seeds_needed: SeedsNeeded | None = None  # None without --power, and for the baseline

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p-value is small and the interval, as printed, excludes zero."""
        if self.difference is None or not self.p_holm < ALPHA:
            return False
        interval, rounded = self.difference.interval, self.metric.round
        low, high = rounded(interval.low), rounded(interval.high)
        return interval._replace(low=low, high=high).excludes_zero


def summarize_rows(
    rows: Sequence[RowResults],
    baseline: str,
    method: str,
    metric: Metric,
    margin: float | None = None,
    power: float | None = None,
) -> list[RowSummary]:
    """Summarizes rows; `margin` and `power` are those of `report.write`."""
    test = f"test/{metric.name}"
    reference = next((row.values(test) for row in rows if row.name == baseline), {})
    differences = [
        None
        if row.name == baseline
        else statistics.paired_difference(row.values(test), reference, method=method)
        for row in rows
    ]
    corrected = statistics.holm([math.nan if d is None else d.p for d in differences])
    summaries = []
    for row, difference, p_holm in zip(rows, differences, corrected):
        values, fit = row.values(test), row.values(f"fit/{metric.name}")
        records = row.records.values()
        sizes = map(count_params_and_macs, records)
        summaries.append(
            RowSummary(
                row=row,
                value=statistics.mean(list(values.values()), method=method),
                error=statistics.mean([1 - value for value in values.values()], method=method),
                difference=difference,
                p_holm=p_holm,
                gap=_mean(fit[s] - values[s] for s in fit),
                size=next((size for size in sizes if size), None),
                seconds_per_step=_mean(record.seconds_per_step for record in records),
                seconds=_mean(record.seconds for record in records),
                metric=metric,
                margin=margins.make_test(difference, values, reference, metric, margin),
                seeds_needed=seeds_needed.plan_row(difference, values, reference, metric, power),
            )
        )
    return summaries


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
