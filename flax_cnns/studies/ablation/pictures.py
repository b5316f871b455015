"""Draws the pictures of an ablation's report: differences, and learning curves."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from flax_cnns.analysis.plots import forest
from flax_cnns.analysis.statistics import Interval
from flax_cnns.runs.metric import Metric
from flax_cnns.studies.ablation.reading import RowResults
from flax_cnns.studies.ablation.summaries import RowSummary


def draw_differences(summaries: Sequence[RowSummary], metric: Metric, png: pathlib.Path) -> None:
    """Draws the differences of all rows, each from the baseline of its piece."""
    pieces = list(dict.fromkeys(summary.row.piece for summary in summaries))
    numbers = {piece: f" ({number})" if piece else "" for number, piece in enumerate(pieces, 1)}
    forest_rows, baselines, factor = [], [], metric.factor
    for summary in summaries:
        row, number = summary.row, numbers[summary.row.piece]
        if summary.difference is None:
            baselines.append(row.name + number + _describe_mean(summary))
            continue
        mean, low, high, n = summary.difference.interval
        points = Interval(factor * mean, factor * low, factor * high, n)
        pairs = [factor * pair for pair in summary.pairs]
        why = f" ({row.why_incomplete})" if row.why_incomplete else ""
        note = f"no complete pair{why}"
        forest_rows.append(forest.ForestRow(row.name + number, points, pairs, note))
    forest.draw_forest(
        forest_rows,
        png,
        title=f"against {'; '.join(baselines)}",
        x_label=f"difference of test {metric.name}{metric.difference_unit}",
        decimals=metric.decimals,
        more_is_better=metric.is_fraction,
    )


def _describe_mean(summary: RowSummary) -> str:
    """Describes a row's mean: ": 81.30 %, n=5"; "" if no cell is complete."""
    if not summary.value.n:
        return ""
    unit = " %" if summary.metric.is_fraction else ""
    return f": {summary.metric.format(summary.value.mean)}{unit}, n={summary.value.n}"


def draw_curves(
    rows: Sequence[RowResults], baseline: str, metric: Metric, png: pathlib.Path
) -> None:
    """Draws learning curves over the images seen, because batch sizes may differ.

    If most runs validate too rarely for a curve, draws the metric of the training batches, with
    their augmentation.
    """
    records = [record for row in rows for record in row.records.values()]

    def count_points(split: str) -> float:
        counts = [record.series(f"{split}/{metric.name}")[0].size for record in records]
        return float(np.median(counts))

    is_validation = count_points("validation") > 2 or not count_points("train")
    split = "validation" if is_validation else "train"
    what = "validation" if is_validation else "training batches'"
    max_images = max(record.step * record.config.data.batch_size for record in records)
    unit, x_label = (1000, "thousand images seen") if max_images >= 10_000 else (1, "images seen")
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for row in rows:
        curves[row.name] = []
        for record in row.records.values():
            steps, values = record.series(f"{split}/{metric.name}")
            if not is_validation:
                steps, values = _average_windows(steps), _average_windows(values)
            images = steps * record.config.data.batch_size / unit
            curves[row.name].append((images, metric.factor * values))
    forest.draw_row_curves(
        curves,
        baseline,
        png,
        y_label=f"{what} {metric.name}{metric.unit}",
        x_label=x_label,
        decimals=metric.decimals,
        more_is_better=metric.is_fraction,
    )


def _average_windows(series: np.ndarray, max_windows: int = 25) -> np.ndarray:
    """Averages a series over at most `max_windows` windows, as single batches are too noisy."""
    windows = np.array_split(series, max_windows)
    return np.array([window.mean() for window in windows if window.size])
