"""Compares runs on the same images: paired intervals, McNemar's test, equivalence within a margin.

rows = compare_on_images(["runs/plain", "runs/mixup"], split="test", margin=0.5)
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from flax_cnns.analysis import statistics
from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.evaluation.uncertainty import Ends, PairedCounts
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import Classifier, make_classifier_from_run, predict_split
from flax_cnns.runs.same_images import check_same_images, describe_split

MARGIN_LEVEL = 0.9  # two one-sided tests at alpha = 0.05


class ComparedRun(NamedTuple):
    """One run on the images, against the first run. Accuracies are in 0..1."""

    name: str
    model: str
    examples: int
    accuracy: float
    interval: Ends
    # The following are None for the first run.
    pairs: PairedCounts | None = None
    difference: Ends | None = None  # interval of accuracy - the first run's accuracy
    p: float = math.nan  # McNemar's test
    p_holm: float = math.nan  # corrected for the number of runs that are compared
    verdict: str = ""  # of `judge_margin`; "" without a margin


def compare_on_images(
    runs: Sequence[str | os.PathLike],
    *,
    split: str = "test",
    margin: float | None = None,
    accept_changed_data: bool = False,
    trust: bool = False,
) -> list[ComparedRun]:
    """Predicts a split with each run and compares the others with the first run.

    `runs`: RUN, RUN@best, RUN@latest or RUN@STEP, at least two. Networks and image sizes may
    differ. `margin`: the largest irrelevant difference, in points. For multilabel data an image is
    right if all its labels are.

    Raises UserError if the runs have other data, other classes or other labels, and as
    `make_classifier_from_run` does.
    """
    if len(runs) < 2:
        raise UserError("--split compares runs on the same images: expected two or more runs")
    if margin is not None:
        statistics.check_margin(margin)
    classifiers = [
        make_classifier_from_run(run, accept_changed_data=accept_changed_data, trust=trust)
        for run in runs
    ]
    for other in classifiers[1:]:
        _check_same_data(classifiers[0], other, split)
    names = _name_runs(classifiers)
    rows: list[ComparedRun] = []
    first: Predictions | None = None
    for name, classifier in zip(names, classifiers):
        predictions = predict_split(classifier, split)
        if first is not None and not np.array_equal(first.labels, predictions.labels):
            raise UserError(
                f"{names[0]} and {name} have other labels on the {split} split, so they did not"
                " see the same images; runs that cut their own validation or test split need the"
                " same data.* fields"
            )
        rows.append(_compare_with(first, predictions, name, classifier, margin))
        first = predictions if first is None else first
    corrected = statistics.holm([row.p for row in rows])
    return [row._replace(p_holm=p) for row, p in zip(rows, corrected)]


def _compare_with(
    first: Predictions | None,
    predictions: Predictions,
    name: str,
    classifier: Classifier,
    margin: float | None,
) -> ComparedRun:
    right = uncertainty.find_correct(predictions)
    row = ComparedRun(
        name,
        type(classifier.model).__name__
        if classifier.run is None
        else classifier.run.components.config.model.name,
        len(right),
        float(right.mean()),
        uncertainty.wilson_interval(int(right.sum()), len(right)),
    )
    if first is None:
        return row
    pairs = uncertainty.count_pairs(uncertainty.find_correct(first), right)
    verdict = ""
    if margin is not None:
        low, high = uncertainty.difference_interval(pairs, level=MARGIN_LEVEL)
        verdict = statistics.judge_margin(100 * low, 100 * high, margin)
    return row._replace(
        pairs=pairs,
        difference=uncertainty.difference_interval(pairs),
        p=uncertainty.mcnemar(pairs),
        verdict=verdict,
    )


def _check_same_data(first: Classifier, other: Classifier, split: str) -> None:
    """Raises UserError if two runs do not evaluate the same images with the same classes. Heads may
    differ: a network may have more logits than the data have classes."""
    facts = []
    for each in (first, other):
        assert each.dataset is not None
        width = len(each.dataset.class_names)
        facts.append(describe_split(each.name, each.dataset, split, width))
    one, two = facts
    if one.dataset != two.dataset:
        raise UserError(
            f"{two.name} has the data set {two.dataset}, {one.name} has {one.dataset}: --split"
            " compares runs on the same images"
        )
    check_same_images(one, two)


def _name_runs(classifiers: Sequence[Classifier]) -> list[str]:
    """Names runs by their folders without what all paths share, and by the step if it is needed."""
    known = [classifier.run for classifier in classifiers]
    folders = [run.folder.resolve() for run in known if run is not None]
    shared = os.path.commonpath([folder.parent for folder in folders])
    names = [os.path.relpath(folder, shared) for folder in folders]
    return [
        f"{name}@{run.step}" if names.count(name) > 1 and run is not None else name
        for name, run in zip(names, known)
    ]


def make_image_table(rows: Sequence[ComparedRun], split: str, margin: float | None) -> Table:
    """Returns the table that `compare` prints. Differences are in points."""
    table = Table(title=f"{split}: {rows[0].examples:,} images, all runs on the same")
    columns = ["run", "model", "accuracy, %", "difference, points", "right alone", "p"]
    columns += ["p Holm"] if len(rows) > 2 else []
    columns += [f"margin {margin:g}"] if margin is not None else []
    for column in columns:
        left = column in ("run", "model") or column.startswith("margin")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        cells = [row.name, row.model, _format_interval(row.accuracy, row.interval)]
        if row.pairs is None or row.difference is None:
            cells += ["the first run", *["-"] * (len(columns) - 4)]
        else:
            cells.append(_format_interval(row.pairs.difference, row.difference, "+"))
            cells.append(f"{row.pairs.only_second} : {row.pairs.only_first}")
            cells.append(statistics.format_p(row.p))
            cells += [statistics.format_p(row.p_holm)] if len(rows) > 2 else []
            cells += [row.verdict] if margin is not None else []
        table.add_row(*cells)
    return table


def explain_image_table(rows: Sequence[ComparedRun], margin: float | None) -> str:
    """Returns the note below the table: how to read it."""
    text = (
        "Brackets: 95 % intervals over images, not over seeds. Differences are paired by image."
        " right alone: images that only this run, and that only the first run classifies correctly."
        " p: McNemar's test"
    )
    text += ", p Holm: corrected for the number of tests." if len(rows) > 2 else "."
    if margin is None:
        return text
    return (
        f"{text} margin: by the 90 % interval of the difference (two one-sided tests at 5 % each,"
        f" not corrected for several runs): equivalent: within ±{margin:g} points; not worse: above"
        f" -{margin:g}; worse: below -{margin:g}; undecided: the images are too few."
    )


def _format_interval(value: float, ends: Ends, sign: str = "") -> str:
    mean, low, high = (f"{round(100 * each, 2) + 0.0:{sign}.2f}" for each in (value, *ends))
    return f"{mean} [{low}, {high}]"


def split_folders(runs: Sequence[str | os.PathLike]) -> list[os.PathLike]:
    """Returns the folders of RUN, RUN@best, RUN@latest or RUN@STEP."""
    return [workdirs.split_checkpoint(run, "")[0] for run in runs]
