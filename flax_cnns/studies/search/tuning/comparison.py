"""Compares kinds of search at equal budgets in training steps, each with several seeds.

Each search is a study in WORKDIR/NAME/seedS: its sampler has seed S, and its trials have
`config.seed + S`. A curve shows the best value of a complete trial so far over the training steps
that were spent until it ended, in the order of the trials.
"""

from __future__ import annotations

import csv
import io
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from flax_cnns.analysis import statistics
from flax_cnns.analysis.plots.budget_curves import BudgetCurve, draw_budget_curves
from flax_cnns.config.spaces import Distribution
from flax_cnns.errors import UserError
from flax_cnns.files import write_text
from flax_cnns.runs.build import initialize_jax
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.runtime import cluster
from flax_cnns.studies.search.tuning.pruners import check_pruner
from flax_cnns.studies.search.tuning.reading import read_study
from flax_cnns.studies.search.tuning.records import StudyRecord
from flax_cnns.studies.search.tuning.samplers import check_sampler
from flax_cnns.studies.search.tuning.storage import read_trials
from flax_cnns.studies.search.tuning.tuner import is_writer, tune
from flax_cnns.train.progress import format_duration

POINTS = 200  # of a curve


class SearchMethod(NamedTuple):
    """A kind of search."""

    name: str
    sampler: str
    pruner: str


class MethodResult(NamedTuple):
    """The searches of one kind."""

    method: SearchMethod
    studies: tuple[StudyRecord, ...]  # by seed


def compare_methods(
    config: ConfigDict,
    space: Mapping[str, Distribution],
    folder: str | os.PathLike,
    methods: Sequence[SearchMethod],
    *,
    budget_steps: int,
    seeds: int = 3,
    **options: Any,
) -> list[MethodResult]:
    """Runs the searches that are not complete, then writes the comparison.

    Takes the methods in turn, so that an interrupted comparison has seeds of each. `options` are
    those of `tune`. If this process is one of several, process 0 alone prints and writes. Raises
    UserError if two methods have one name, or for an unknown sampler or pruner.
    """
    folder = pathlib.Path(folder)
    if len({method.name for method in methods}) < len(methods):
        raise UserError("--compare: two searches have the same name; name each once")
    for method in methods:
        check_sampler(method.sampler)
        check_pruner(method.pruner)
    if cluster.is_one_of_several(os.environ):
        initialize_jax(config)
    say = print if is_writer() else lambda _: None
    total, seconds, steps = len(methods) * seeds, 0.0, 0
    say(f"{total} searches of {budget_steps:,} training steps: {total * budget_steps:,} in all")
    for seed in range(seeds):
        for place, method in enumerate(methods, 1):
            study = folder / method.name / f"seed{seed}"
            start_time, done = time.monotonic(), _count_steps(study)
            seeded = ConfigDict(config.to_dict())
            seeded.seed += seed
            tune(
                seeded,
                space,
                study,
                sampler=method.sampler,
                pruner=method.pruner,
                budget_steps=budget_steps,
                seed=seed,
                **options,
            )
            number, eta = seed * len(methods) + place, ""
            if taken := _count_steps(study) - done:  # a search that was complete says no pace
                steps, seconds = steps + taken, seconds + time.monotonic() - start_time
            if steps and number < total:
                left = (total - number) * budget_steps * seconds / steps
                eta = f"; about {format_duration(left)} left"
            say(f"{number}/{total} {method.name}, seed {seed}: done{eta}")
    results = read_comparison(folder, methods, seeds, budget_steps)
    if is_writer():
        write_comparison(results, folder, budget_steps)
    return results


def _count_steps(folder: pathlib.Path) -> int:
    """Counts the training steps of a study's trials that have ended."""
    return sum(trial.steps for trial in read_trials(folder))


def read_comparison(
    folder: pathlib.Path, methods: Sequence[SearchMethod], seeds: int, budget_steps: int
) -> list[MethodResult]:
    """Reads the searches of a comparison, without the trials that an earlier command with a larger
    budget began behind this one. Raises UserError if a search is missing."""
    results = []
    for method in methods:
        studies = []
        for seed in range(seeds):
            study, spent, trials = read_study(folder / method.name / f"seed{seed}"), 0, []
            for trial in study.trials:
                trials += [trial] if spent < budget_steps else []
                spent += trial.steps
            studies.append(study._replace(trials=trials))
        results.append(MethodResult(method, tuple(studies)))
    return results


# ---------------------------------------------------------------------------- curves


def compute_curve(study: StudyRecord) -> tuple[np.ndarray, np.ndarray]:
    """Returns (training steps spent, best value of a complete trial so far), [trials] each.

    The value is NaN until a trial is complete. Trials that still run are left out.
    """
    spent, values, total, best = [], [], 0, math.nan
    sign = 1 if study.mode == "max" else -1
    for trial in study.trials:
        if trial.state == "running":
            continue
        total += trial.steps
        if trial.state == "complete" and trial.value is not None and math.isfinite(trial.value):
            best = trial.value if math.isnan(best) else sign * max(sign * best, sign * trial.value)
        spent.append(total)
        values.append(best)
    return np.array(spent, float), np.array(values, float)


