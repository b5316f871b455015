"""Evaluates the average of several runs' predictions, and tables of models by crops.

evaluate_ensemble(["runs/a", "runs/b", "runs/c@best"])
evaluate_grid(["runs/a", "runs/b", "runs/c"], crops=["1", "10"])
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from flax_cnns import files
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.crops import CropProtocol
from flax_cnns.evaluation.ensembles import Ensemble, PairedDifference, compare_accuracy
from flax_cnns.names import make_console
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.crops import CropOptions
from flax_cnns.runs.evaluate import measure_predictions
from flax_cnns.runs.members import (
    PLAIN,
    PredictedRun,
    RunOptions,
    check_members,
    choose_crops,
    choose_file,
    choose_members_file,
    predict_run,
)
from flax_cnns.runs.prediction_cache import PredictionCache
from flax_cnns.runtime import output

_NOTE = (
    "brackets: 95 % intervals over the images of the split, not over seeds; differences are paired"
    " by image; p: McNemar's test"
)


# ---------------------------------------------------------------------------- one ensemble


@output.safe()
def evaluate_ensemble(
    runs: Sequence[str | os.PathLike],
    *,
    split: str = "test",
    crops: CropOptions | None = None,
    average: str = "probabilities",
    accept_changed_data: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluates the average of the runs' predictions, and prints it beside each run.

    `runs`: RUN, RUN@best, RUN@latest or RUN@STEP, also several checkpoints of one run. Networks and
    image sizes may differ, and each run reads the images in its own way. `crops`: the crops of each
    image; None is each run's own evaluation. `average`: "probabilities" or "logits"; the
    probabilities of several crops are averaged in any case. The first run's loss and metrics are
    used.

    Writes `evaluation_SPLIT_STEP_ensembleN.json` into the first run's directory and returns its
    content; a file about other members is kept, and the name gets `_2`. "protocol" has the members,
    and "difference" compares with the best member on these images. Raises UserError, also if the
    runs have other classes or other images.
    """
    names = [os.fspath(run) for run in runs]
    check_members(names, 2, "--ensemble")
    options = RunOptions(split, accept_changed_data, trust)
    cache = PredictionCache(workdirs.split_checkpoint(names[0])[0])
    ensemble, clock = Ensemble(average), _Clock(len(names))
    members: list[PredictedRun] = []
    for name in names:
        first = members[0].facts if members else None
        found = predict_run(name, [crops], options, cache, first)
        ensemble.add(name, found.predictions[0])
        clock.report(f"{found.classifier.title}", sum(found.seconds))
        members.append(found._replace(predictions=[]))
    [protocol] = members[0].protocols
    results = _describe_ensemble(ensemble, members, split, protocol, average)
    if jax.process_index() > 0:
        return results
    parts = [protocol.name] if protocol else []
    parts += [f"ensemble{len(names)}", *(["logits"] if average == "logits" else [])]
    folder = cache.folder.parent
    stem = f"evaluation_{split}_{members[0].step}_{'_'.join(parts)}"
    path = choose_members_file(folder, stem, results["protocol"]["members"])
    files.write_json(path, results)
    _print_ensemble(ensemble, members, results)
    print(f"written to {folder}: {path.name}")
    return results


def _describe_ensemble(
    ensemble: Ensemble,
    members: Sequence[PredictedRun],
    split: str,
    protocol: CropProtocol | None,
    average: str,
) -> dict[str, Any]:
    """Returns the content of the file."""
    predictions, run = ensemble.predictions, members[0].classifier.run
    assert run is not None
    rows = [
        {**found.describe(), "accuracy": member.accuracy, "interval": list(member.interval)}
        for found, member in zip(members, ensemble.members)
    ]
    ours = uncertainty.find_correct(predictions)
    changed = run.changed_data
    return {
        "split": split,
        "step": run.step,
        "checkpoint": run.checkpoint,
        "examples": len(predictions.logits),
        **measure_predictions(members[0].classifier, predictions),
        "difference": describe_difference(
            compare_accuracy(ours, ensemble.best.correct), ensemble.best.name
        ),
        "protocol": {
            **(protocol.as_dict() if protocol else {}),
            "members": rows,
            **({"average": average} if average != "probabilities" else {}),
        },
        **({"changed_data": changed} if changed else {}),
    }


