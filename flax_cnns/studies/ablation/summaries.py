"""Summarizes the rows of an ablation: intervals, differences from the baseline, costs.

The measurements of a row come from its cells (`measure_row`) or from a report.csv (`joining`).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flax_cnns.analysis import statistics
from flax_cnns.analysis.power import SeedsNeeded
from flax_cnns.analysis.statistics import Difference, Interval, MarginTest
from flax_cnns.runs.metric import Metric
from flax_cnns.studies.ablation import margins, seeds_needed
from flax_cnns.studies.ablation.reading import RowResults, count_params_and_macs

ALPHA = 0.05  # a difference may be printed bold if its corrected p-value is below this


class RowMeasurements(NamedTuple):
    """What the cells of a row gave, for one test metric; None for unknown values."""

    name: str
    values: Mapping[int, float]  # {seed: the test metric} of the complete cells
    seeds: int  # the number of cells
    without_result: Mapping[str, int] = {}  # {status: number} of the other cells
    gap: float | None = None  # the metric on the training examples minus that on the test split
    size: tuple[int, int | None] | None = None  # parameters, MACs
    seconds_per_step: float | None = None
    seconds: float | None = None
    piece: str = ""  # the report.csv that the row is from, in a joined report

    @property
    def why_incomplete(self) -> str:
        """How many cells have no result, and why: "2 failed, 1 missing"."""
        return ", ".join(f"{n} {status}" for status, n in sorted(self.without_result.items()))


def measure_row(row: RowResults, metric: Metric) -> RowMeasurements:
    """Takes from the records of a row's cells what the tables show."""
    values, fit = row.values(f"test/{metric.name}"), row.values(f"fit/{metric.name}")
    records = row.records.values()
    return RowMeasurements(
        name=row.name,
        values=values,
        seeds=len(row.cells),
        without_result=collections.Counter(
            cell.status for cell in row.cells.values() if cell.record is None
        ),
        gap=_mean(fit[s] - values[s] for s in fit),
        size=next((size for size in map(count_params_and_macs, records) if size), None),
        seconds_per_step=_mean(record.seconds_per_step for record in records),
        seconds=_mean(record.seconds for record in records),
    )


class RowSummary(NamedTuple):
    """One line of the report's tables; NaN or None for unknown values."""

    row: RowMeasurements
    value: Interval  # of the metric
    error: Interval  # 1 - metric, for a metric that is a fraction
    difference: Difference | None  # from the baseline; None for the baseline
    pairs: Sequence[float]  # the differences of the seeds that both rows have
    p_holm: float = math.nan
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
    rows: Sequence[RowMeasurements],
    baseline: str,
    method: str,
    metric: Metric,
    margin: float | None = None,
    power: float | None = None,
) -> list[RowSummary]:
    """Summarizes rows; `margin` and `power` are those of `report.write`."""
    reference = next((row.values for row in rows if row.name == baseline), {})
    summaries = []
    for row in rows:
        values, difference = row.values, None
        if row.name != baseline:
            difference = statistics.paired_difference(values, reference, method=method)
        seeds = sorted(values.keys() & reference.keys()) if difference else []
        summaries.append(
            RowSummary(
                row=row,
                value=statistics.mean(list(values.values()), method=method),
                error=statistics.mean([1 - value for value in values.values()], method=method),
                difference=difference,
                pairs=[values[seed] - reference[seed] for seed in seeds],
                metric=metric,
                margin=margins.make_test(difference, values, reference, metric, margin),
                seeds_needed=seeds_needed.plan_row(difference, values, reference, metric, power),
            )
        )
    return correct_p_values(summaries)


def correct_p_values(summaries: Sequence[RowSummary]) -> list[RowSummary]:
    """Returns the rows with Holm's correction over all of them."""
    p_values = [math.nan if s.difference is None else s.difference.p for s in summaries]
    corrected = statistics.holm(p_values)
    return [summary._replace(p_holm=p) for summary, p in zip(summaries, corrected)]


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
