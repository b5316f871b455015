"""Runs beside each other: in what their configs differ, where they ended, and their curves."""

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
from flax_cnns.runs.metric import FRACTION_METRICS, SIGNIFICANT_DIGITS, Metric, make_metric
from flax_cnns.runs.record import RunRecord

# From the ninth run on the lines differ by their dashes.
COLORS = (plot_style.BLUE, plot_style.VERMILION, plot_style.GREEN, plot_style.PURPLE)
COLORS += (plot_style.ORANGE, plot_style.SKY_BLUE, plot_style.BLACK, plot_style.GRAY)
DASHES = ("-", "--", "-.", ":")
RUNS_PER_LEGEND_COLUMN = 40  # runs in one column of the legend


def read_runs(runs: Sequence[str | os.PathLike]) -> dict[str, RunRecord]:
    """{name: run}, each once; names are the paths without what they share. Raises `UserError` where
    one is no run, or is damaged."""
    paths = list(dict.fromkeys(pathlib.Path(run).resolve() for run in runs))
    found = [records.read_record(path) for path in paths]
    shared = os.path.commonpath([path.parent for path in paths])
    return {os.path.relpath(path, shared): record for path, record in zip(paths, found)}


def make_config_table(runs: Mapping[str, RunRecord]) -> Table | None:
    """The fields in which the configs differ, or the runs, whichever are more, as lines; None where
    the configs are the same."""
    flat = [configs.flatten(configs.to_plain(record.config)) for record in runs.values()]
    absent = object()
    found = {name: [of.get(name, absent) for of in flat] for name in sorted(set().union(*flat))}
    found = {name: v for name, v in found.items() if any(value != v[0] for value in v)}
    if not found:
        return None
    cells = [["absent" if v is absent else repr(v) for v in values] for values in found.values()]
    fields, names = list(found), list(runs)
    corner = "field"
    if len(names) > len(fields):
        corner, fields, names, cells = "run", names, fields, list(zip(*cells))
    table = Table(title="configs: what differs")
    for column in (corner, *names):
        table.add_column(column, overflow="fold")
    for name, values in zip(fields, cells):
        table.add_row(name, *values)
    return table


def find_metrics(runs: Mapping[str, RunRecord]) -> list[str]:
    """The metrics that a run or more logged of its validations or its test."""
    logged = {name for record in runs.values() for line in record.lines for name in line}
    split = [name.partition("/") for name in logged]
    return sorted({name for role, _, name in split if role in ("validation", "test") and name})


def check_metric(runs: Mapping[str, RunRecord], metric: str) -> str:
    """The name of a metric, without "test/". Raises `UserError` if no run logged it; accuracy, of
    which nothing may be known yet, is always there."""
    name, known = re.sub("^(validation|test)/", "", metric), find_metrics(runs)
    if name not in known and name != "accuracy":
        near = did_you_mean(name, known) or "; nor any other metric"
        raise UserError(f"--metric: none of these runs logged {name!r}{near}")
    return name


def make_result_table(runs: Mapping[str, RunRecord], metric: str = "accuracy") -> Table:
    """Where each run ended, or stands, by a metric of the logs; `-` in runs that lack it."""
    of = make_metric(metric)
    said = "" if metric == "accuracy" else f" {metric}"
    table = Table(title="results")
    columns = ["run", "", "step", f"validation{said}{of.unit}", "best", f"test{said}{of.unit}"]
    columns += ["test loss"] if metric != "loss" else []
    for column in (*columns, "train − test", "s per step", "time, s"):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    for name, record in runs.items():
        test, fit = record.last_value(f"test/{metric}"), record.last_value(f"fit/{metric}")
        loss = [_say(record.last_value("test/loss"), ".4g")] if metric != "loss" else []
        table.add_row(
            name,
            "complete" if record.is_complete else "unfinished",
            f"{record.step:,}",
            _write(of, record.last_value(f"validation/{metric}")),
            _write(of, _best(record, metric)),
            _write(of, test),
            *loss,
            _write(of, None if test is None or fit is None else fit - test),
            _say(record.seconds_per_step, ".3g"),
            _say(record.seconds, ".0f"),
        )
    return table


