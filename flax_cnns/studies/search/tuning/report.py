"""Writes the report of a search: report.md, trials.csv and pictures.

Everything is computed anew from the folders of the search's stages, without training.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax_cnns.config.spaces import format_value
from flax_cnns.errors import UserError
from flax_cnns.evaluation.uncertainty import wilson_interval
from flax_cnns.files import write_text
from flax_cnns.names import escape_unprintable
from flax_cnns.studies.search.tuning import narrowing, pictures
from flax_cnns.studies.search.tuning.importance import (
    CHANCE_LEVEL,
    MIN_TRIALS,
    SHUFFLES,
    ImportanceTable,
    compute_importance,
)
from flax_cnns.studies.search.tuning.search_record import (
    RankedTrial,
    SearchRecord,
    read_search,
)
from flax_cnns.studies.search.tuning.winner import (
    RETRAINING_FOLDER,
    WINNER_FILE,
    list_changes,
    summarize_retraining,
    write_winner,
)
from flax_cnns.train.progress import format_duration

MAX_BEST = 10  # trials in the table of the best
EDGE = 0.05  # a best value this near to an end, of the range's width, suggests a wider range


def write(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes the report of a search into its folder, and winner.py if a trial is complete.

    Returns the paths. Raises UserError if there is no search, or if no trial has ended.
    """
    folder = pathlib.Path(folder)
    search = read_search(folder)
    if not any(stage.trials for stage in search.stages):
        raise UserError(f"{folder}: no trial has ended, so there is nothing to report")
    importance = [
        compute_importance(stage.space, stage.scored, maximize=search.maximize)
        for stage in search.stages
    ]
    paths = [folder / "report.md", folder / "trials.csv"]
    drawn = pictures.draw_all(search, importance, folder)
    write_text(paths[1], escape_unprintable(_format_csv(search)))
    if best := search.best:
        paths.append(write_winner(search.given, search.winner, _make_title(search, best), folder))
    text = _format_markdown(search, importance, [path.name for path in drawn])
    write_text(paths[0], escape_unprintable(text))
    return [*paths, *drawn]


def _make_title(search: SearchRecord, best: RankedTrial) -> str:
    value = search.metric.format(best.value) + search.metric.unit.removeprefix(",")
    score = f"{search.metric_label} {value}"
    return f"The winner of the search in {search.folder.resolve().name}: {best.name}, {score}."


# ---------------------------------------------------------------------------- trials.csv


def _format_csv(search: SearchRecord) -> str:
    """Formats trials.csv: a line per trial; values in the metric's own unit, from 0 to 1 for an
    accuracy; drawn values as JSON if they are not numbers or strings; empty if not drawn."""
    text = io.StringIO()
    paths = list(search.stages[0].space)
    columns = ["stage", "trial", "state", "value", "steps", "seconds", *paths, "error"]
    out = csv.DictWriter(text, columns, lineterminator="\n")
    out.writeheader()
    for trial in search.trials:
        line: dict[str, Any] = {"stage": trial.stage, "trial": trial.number, "state": trial.state}
        line |= {"value": trial.value, "steps": trial.steps, "error": trial.error}
        line |= {"seconds": None if trial.seconds is None else round(trial.seconds, 3)}
        line |= {path: _as_cell(value) for path, value in trial.drawn.items()}
        out.writerow({k: "" if v is None or v != v else v for k, v in line.items()})
    return text.getvalue()


def _as_cell(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) else json.dumps(value)


# ---------------------------------------------------------------------------- report.md


def _format_markdown(
    search: SearchRecord, importance: Sequence[ImportanceTable | None], drawn: Sequence[str]
) -> str:
    lines = [f"# Search: {search.folder.resolve().name}", "", *_describe_search(search)]
    lines += ["", "## Best trials", "", *_make_best_table(search)]
    if search.best:
        lines += ["", "## Winner", "", *_describe_winner(search, search.best)]
        lines += _describe_retraining(search)
    lines += ["", "## History", "", "![values of the trials](history.png)"]
    lines += ["", "## Importance of the fields", "", *_describe_importance(search, importance)]
    lines += ["", "## Fields and values", "", "![values over each field](slices.png)", ""]
    lines += ["![parallel coordinates](parallel.png)"]
    lines += ["", "## What was searched", "", *_make_space_table(search)]
    if failed := [trial for trial in search.trials if trial.state == "failed"]:
        lines += ["", "## Failed trials", ""]
        lines += [f"- {trial.name}: {trial.error or 'no reason recorded'}" for trial in failed]
    lines += ["", "## What this report does not say", "", *_list_limits(search)]
    return "\n".join(lines) + "\n"