def sample_curve(curve: tuple[np.ndarray, np.ndarray], spent: np.ndarray) -> np.ndarray:
    """Returns the best value at each of `spent` [points]: that of the last trial that had ended."""
    at = np.searchsorted(curve[0], spent, side="right") - 1
    return np.where(at >= 0, curve[1][np.maximum(at, 0)], math.nan)


def average_curves(studies: Sequence[StudyRecord], budget_steps: int, factor: float) -> BudgetCurve:
    """Averages the curves of several seeds, with values times `factor`.

    The mean is known where all seeds have a value. The last point counts what was spent in all: a
    trial that began within the budget may end behind it.
    """
    curves = [compute_curve(study) for study in studies]
    spent = np.linspace(0, budget_steps, POINTS)
    seeds = [factor * sample_curve(curve, spent) for curve in curves]
    for curve, sampled in zip(curves, seeds):
        if curve[1].size:
            sampled[-1] = factor * curve[1][-1]
    intervals = [statistics.mean(list(values)) for values in np.transpose(seeds)]
    mean, low, high = np.transpose([interval[:3] for interval in intervals])
    return BudgetCurve(spent, mean, low, high, seeds)


# ---------------------------------------------------------------------------- files


def write_comparison(
    results: Sequence[MethodResult], folder: pathlib.Path, budget_steps: int
) -> list[pathlib.Path]:
    """Writes comparison.md, comparison.csv and comparison.png. Returns the paths."""
    first = results[0].studies[0]
    name = first.metric.removeprefix("validation/")
    metric = make_metric(name, [t.value for t in first.trials if t.value is not None])
    curves = {
        result.method.name: average_curves(result.studies, budget_steps, metric.factor)
        for result in results
    }
    paths = [folder / f"comparison.{suffix}" for suffix in ("md", "csv", "png")]
    write_text(paths[0], _format_markdown(results, curves, metric, budget_steps))
    write_text(paths[1], _format_csv(curves))
    draw_budget_curves(
        curves,
        paths[2],
        x_label="training steps spent",
        y_label=f"best validation {metric.name} so far{metric.unit}",
    )
    return paths


def _format_csv(curves: Mapping[str, BudgetCurve]) -> str:
    """Formats the curves: a line per search and point, unknown values empty."""
    seeds = max(len(curve.seeds) for curve in curves.values())
    text = io.StringIO()
    columns = ["search", "steps", "mean", "low", "high", *(f"seed{s}" for s in range(seeds))]
    out = csv.writer(text, lineterminator="\n")
    out.writerow(columns)
    for name, curve in curves.items():
        for point, steps in enumerate(curve.spent):
            values = [curve.mean[point], curve.low[point], curve.high[point]]
            values += [seed[point] for seed in curve.seeds]
            cells = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
            out.writerow([name, f"{steps:.0f}", *cells])
    return text.getvalue()


def _format_markdown(
    results: Sequence[MethodResult],
    curves: Mapping[str, BudgetCurve],
    metric: Metric,
    budget_steps: int,
) -> str:
    first = results[0].studies[0]
    metric = make_metric(
        first.metric.removeprefix("validation/"), [curves[results[0].method.name].mean[-1]]
    )
    lines = [
        f"# Searches compared at {budget_steps:,} training steps each",
        "",
        f"| search | sampler | pruner | seeds | trials | complete | best validation {metric.name}"
        f"{metric.unit} |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        trials = [len(study.trials) for study in result.studies]
        complete = [sum(t.state == "complete" for t in s.trials) for s in result.studies]
        curve = curves[result.method.name]
        mean, low, high = (array[-1] for array in (curve.mean, curve.low, curve.high))
        form = f"{{:.{metric.decimals}f}}".format
        value = form(mean) + (f" [{form(low)}, {form(high)}]" if math.isfinite(low) else "")
        lines.append(
            f"| {result.method.name} | {result.method.sampler} | {result.method.pruner} |"
            f" {len(result.studies)} | {_join(trials)} | {_join(complete)} | {value} |"
        )
    base = results[0].method.name
    for result in results[1:]:
        name = result.method.name
        ours, theirs = (
            {s: float(values[-1]) for s, values in enumerate(curves[key].seeds)}
            for key in (name, base)
        )
        difference = statistics.paired_difference(ours, theirs)
        mean, low, high, n = difference.interval
        text = f"{mean:+.{metric.decimals}f}"
        if math.isfinite(low):
            text += f" [{low:+.{metric.decimals}f}, {high:+.{metric.decimals}f}]"
        lines += [
            "",
            f"{name} minus {base}, paired over {n} seeds: {text}{metric.difference_unit}, p"
            f" {statistics.format_p(difference.p)}.",
        ]
    lines += [
        "",
        "A value is the best of a search's complete trials on the validation split. It is too good"
        " as an estimate, and more so the more trials are complete. Brackets: 95 % intervals over"
        " the seeds.",
        "",
        "![best value over the training steps spent](comparison.png)",
    ]
    return "\n".join(lines) + "\n"


def _join(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))