def describe_difference(difference: PairedDifference, base: str) -> dict[str, Any]:
    """Returns the entry "difference" of an evaluation's file: of accuracies in 0..1."""
    return {
        "to": base,
        "accuracy": difference.difference,
        "interval": list(difference.interval),
        "p": difference.p,
    }


def format_points(difference: float, ends: uncertainty.Ends) -> str:
    """Formats a difference of accuracies in points with its interval: "+0.52 [+0.11, +0.93]"."""
    values = (round(100 * value, 2) + 0.0 for value in (difference, *ends))
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*values)


def _print_ensemble(
    ensemble: Ensemble, members: Sequence[PredictedRun], results: dict[str, Any]
) -> None:
    console = make_console(width=max(tables.MIN_WIDTH, make_console().width))
    count = len(members)
    table = Table(title=f"{results['split']}: {results['examples']:,} images")
    for column in ("run", "network", "step", "accuracy"):
        table.add_column(column, justify="left" if column in ("run", "network") else "right")
    for found, member in zip(members, ensemble.members):
        text = tables.describe_value(
            "accuracy", member.accuracy, {"accuracy": list(member.interval)}
        )
        table.add_row(member.name, found.describe()["model"], str(found.step), text)
    table.add_section()
    accuracy = float(uncertainty.find_correct(ensemble.predictions).mean())
    ends = results["intervals"].get("accuracy") or results["intervals"].get("subset_accuracy")
    text = tables.describe_value("accuracy", accuracy, {"accuracy": ends})
    table.add_row(f"ensemble of {count}", "", "", text)
    console.print(table)
    shown = {key: value for key, value in results.items() if isinstance(value, int | float)}
    for name, value in shown.items():
        if name not in ("step", "examples"):
            console.print(f"{name} {tables.describe_value(name, value, results['intervals'])}")
    difference = results["difference"]
    console.print(
        f"against the best member, {difference['to']}:"
        f" {format_points(difference['accuracy'], difference['interval'])} points,"
        f" p {difference['p']:.2g}"
    )
    console.print(_NOTE)


class _Clock:
    """Prints a line after each of `total` runs, with the time that is left."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.monotonic()

    def report(self, what: str, seconds: float) -> None:
        self._done += 1
        if jax.process_index() > 0:
            return
        left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        took = f"predicted in {seconds:.0f} s" if seconds else "predictions were kept"
        rest = f"; ETA {left:.0f} s" if self._done < self._total else ""
        print(f"{self._done}/{self._total}: {what}: {took}{rest}")


# ---------------------------------------------------------------------------- models x crops


class GridCell(NamedTuple):
    """The first `models` runs with `crops` crops of each image."""

    models: int
    crops: str
    accuracy: float
    interval: uncertainty.Ends
    top5: float | None  # None: at most 5 classes
    base: PairedDifference | None  # None: this is the base

    @property
    def cost(self) -> int:
        """Evaluations of an image, as in GoogLeNet's table 3."""
        return self.models * int(self.crops)