def _describe_search(search: SearchRecord) -> list[str]:
    lines = []
    for stage in search.stages:
        counts = ", ".join(
            f"{n} {state}"
            for state in ("complete", "pruned", "failed", "running")
            if (n := sum(trial.state == state for trial in stage.trials))
        )
        steps = sum(trial.steps for trial in stage.trials)
        seconds = sum(trial.seconds or 0.0 for trial in stage.trials)
        name = f"- Stage {stage.number}: " if len(search.stages) > 1 else ""
        trials = f"{len(stage.trials)} trial{'s' if len(stage.trials) > 1 else ''}"
        lines.append(
            f"{name}{trials} ({counts}); sampler {stage.sampler}, pruner {stage.pruner}, seed"
            f" {stage.seed}; {steps:,} training steps; {format_duration(seconds)} from the starts"
            " to the ends of the trials, pauses included."
        )
    direction = "more is better" if search.maximize else "less is better"
    lines += [
        "",
        f"A trial's value is its {search.metric_label} ({direction}). No trial is tested.",
    ]
    return lines


def _make_best_table(search: SearchRecord) -> list[str]:
    """Returns a table of the best trials, with the given config's values in its first row."""
    ranked = search.ranked[:MAX_BEST]
    if not ranked:
        return ["No trial is complete."]
    paths = list(search.stages[0].space)
    heading = f"{search.metric_label}{search.metric.unit}"
    columns = ["trial", heading, "steps", *(f"`{path}`" for path in paths)]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    given = [_format_drawn(search.given_values, path) for path in paths]
    lines.append("| " + " | ".join(["given config", "", "", *given]) + " |")
    for trial in ranked:
        drawn = [_format_drawn(trial.drawn, path) for path in paths]
        cells = [trial.name, search.metric.format(trial.value), f"{trial.steps:,}", *drawn]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _format_drawn(drawn: Mapping[str, Any], path: str) -> str:
    """Formats the drawn value of a field for a table; "-" if it was not drawn."""
    return format_value(drawn[path]) if path in drawn else "-"


def _describe_winner(search: SearchRecord, best: RankedTrial) -> list[str]:
    changes = list_changes(search.given, search.winner)
    lines = [
        f"{best.name[0].upper()}{best.name[1:]}. `{WINNER_FILE}` is its config as a file:",
        "",
        f"    flax-cnns train --config={search.folder / WINNER_FILE} --workdir=runs/winner",
        "",
        "Its differences from the given config:" if changes else "It equals the given config.",
    ]
    lines += [""] if changes else []
    for change in changes:
        given, winner = map(format_value, (change.given, change.winner))
        lines.append(f"- `{change.path}`: {given} → {winner}")
    if edges := _find_edges(search, best):
        lines += ["", f"At the edge of its range: {'; '.join(edges)}. A wider range may be better."]
    if note := _compare_with_noise(search, best):
        lines += ["", note]
    return lines


def _find_edges(search: SearchRecord, best: RankedTrial) -> list[str]:
    """Returns the fields whose best value is near an end of the first stage's range."""
    edges = []
    for axis in pictures.make_axes(search.stages[0].space):
        if axis.categories or axis.name not in best.drawn:
            continue
        height = axis.scale(best.drawn[axis.name])
        if not EDGE < height < 1 - EDGE:
            end = axis.low if height < 0.5 else axis.high
            value = format_value(best.drawn[axis.name])
            edges.append(f"`{axis.name}` = {value}, and the range ends at {end:g}")
    return edges


def _compare_with_noise(search: SearchRecord, best: RankedTrial) -> str:
    """Returns a sentence: how many trials the validation images cannot tell from the best."""
    if not search.metric.is_fraction or not (images := search.count_validation_images()):
        return ""
    low, high = wilson_interval(best.value * images, images)
    near = sum(trial.value >= low for trial in search.ranked)
    form = search.metric.format
    interval = (
        f"95 % Wilson interval of its {search.metric.name} on {images:,} validation images:"
        f" {form(low)} to {form(high)} %."
    )
    if near == 1:
        return f"{interval} No other complete trial lies in it."
    return (
        f"{interval} This interval contains {near} of the {len(search.ranked)} complete trials, so"
        " these images hardly tell them apart."
    )


def _describe_retraining(search: SearchRecord) -> list[str]:
    summary = summarize_retraining(search.folder, search.metric.name, maximize=search.maximize)
    heading = ["", "## Winner, retrained and tested", ""]
    if summary is None:
        return [
            *heading,
            "Not done yet. The same command with `--seeds=5` trains the given config and the winner"
            " with 5 seeds each, and tests each run once.",
        ]
    return [*heading, *summary, "", f"See [its report]({RETRAINING_FOLDER}/report.md)."]


