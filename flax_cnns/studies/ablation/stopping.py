"""Adds seeds to the rows of an ablation until their intervals are narrow enough.

A row stops when the 95 % interval (Student's t) of its paired difference from the baseline is at
most as wide as asked for, or at the largest number of seeds. The rule looks at the width alone,
never at the sign of the difference or at its p-value: a rule that waited for significance would
find it where there is none. It is a function of the complete cells, so an ablation that was killed
goes on with the same decisions.

A row also stops too early if its first differences are close to each other by chance, so its
interval covers the true difference a little less often than 95 %. This is worst with few seeds at
the start; docs/ablations.md has numbers.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax_cnns.errors import UserError
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.ablation.reading import CellResult, RowResults, read_cells

WAITING = ("missing", "interrupted")  # cells that have yet to run


class StoppingRule(NamedTuple):
    """When a row has enough seeds."""

    width: float  # of the interval from end to end, in points for fractions
    most: int  # seeds


class RowState(NamedTuple):
    """How many seeds a row needs, and why it needs no more."""

    seeds: int
    reason: str  # narrow, most, or "" while the row goes on
    width: float  # of the interval over `seeds`, in points for fractions; NaN if unknown


def check_rule(width: float | None, most: int | None, seeds: int) -> StoppingRule | None:
    """Returns the rule of --width and --most; None without them. Raises UserError."""
    if width is None and most is None:
        return None
    if width is None or most is None:
        given, missing = ("--most", "--width") if width is None else ("--width", "--most")
        raise UserError(f"{given} needs {missing}: seeds are added until --width or --most")
    if not (math.isfinite(width) and width > 0):
        raise UserError(f"--width: expected a number of points above 0, got {width:g}")
    if most < seeds:
        raise UserError(f"--most: expected at least --seeds={seeds}, got {most}")
    if seeds < 2:
        raise UserError(f"--width needs --seeds=2 or more at the start, got {seeds}")
    return StoppingRule(width, most)


def judge_rows(
    rows: Mapping[str, Mapping[int, CellResult]],
    baseline: str,
    rule: StoppingRule,
    metric: Metric,
    seeds: int,
) -> dict[str, RowState]:
    """Judges each row from `rows`, {name: {seed: result}}: at least `seeds`, at most `rule.most`.

    The baseline needs as many seeds as the row that needs most.
    """
    test = f"test/{metric.name}"
    reference = RowResults(baseline, {}, dict(rows[baseline]))
    states = {
        name: _judge_row(RowResults(name, {}, dict(cells)), reference, rule, metric, test, seeds)
        for name, cells in rows.items()
        if name != baseline
    }
    needed = max((state.seeds for state in states.values()), default=seeds)
    return {baseline: RowState(needed, "", math.nan), **states}


def _judge_row(
    row: RowResults,
    baseline: RowResults,
    rule: StoppingRule,
    metric: Metric,
    test: str,
    start: int,
) -> RowState:
    from flax_cnns.analysis import statistics  # imported late: it needs SciPy

    width = math.nan
    for seeds in range(start, rule.most + 1):
        cells = [of.cells.get(seed) for of in (row, baseline) for seed in range(seeds)]
        is_waiting = any(cell is None or cell.status in WAITING for cell in cells)
        ours, theirs = (
            {seed: value for seed, value in of.values(test).items() if seed < seeds}
            for of in (row, baseline)
        )
        interval = statistics.paired_difference(ours, theirs).interval
        width = metric.factor * (interval.high - interval.low)
        if is_waiting:
            return RowState(seeds, "", width)
        if width <= rule.width:  # False if it is unknown
            return RowState(seeds, "narrow", width)
    return RowState(rule.most, "most", width)


def read_states(
    folder: pathlib.Path,
    names: Sequence[str],
    baseline: str,
    rule: StoppingRule,
    metric: str,
    seeds: int,
) -> dict[str, RowState]:
    """Judges the rows `names` and the baseline from the cells in an ablation's folder."""
    rows = {
        name: read_cells(folder / name, rule.most) for name in {baseline: 0, **dict.fromkeys(names)}
    }
    return judge_rows(rows, baseline, rule, make_metric(metric), seeds)


def describe_progress(states: Mapping[str, RowState], rule: StoppingRule, baseline: str) -> str:
    """Describes the rows that go on: "mixup has 6 (was 1.20 wide); until 1 or 20 seeds"."""
    going = {n: s for n, s in states.items() if not s.reason and n != baseline}
    parts = [f"{n} has {s.seeds} (was {_format_width(s.width)} wide)" for n, s in going.items()]
    return f"{', '.join(parts)}; until {rule.width:g} or {rule.most} seeds"


def describe_plan(rule: StoppingRule, seeds: int, metric: str) -> dict[str, Any]:
    """Returns the rule as `ablation.json` records it."""
    return {"width": rule.width, "most": rule.most, "seeds": seeds, "metric": metric}


def make_note(folder: pathlib.Path, plan: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the report about the rule; [] if the ablation has none."""
    known = plan.get("stopping")
    if not known:
        return []
    rule, names = StoppingRule(known["width"], known["most"]), [r["name"] for r in plan["rows"]]
    states = read_states(folder, names, plan["baseline"], rule, known["metric"], known["seeds"])
    del states[plan["baseline"]]
    metric = make_metric(known["metric"])
    unit = " points" if metric.is_fraction else ""
    lists = {
        "Narrow enough, with their seeds": [
            f"{name} ({state.seeds})" for name, state in states.items() if state.reason == "narrow"
        ],
        f"At {rule.most} seeds, with their widths": [
            f"{name} ({_format_width(state.width)}{unit})"
            for name, state in states.items()
            if state.reason == "most"
        ],
        "Not finished": [name for name, state in states.items() if not state.reason],
    }
    ends = " ".join(f"{why}: {', '.join(found)}." for why, found in lists.items() if found)
    return [
        "",
        f"From {known['seeds']} seeds on, seeds were added to each row until the 95 % interval of"
        f" its difference of test {metric.name} was at most {rule.width:g}{unit} wide, or to"
        f" {rule.most} seeds. {ends} The rule looks at the width alone, never at the sign or the"
        " p-value; such intervals cover the true difference a little less often than 95 %.",
    ]


def _format_width(width: float) -> str:
    return "unknown" if math.isnan(width) else f"{width:.2f}"