@output.safe()
def evaluate_grid(
    runs: Sequence[str | os.PathLike],
    crops: Sequence[str] = (PLAIN, "10"),
    *,
    split: str = "test",
    accept_changed_data: bool = False,
    trust: bool = False,
) -> list[GridCell]:
    """Evaluates the first 1, 2, ... runs with each number of crops: table 3 of Szegedy et al. 2015
    (https://arxiv.org/abs/1409.4842).

    Probabilities are averaged over crops and over runs. "1" crop is each run's own evaluation. The
    base is the first run with the first number of crops. Each run predicts once with each number of
    crops. These predictions are kept in the first run's `predictions/`, so a command that was
    stopped goes on.

    Writes `evaluation_SPLIT_STEP_gridN.csv` and `.md` into the first run's directory; a table of
    other runs or crops is kept, and the names get `_2`. Raises UserError, also if the runs have
    other classes or other images.
    """
    names = [os.fspath(run) for run in runs]
    check_members(names, 1, "--ensemble")
    chosen = choose_crops(crops)
    options = RunOptions(split, accept_changed_data, trust)
    cache = PredictionCache(workdirs.split_checkpoint(names[0])[0])
    averages, clock = [Ensemble() for _ in crops], _Clock(len(names))
    cells: list[GridCell] = []
    first: PredictedRun | None = None
    base: np.ndarray | None = None
    for number, name in enumerate(names, 1):
        found = predict_run(name, chosen, options, cache, first.facts if first else None)
        first = found._replace(predictions=[]) if first is None else first
        for crop, ensemble, predictions in zip(crops, averages, found.predictions):
            ensemble.add(name, predictions)
            cell, correct = _measure_cell(ensemble, number, crop, base)
            base = correct if base is None else base
            cells.append(cell)
        clock.report(found.classifier.title, sum(found.seconds))
    assert first is not None
    cells.sort(key=lambda cell: (cell.models, list(crops).index(cell.crops)))
    if jax.process_index() == 0:
        stem = f"evaluation_{split}_{first.step}_grid{len(names)}"
        markdown = make_grid_markdown(cells, names, split, first.facts.images)
        ours = _outline(markdown)
        path = choose_file(
            cache.folder.parent, stem, ".md", lambda path: _outline(path.read_text("utf-8")) == ours
        )
        table = path.with_suffix(".csv")
        files.write_text(table, make_grid_csv(cells))
        files.write_text(path, markdown)
        print(f"\n{markdown}\nwritten to {path.parent}: {table.name}, {path.name}")
        if line := cache.describe():
            print(line)
    return cells


def _measure_cell(
    ensemble: Ensemble, models: int, crops: str, base: np.ndarray | None
) -> tuple[GridCell, np.ndarray]:
    predictions = ensemble.predictions
    correct = uncertainty.find_correct(predictions)
    hits, n = int(correct.sum()), len(correct)
    has_top5 = predictions.task == "classes" and predictions.logits.shape[-1] > 5
    cell = GridCell(
        models,
        crops,
        hits / n,
        uncertainty.wilson_interval(hits, n),
        float(predictions.is_correct(5).mean()) if has_top5 else None,
        None if base is None else compare_accuracy(correct, base),
    )
    return cell, correct


def _outline(markdown: str) -> list[list[str]]:
    """Returns the line that names the runs, and models, crops and cost of each row."""
    first, *lines = markdown.splitlines() or [""]
    return [[first], *(line.split("|")[1:4] for line in lines if line.startswith("| "))]


def make_grid_csv(cells: Sequence[GridCell]) -> str:
    """Returns the table as CSV: accuracies and differences are fractions, not percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["models", "crops", "cost", "accuracy", "accuracy_low", "accuracy_high", "top5"]
    writer.writerow([*columns, "difference", "difference_low", "difference_high", "p"])
    for cell in cells:
        row = [cell.models, cell.crops, cell.cost, cell.accuracy, *cell.interval]
        row.append("" if cell.top5 is None else cell.top5)
        base = cell.base
        row += [""] * 4 if base is None else [base.difference, *base.interval, base.p]
        writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])
    return text.getvalue()


def make_grid_markdown(
    cells: Sequence[GridCell], names: Sequence[str], split: str, examples: int
) -> str:
    """Returns the table as Markdown, with errors in percent as in the paper."""
    has_top5 = cells[0].top5 is not None
    titles = ["models", "crops", "cost", "error, %", *(["top-5 error, %"] if has_top5 else [])]
    titles += ["difference to the base, points", "p"]
    rows = []
    for cell in cells:
        low, high = cell.interval
        ends = f"[{100 * (1 - high):.2f}, {100 * (1 - low):.2f}]"
        row = [str(cell.models), cell.crops, str(cell.cost)]
        row.append(f"{100 * (1 - cell.accuracy):.2f} {ends}")
        row += [f"{100 * (1 - cell.top5):.2f}"] if cell.top5 is not None else []
        if cell.base is None:
            row += ["base", "-"]
        else:
            low, high = cell.base.interval
            row += [format_points(-cell.base.difference, (-high, -low)), f"{cell.base.p:.2g}"]
        rows.append(row)
    members = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    lines = [
        f"{split}: {examples:,} images. Models, in this order: {members}.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "Cost: evaluations of an image. A negative difference is a smaller error. Brackets: 95 %"
        " intervals over the images of the split, not over seeds; differences are paired by image;"
        " p: McNemar's test.",
    ]
    return "\n".join(lines) + "\n"