def _describe_importance(
    search: SearchRecord, importance: Sequence[ImportanceTable | None]
) -> list[str]:
    lines: list[str] = []
    for stage, table in zip(search.stages, importance):
        name = f"Stage {stage.number}: " if len(search.stages) > 1 else ""
        if table is None:
            reason = f"fewer than {MIN_TRIALS} complete trials, or all of one value"
            lines += [*([""] if lines else []), f"{name}Not computed ({reason})."]
            continue
        picture = pictures.name_importance(stage.number)
        lines += [
            *([""] if lines else []),
            f"{name}Share of each field in the importance to be among the best {table.targets} of"
            f" {table.trials} complete trials (PED-ANOVA, Watanabe et al. 2023, by Optuna).",
            "",
            "| field | share, % | chance, % |",
            "|---|---:|---:|",
            *(
                f"| `{row.path}` | {'**' * row.is_above_chance}{100 * row.share:.0f}"
                f"{'**' * row.is_above_chance} | {_format_chance(row.chance)} |"
                for row in table.rows
            ),
            "",
            f"![importance of the fields]({picture})",
        ]
    if any(importance):
        lines += [
            "",
            "Chance: with the values shuffled among the trials,"
            f" {100 * CHANCE_LEVEL:.0f} % of {SHUFFLES} shuffles stay below this. A bold share is"
            " above it. A share says how much the best trials differ from all trials in this field,"
            " within this space and by itself: it says nothing about other ranges, effects of two"
            " fields together, or which value is good. TPE and pruning bias it, because they draw"
            " more values near the best.",
        ]
    return lines


def _format_chance(chance: float) -> str:
    return f"{100 * chance:.0f}" if chance <= 1 else ">100"


def _make_space_table(search: SearchRecord) -> list[str]:
    several = len(search.stages) > 1
    columns = ["field", *([f"stage {s.number}" for s in search.stages] if several else ["values"])]
    columns += ["drawn if", "given"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for path, each in search.stages[0].space.items():
        cells = [f"`{path}`"]
        for stage in search.stages:
            if path in stage.space:
                cells.append(format_distribution(stage.space[path]))
            else:
                cells.append(_format_drawn(stage.fixed, path))
        conditions = [
            f"`{name}` is {' or '.join(map(format_value, options))}"
            for name, options in each.get("when", {}).items()
        ]
        cells += [", ".join(conditions), _format_drawn(search.given_values, path)]
        lines.append("| " + " | ".join(cells) + " |")
    for stage in search.stages[1:]:
        numbers = ", ".join(map(str, stage.basis))
        lines += [
            "",
            f"Stage {stage.number} is made of stage {stage.number - 1}'s best trials: {numbers}."
            " These are a tenth of those that completed or were pruned, but at least"
            f" {narrowing.MIN_BEST}. A range is the range of their values, wider by"
            f" {100 * narrowing.MARGIN:.0f} % of the old width on each side, within the old range."
            " A choice keeps the values that they drew.",
        ]
    return lines


def format_distribution(each: dict[str, Any]) -> str:
    """Formats a distribution, as `describe_space` gives it: "0.001 to 1, log", "sgd, adam"."""
    if each["kind"] == "choice":
        return ", ".join(map(format_value, each["values"]))
    kind = " integer" if each["kind"] == "integer" else ""
    return f"{each['low']:.4g} to {each['high']:.4g}{kind}{', log' if each['log'] else ''}"


def _list_limits(search: SearchRecord) -> list[str]:
    lines = []
    if search.best:
        lines.append(
            "- The best value is the highest of many noisy ones, so it is too good: the same config"
            " with another seed is likely worse. Only the retraining compares fairly."
            if search.maximize
            else "- The best value is the lowest of many noisy ones, so it is too good: the same"
            " config with another seed is likely worse. Only the retraining compares fairly."
        )
    lines += [
        "- The given config is not a trial. Only the retraining says if the winner is better.",
        "- Every trial has one seed and one validation split. A small difference may be either.",
        "- The result holds for this network, this data and this length of training; the best"
        " learning rate of a short training is often not that of a long one.",
        "- A value outside the ranges was not tried.",
    ]
    if any(stage.pruner != "none" for stage in search.stages):
        lines.append(
            "- Pruned trials ended early by their value until then. A config that learns slowly but"
            " ends well is pruned too."
        )
    return lines
