"""Evaluates a run on a split, with the variables of one of its checkpoints."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np

from flax_cnns import files
from flax_cnns.analysis.plots import confusion as confusion_plot
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation.exact import per_class_metrics, summarize
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import make_classifier_from_run
from flax_cnns.runs.variables import list_class_names
from flax_cnns.runtime import output


@output.safe()
def evaluate_run(
    workdir: str | os.PathLike,
    *,
    split: str = "test",
    checkpoint: str = "",
    accept_changed_data: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluates a run on a split and prints tables.

    Writes `evaluation_SPLIT_STEP.json` and `.png` into the run's directory and returns the content
    of the JSON file. A run on multilabel data has no classes and no confusion matrix, and gets no
    picture.

    `workdir`: RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    RUN alone means the checkpoint that was tested for `summary.json`, or the latest checkpoint of
    an unfinished run. `trust` allows importing the code of the run's own parts. With
    `accept_changed_data` changed data are evaluated, and both fingerprints go into the file.

    Raises UserError if the run, the split or the checkpoint does not exist, if the data changed
    since the run began, or if the run has own parts and is not trusted.
    """
    classifier = make_classifier_from_run(
        workdir,
        checkpoint,
        accept_changed_data=accept_changed_data,
        trust=trust,
        confusion=True,
    )
    run = classifier.run
    assert run is not None
    dataset, workdir, components = run.components.dataset, run.folder, run.components
    if split not in dataset.splits:
        raise UserError(
            f"--split: {dataset.name} has no split {split!r}{did_you_mean(split, dataset.splits)}"
        )
    sums = components.evaluate(classifier.variables, split)
    confusion = sums.get("confusion")
    results: dict[str, Any] = {
        "split": split,
        "step": run.step,
        "checkpoint": run.checkpoint,
        "examples": int(sums["count"]),
        **summarize(sums),
        **(_describe_classes(confusion, dataset) if confusion is not None else {}),
        **({"changed_data": run.changed_data} if run.changed_data else {}),
    }
    if jax.process_index() > 0:
        return results
    if not run.changed_data:
        workdirs.add_fingerprint(workdir, dataset.as_dict())
    name = f"evaluation_{split}_{run.step}"
    files.write_json(workdir / f"{name}.json", results)
    written = f"{name}.json"
    if confusion is not None:
        names = list_class_names(dataset, len(confusion))
        confusion_plot.draw_confusion(confusion, names, workdir / f"{name}.png")
        written += f", {name}.png"
    tables.print_evaluation(results)
    print(f"written to {workdir}: {written}")
    return results


def _describe_classes(confusion: np.ndarray, dataset: Dataset) -> dict[str, Any]:
    """Returns the entries "classes" and "confusion" of the JSON file, from counts [K K]."""
    classes = per_class_metrics(confusion)
    numbers = zip(classes["count"], classes["recall"], classes["precision"])
    rows = [
        {"class": name, "examples": int(n), "accuracy": _or_none(r), "precision": _or_none(p)}
        for name, (n, r, p) in zip(list_class_names(dataset, len(confusion)), numbers)
    ]
    return {"classes": rows, "confusion": confusion.astype(int).tolist()}


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