def _best(record: RunRecord, metric: str) -> float | None:
    """Of the validations; None for a metric of which nobody said whether more is better."""
    values = record.series(f"validation/{metric}")[1]
    values = values[np.isfinite(values)]
    mode = "max" if metric in FRACTION_METRICS else "min" if metric == "loss" else "auto"
    if record.config.train.best_by.removeprefix("validation/") == metric and mode == "auto":
        mode = record.config.train.best_mode
    if not values.size or mode == "auto":
        return None
    return float(values.max() if mode == "max" else values.min())


def _write(metric: Metric, value: float | None) -> str:
    """A share in per cent, another metric with four digits."""
    return _say(value, f".{SIGNIFICANT_DIGITS}g") if not metric.is_share else _percent(value)


def _percent(share: float | None) -> str:
    return _say(None if share is None else 100 * share, ".2f")


def _say(value: Any, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def draw_runs(
    runs: Mapping[str, RunRecord], png: str | os.PathLike, metric: str = "accuracy"
) -> None:
    """Loss, accuracy or another metric, and learning rate: a color for each run, validation
    strong, training thin, the test a star. Against the steps, or where batch sizes differ the
    images seen. Raises `UserError` where it cannot be written."""
    names = tuple(dict.fromkeys(metric if name == "accuracy" else name for name in PANELS))
    sizes = {record.config.data.batch_size for record in runs.values()}
    across = "step" if len(sizes) == 1 else "images seen"
    columns = -(-len(runs) // RUNS_PER_LEGEND_COLUMN)  # of the legend
    height = 4.0 + 0.14 * max(min(len(runs), RUNS_PER_LEGEND_COLUMN) - 12, 0)
    width = 14 / len(PANELS) * len(names)
    figure = Figure(figsize=(width + 3 * (columns - 1), height), layout="constrained")
    panels = figure.subplots(1, len(names))
    styles = _styles(len(runs))
    for axes, panel in zip(panels, names):
        for style, record in zip(styles, runs.values()):
            _run(axes, panel, record, style, record.config.data.batch_size if len(sizes) > 1 else 1)
        axes.set(title=panel.replace("_", " "), xlabel=across)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        tidy_axes(axes)
        widen_single_point(axes)
        if not any(len(line.get_xdata()) for line in axes.get_lines()):
            axes.set(xticks=[], yticks=[])  # numbers would mean nothing
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="gray")
    lines = {}
    for style, (name, record) in zip(styles, runs.items()):
        label = shorten(name, 40) + ("" if record.is_complete else " (unfinished)")
        lines[name] = label, panels[0].plot([], [], **style)[0]
    # Passed here: matplotlib ignores a label that begins with "_".
    labels, handles = zip(*lines.values())
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, fontsize="small", ncols=columns
    )
    figure.suptitle("strong: validation; thin: training; star: test", fontsize="medium")
    save_picture(figure, png)


def _styles(runs: int) -> list[dict[str, Any]]:
    """A style for each run; hundreds of colors can only be told apart by their order."""
    if runs <= len(COLORS) * len(DASHES):
        return [dict(color=COLORS[i % 8], linestyle=DASHES[i // 8]) for i in range(runs)]
    turbo = colormaps["turbo"]
    return [dict(color=turbo(i / (runs - 1)), linestyle=DASHES[i % 4]) for i in range(runs)]


def _run(axes: Axes, panel: str, record: RunRecord, style: dict[str, Any], scale: int) -> None:
    if panel == "learning_rate":
        steps, rates = record.series(panel)
        axes.plot(steps * scale, rates, marker="." if len(steps) < 2 else "", **style)
        return
    for split, how in (
        ("train", dict(linewidth=0.8, alpha=0.5)),
        ("validation", dict(linewidth=1.8)),
    ):
        steps, values = record.series(f"{split}/{panel}")
        axes.plot(steps * scale, values, marker="." if len(steps) < 2 else "", **how, **style)
    steps, values = record.series(f"test/{panel}")
    axes.plot(steps * scale, values, "*", color=style["color"], markersize=11)
