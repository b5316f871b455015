"""Draws the pictures of a search's report."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax_cnns.analysis.plots import trials as plots
from flax_cnns.analysis.plots.trials import ImportanceBar, SearchAxis, TrialPoint
from flax_cnns.studies.search.tuning.importance import ImportanceTable
from flax_cnns.studies.search.tuning.search_record import SearchRecord

PICTURES = ("history.png", "parallel.png", "slices.png")


def draw_all(
    search: SearchRecord, importance: Sequence[ImportanceTable | None], folder: pathlib.Path
) -> list[pathlib.Path]:
    """Draws history, parallel coordinates, slices, and the importance of each stage's fields.

    Returns the paths. The pictures of several stages share the axes of the first one.
    """
    axes, points = make_axes(search.stages[0].space), make_points(search)
    label = f"{search.metric_label}{search.metric.unit}"
    history, parallel, slices = (folder / name for name in PICTURES)
    plots.draw_history(points, history, y_label=label, maximize=search.maximize)
    plots.draw_parallel_coordinates(
        axes, points, parallel, value_label=label, maximize=search.maximize
    )
    given = _select_given(search, axes)
    plots.draw_slices(axes, points, slices, y_label=label, given=given, maximize=search.maximize)
    paths = [history, parallel, slices]
    for stage, table in zip(search.stages, importance):
        path = folder / name_importance(stage.number)
        if table is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        bars = [ImportanceBar(row.path, row.share, row.chance) for row in table.rows]
        title = f"PED-ANOVA: to be among the best {table.targets} of {table.trials} trials"
        plots.draw_importance(bars, path, title=title)
        paths.append(path)
    return paths


def name_importance(stage: int) -> str:
    """Returns the name of the picture of a stage's importance."""
    return "importance.png" if stage == 1 else f"importance{stage}.png"


def make_axes(space: Mapping[str, Mapping[str, Any]]) -> list[SearchAxis]:
    """Makes an axis of each field of a space, as `describe_space` gives it."""
    axes = []
    for path, each in space.items():
        if each["kind"] == "choice":
            names = tuple(map(label_category, each["values"]))
            axes.append(SearchAxis(path, categories=names))
        else:
            axes.append(SearchAxis(path, each["low"], each["high"], each["log"]))
    return axes


def label_category(value: Any) -> str:
    """Returns the text of a choice's value."""
    return value if isinstance(value, str) else json.dumps(value)


def make_points(search: SearchRecord) -> list[TrialPoint]:
    """Makes the points to draw of the trials that have ended, with values in the metric's unit."""
    space, factor = search.stages[0].space, search.metric.factor
    return [
        TrialPoint(
            drawn={
                path: label_category(value) if space[path]["kind"] == "choice" else value
                for path, value in trial.drawn.items()
                if path in space
            },
            state=trial.state,
            value=factor * trial.value,
            steps=trial.steps,
            stage=trial.stage,
        )
        for trial in search.trials
        if trial.state != "running"
    ]


def _select_given(search: SearchRecord, axes: Sequence[SearchAxis]) -> dict[str, Any]:
    """Returns the given config's values that have a place on an axis."""
    given: dict[str, Any] = {}
    for axis in axes:
        value = search.given_values.get(axis.name)
        if axis.categories:
            label = label_category(value)
            given |= {axis.name: label} if label in axis.categories else {}
        elif isinstance(value, (int, float)) and axis.low <= value <= axis.high:
            given[axis.name] = value
    return given
