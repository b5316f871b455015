"""Compares runs: where their configs differ, how they ended, and their curves."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from flax_cnns import config as configs
from flax_cnns.analysis.plots import style as plot_style
from flax_cnns.analysis.plots.curves import PANELS
from flax_cnns.analysis.plots.style import save_picture, shorten, tidy_axes, widen_single_point
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import record as records
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.metric import FRACTION_METRICS, SIGNIFICANT_DIGITS, Metric, make_metric
from flax_cnns.runs.record import RunRecord

# From the ninth run on, the dash pattern tells lines of one color apart.
COLORS = (
    *(plot_style.BLUE, plot_style.VERMILION, plot_style.GREEN, plot_style.PURPLE),
    *(plot_style.ORANGE, plot_style.SKY_BLUE, plot_style.BLACK, plot_style.GRAY),
)
DASHES = ("-", "--", "-.", ":")
RUNS_PER_LEGEND_COLUMN = 40


def read_runs(runs: Sequence[str | os.PathLike]) -> dict[str, RunRecord]:
    """Returns {name: run}, each run once. A name is the run's path without the common folders.

    Raises UserError if a path is not a run, or if a run is damaged.
    """
    paths = list(dict.fromkeys(pathlib.Path(run).resolve() for run in runs))
    results = [records.read_record(path) for path in paths]
    shared = os.path.commonpath([path.parent for path in paths])
    return {os.path.relpath(path, shared): record for path, record in zip(paths, results)}


def make_config_table(runs: Mapping[str, RunRecord]) -> Table | None:
    """Returns the fields in which the configs differ; None if there are none.

    Fields are rows and runs are columns, or the reverse if there are more runs than fields.
    """
    flat = [configs.flatten(configs.to_plain(record.config)) for record in runs.values()]
    absent = object()
    names = sorted(set().union(*flat))
    differing = {name: [fields.get(name, absent) for fields in flat] for name in names}
    differing = {name: v for name, v in differing.items() if any(value != v[0] for value in v)}
    if not differing:
        return None
    cells = [["absent" if v is absent else repr(v) for v in row] for row in differing.values()]
    rows, columns, corner = list(differing), list(runs), "field"
    if len(columns) > len(rows):
        rows, columns, corner = columns, rows, "run"
        cells = [list(row) for row in zip(*cells)]
    table = Table(title="configs: what differs")
    for column in (corner, *columns):
        table.add_column(column, overflow="fold")
    for name, values in zip(rows, cells):
        table.add_row(name, *values)
    return table


def find_metrics(runs: Mapping[str, RunRecord]) -> list[str]:
    """Returns the metrics that at least one run logged for its validations or its test."""
    logged = {name for record in runs.values() for line in record.lines for name in line}
    split = [name.partition("/") for name in logged]
    return sorted({name for role, _, name in split if role in ("validation", "test") and name})


def check_metric(runs: Mapping[str, RunRecord], metric: str) -> str:
    """Returns the metric's name without "validation/" or "test/".

    Raises UserError if no run logged it. Accuracy is always allowed: unfinished runs may not have
    logged it yet.
    """
    name, known = re.sub("^(validation|test)/", "", metric), find_metrics(runs)
    if name not in known and name != "accuracy":
        near = did_you_mean(name, known) or "; they logged no metric"
        raise UserError(f"--metric: none of these runs logged {name!r}{near}")
    return name


def make_result_table(runs: Mapping[str, RunRecord], metric: str = "accuracy") -> Table:
    """Returns the latest results of each run for one logged metric; `-` if a run lacks a value."""
    form = make_metric(metric)
    name_in_title = "" if metric == "accuracy" else f" {metric}"
    title = f"{name_in_title}{form.unit}"
    table = Table(title="results")
    columns = ["run", "", "step", f"validation{title}", "best", f"test{title}"]
    columns += ["test loss"] if metric != "loss" else []
    for column in (*columns, "train − test", "s per step", "time, s"):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    for name, record in runs.items():
        test, fit = record.last_value(f"test/{metric}"), _find_fit(record, metric)
        loss = [_format(record.last_value("test/loss"), ".4g")] if metric != "loss" else []
        table.add_row(
            name,
            "complete" if record.is_complete else "unfinished",
            f"{record.step:,}",
            _format_metric(form, record.last_value(f"validation/{metric}")),
            _format_metric(form, _best(record, metric)),
            _format_metric(form, test),
            *loss,
            _format_metric(form, None if test is None or fit is None else fit - test),
            _format(record.seconds_per_step, ".3g"),
            _format(record.seconds, ".0f"),
        )
    return table


def _find_fit(record: RunRecord, metric: str) -> float | None:
    """Returns the metric on the training examples: what the run logged with `train.evaluate_train`,
    or else what `evaluate --split=train` wrote for the tested step. None if there is neither."""
    fit, steps = record.last_value(f"fit/{metric}"), record.series(f"test/{metric}")[0]
    if fit is not None or not steps.size:
        return fit
    summary = record.workdir / "summary.json"
    tested = workdirs.read_json(summary).get("test/step") if summary.is_file() else None
    file = record.workdir / f"evaluation_train_{int(steps[-1] if tested is None else tested)}.json"
    value = workdirs.read_json(file).get(metric) if file.is_file() else None
    return value if isinstance(value, int | float) else None


def explain_missing_fit(runs: Mapping[str, RunRecord], metric: str) -> str:
    """Returns how to fill the column "train − test" of complete runs; "" if nothing is missing."""
    for record in runs.values():
        tested = record.last_value(f"test/{metric}") is not None
        if tested and _find_fit(record, metric) is None:
            return (
                "train − test: the run was not evaluated on its training examples; run `flax-cnns"
                f" evaluate --workdir={record.workdir} --split=train`, or train with"
                " --config.train.evaluate_train=True"
            )
    return ""


def _best(record: RunRecord, metric: str) -> float | None:
    """Returns the best validation value; None if it is unknown whether higher is better."""
    values = record.series(f"validation/{metric}")[1]
    values = values[np.isfinite(values)]
    mode = "max" if metric in FRACTION_METRICS else "min" if metric == "loss" else "auto"
    if record.config.train.best_by.removeprefix("validation/") == metric and mode == "auto":
        mode = record.config.train.best_mode
    if not values.size or mode == "auto":
        return None
    return float(values.max() if mode == "max" else values.min())


def _format_metric(metric: Metric, value: float | None) -> str:
    """Formats a fraction as a percentage, any other metric with four significant digits."""
    if metric.is_fraction:
        return _format_percent(value)
    return _format(value, f".{SIGNIFICANT_DIGITS}g")


def _format_percent(fraction: float | None) -> str:
    return _format(None if fraction is None else 100 * fraction, ".2f")


def _format(value: Any, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def draw_runs(
    runs: Mapping[str, RunRecord], png: str | os.PathLike, metric: str = "accuracy"
) -> None:
    """Draws the loss, the metric and the learning rate of all runs into a PNG file.

    Each run has a color; validation is a thick line, training a thin one, the test a star. The
    x-axis is the step, or the number of images seen if batch sizes differ. Raises UserError if the
    file cannot be written.
    """
    names = tuple(dict.fromkeys(metric if name == "accuracy" else name for name in PANELS))
    sizes = {record.config.data.batch_size for record in runs.values()}
    x_label = "step" if len(sizes) == 1 else "images seen"
    columns = -(-len(runs) // RUNS_PER_LEGEND_COLUMN)
    height = 4.0 + 0.14 * max(min(len(runs), RUNS_PER_LEGEND_COLUMN) - 12, 0)
    width = 14 / len(PANELS) * len(names)
    figure = Figure(figsize=(width + 3 * (columns - 1), height), layout="constrained")
    panels = figure.subplots(1, len(names))
    styles = _styles(len(runs))
    for axes, panel in zip(panels, names):
        for style, record in zip(styles, runs.values()):
            scale = record.config.data.batch_size if len(sizes) > 1 else 1
            _draw_run(axes, panel, record, style, scale)
        axes.set(title=panel.replace("_", " "), xlabel=x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        tidy_axes(axes)
        widen_single_point(axes)
        if not any(len(line.get_xdata()) for line in axes.get_lines()):
            axes.set(xticks=[], yticks=[])  # an empty panel's numbers would mean nothing
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="gray")
    lines = {}
    for style, (name, record) in zip(styles, runs.items()):
        label = shorten(name, 40) + ("" if record.is_complete else " (unfinished)")
        lines[name] = label, panels[0].plot([], [], **style)[0]
    # Labels are passed here because matplotlib ignores a line's label that begins with "_".
    labels, handles = zip(*lines.values())
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, fontsize="small", ncols=columns
    )
    figure.suptitle("thick: validation; thin: training; star: test", fontsize="medium")
    save_picture(figure, png)


def _styles(runs: int) -> list[dict[str, Any]]:
    """Returns a line style for each run. If there are more runs than pairs of COLORS and DASHES,
    colors follow one color map in the order of the runs."""
    if runs <= len(COLORS) * len(DASHES):
        return [dict(color=COLORS[i % 8], linestyle=DASHES[i // 8]) for i in range(runs)]
    turbo = colormaps["turbo"]
    return [dict(color=turbo(i / (runs - 1)), linestyle=DASHES[i % 4]) for i in range(runs)]


def _draw_run(axes: Axes, panel: str, record: RunRecord, style: dict[str, Any], scale: int) -> None:
    if panel == "learning_rate":
        steps, rates = record.series(panel)
        axes.plot(steps * scale, rates, marker="." if len(steps) < 2 else "", **style)
        return
    widths: dict[str, dict[str, Any]] = {
        "train": dict(linewidth=0.8, alpha=0.5),
        "validation": dict(linewidth=1.8),
    }
    for split, width in widths.items():
        steps, values = record.series(f"{split}/{panel}")
        marker = "." if len(steps) < 2 else ""
        axes.plot(steps * scale, values, marker=marker, **width, **style)
    steps, values = record.series(f"test/{panel}")
    axes.plot(steps * scale, values, "*", color=style["color"], markersize=11)
