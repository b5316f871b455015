"""Evaluates a run on a split, with the variables of one of its checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flax_cnns import files
from flax_cnns.analysis.plots import confusion as confusion_plot
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.exact import per_class_metrics
from flax_cnns.evaluation.predictions import Predictions, measure
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import Classifier, make_classifier_from_run, predict_split
from flax_cnns.runs.crops import CropOptions, predict_crops
from flax_cnns.runs.error_page import check_error_page, write_errors
from flax_cnns.runtime import output


@output.safe()
def evaluate_run(
    workdir: str | os.PathLike,
    *,
    split: str = "test",
    checkpoint: str = "",
    accept_changed_data: bool = False,
    trust: bool = False,
    errors: int = 0,
    crops: CropOptions | None = None,
) -> dict[str, Any]:
    """Evaluates a run on a split and prints tables, with 95 % intervals (`evaluation.uncertainty`).

    Writes `evaluation_SPLIT_STEP.json` and `.png` into the run's directory and returns the content
    of the JSON file. A run on multilabel data has no classes and no confusion matrix, and gets no
    picture.

    `workdir`: RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    RUN alone means the checkpoint that was tested for `summary.json`, or the latest checkpoint of
    an unfinished run. `trust` allows importing the code of the run's own parts. With
    `accept_changed_data` changed data are evaluated, and both fingerprints go into the file.

    `errors`: how many of the worst mistakes go into the page `errors_SPLIT_STEP.html`; 0 writes
    none. `crops`: the crops of each image whose probabilities are averaged (`runs.crops`).
    None is the plain evaluation. The name of the crops is part of the files' names, and the file
    has the entry "protocol".

    Raises UserError if the run, the split or the checkpoint does not exist, if the data changed
    since the run began, or if the run has own parts and is not trusted.
    """
    classifier = make_classifier_from_run(
        workdir,
        checkpoint,
        accept_changed_data=accept_changed_data,
        trust=trust,
        from_files=crops is not None,
    )
    run = classifier.run
    assert run is not None
    dataset, workdir = run.components.dataset, run.folder
    if errors:
        check_error_page(classifier.task, errors)
    protocol = None if crops is None else crops.make(classifier)
    if protocol is None:
        predictions = predict_split(classifier, split)
    else:
        predictions = predict_crops(classifier, protocol, split)
    confusion = count_confusion(predictions) if predictions.task == "classes" else None
    results: dict[str, Any] = {
        "split": split,
        "step": run.step,
        "checkpoint": run.checkpoint,
        "examples": len(predictions.logits),
        **({} if protocol is None else {"protocol": protocol.as_dict()}),
        **measure_predictions(classifier, predictions),
        **({"changed_data": run.changed_data} if run.changed_data else {}),
    }
    if jax.process_index() > 0:
        return results
    if not run.changed_data:
        workdirs.add_fingerprint(workdir, dataset.as_dict())
    suffix = "" if protocol is None else f"_{protocol.name}"
    name = f"evaluation_{split}_{run.step}{suffix}"
    files.write_json(workdir / f"{name}.json", results)
    written = f"{name}.json"
    if confusion is not None:
        confusion_plot.draw_confusion(confusion, classifier.class_names, workdir / f"{name}.png")
        written += f", {name}.png"
    if errors:
        page = workdir / f"errors_{split}_{run.step}{suffix}.html"
        how = "" if protocol is None else protocol.name
        description = write_errors(classifier, predictions, split, page, count=errors, protocol=how)
        written += f", {description}"
    tables.print_evaluation(results)
    print(f"written to {workdir}: {written}")
    return results


def measure_predictions(classifier: Classifier, predictions: Predictions) -> dict[str, Any]:
    """Returns the metrics of predictions by name, and "intervals": {metric: [low, high]}.

    With one class per image also "classes", a dict for each class, and "confusion" [K K]: rows are
    true classes. A run's own loss and metrics are used.
    """
    own: dict[str, Any] = {}
    if classifier.run:
        parts = classifier.run.components.own_parts
        own = dict(loss=parts.loss, own_metrics=parts.metrics)
    found: dict[str, Any] = dict(measure(predictions, **own))
    intervals = uncertainty.measure_intervals(predictions, **own)
    found["intervals"] = {name: list(ends) for name, ends in intervals.items()}
    if predictions.task == "classes":
        found |= describe_classes(count_confusion(predictions), classifier.class_names)
    return found


def count_confusion(predictions: Predictions) -> np.ndarray:
    """Returns the confusion matrix i64 [K K]: rows are true classes, columns predicted ones."""
    width = predictions.logits.shape[-1]
    counts = np.zeros((width, width), np.int64)
    np.add.at(counts, (predictions.classes, np.argmax(predictions.logits, -1)), 1)
    return counts


def describe_classes(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the entries "classes" and "confusion" of an evaluation's file, from counts [K K].

    A class has the keys class, examples, accuracy (recall) and precision, and Wilson's intervals of
    these: accuracy_interval and precision_interval. Without examples or predictions they are None.
    """
    classes = per_class_metrics(confusion)
    predicted = confusion.sum(0)
    rows = []
    for k, name in enumerate(class_names):
        hits, n = int(confusion[k, k]), int(classes["count"][k])
        rows.append(
            {
                "class": name,
                "examples": n,
                "accuracy": _or_none(classes["recall"][k]),
                "accuracy_interval": _wilson(hits, n),
                "precision": _or_none(classes["precision"][k]),
                "precision_interval": _wilson(hits, int(predicted[k])),
            }
        )
    return {"classes": rows, "confusion": confusion.astype(int).tolist()}


def _wilson(hits: int, trials: int) -> list[float] | None:
    return list(uncertainty.wilson_interval(hits, trials)) if trials else None


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
