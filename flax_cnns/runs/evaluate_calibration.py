"""Evaluates the calibration of a run, before and after its temperature is fitted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
from rich.table import Table

from flax_cnns import files
from flax_cnns.analysis.plots import reliability
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation import calibration
from flax_cnns.evaluation.calibration import CalibrationComparison, Scores
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.evaluation.temperature import apply_temperature, fit_temperature
from flax_cnns.names import make_console
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import Classifier, make_classifier_from_run, predict_split
from flax_cnns.runs.evaluate import measure_predictions
from flax_cnns.runs.temperature import FILE
from flax_cnns.runtime import output

# metric: (its name in the table, whether it is shown in percent)
ROWS = {
    "ece": ("ECE, %", True),
    "adaptive_ece": ("adaptive ECE, %", True),
    "brier": ("Brier score", False),
    "nll": ("NLL, nats", False),
    "aurc": ("AURC, %", True),
    "excess_aurc": ("excess AURC, %", True),
}


@output.safe()
def calibrate_run(
    workdir: str | os.PathLike,
    *,
    split: str = "test",
    checkpoint: str = "",
    bins: int = calibration.BINS,
    accept_changed_data: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Fits a run's temperature on the validation split, evaluates `split` before and after, and
    prints a table.

    Writes into the run's directory: `calibration.json` with the temperature, its step, and the
    metrics of `split` before and after, with bootstrap intervals over the images;
    `evaluation_SPLIT_STEP_calibrated.json` with the metrics after it; `calibration.png`. Returns
    the content of `calibration.json`. On several processes, the first writes.

    `workdir`, `checkpoint`, `accept_changed_data` and `trust` are as in `evaluate_run`. `bins`: the
    number of bins of ECE and adaptive ECE. Raises UserError as `evaluate_run`, as
    `fit_classifier_temperature`, and if `split` has fewer images than `bins`.
    """
    classifier = make_classifier_from_run(
        workdir, checkpoint, accept_changed_data=accept_changed_data, trust=trust
    )
    run, dataset = classifier.run, classifier.dataset
    assert run is not None
    assert dataset is not None
    if split not in dataset.splits:
        raise UserError(
            f"--split: {dataset.name} has no split {split!r}{did_you_mean(split, dataset.splits)}"
        )
    temperature, fitted = fit_classifier_temperature(classifier)
    predictions = fitted if split == "validation" else predict_split(classifier, split)
    before = calibration.score_predictions(predictions)
    after = calibration.score_predictions(predictions, temperature)
    try:
        found = calibration.compare_scores(
            [before, after], bins=bins, resamples=calibration.RESAMPLES
        )
    except UserError as error:
        raise UserError(f"{run.folder}, {split}: {error}") from None
    changed = {"changed_data": run.changed_data} if run.changed_data else {}
    images = len(predictions.logits)
    content = {
        "temperature": temperature,
        "step": run.step,
        "checkpoint": run.checkpoint,
        "fitted": {"split": "validation", "examples": len(fitted.logits)},
        "split": split,
        "examples": images,
        "bins": bins,
        "before": {**found.metrics[0], "intervals": found.intervals[0]},
        "after": {**found.metrics[1], "intervals": found.intervals[1]},
        "change": {"intervals": found.change},
        **changed,
    }
    if jax.process_index() > 0:
        return content
    measured = measure_predictions(classifier, apply_temperature(predictions, temperature))
    evaluation = {
        "split": split,
        "step": run.step,
        "checkpoint": run.checkpoint,
        "examples": images,
        # A user's own metric keeps its name, as in the other evaluations.
        **found.metrics[1],
        **measured,
        "intervals": {**found.intervals[1], **measured["intervals"]},
        "protocol": {"temperature": temperature, "bins": bins},
        **changed,
    }
    name = f"evaluation_{split}_{run.step}_calibrated.json"
    files.write_json(run.folder / FILE, content)
    files.write_json(run.folder / name, evaluation)
    if not run.changed_data:
        workdirs.add_fingerprint(run.folder, dataset.as_dict())
    panels = [
        _make_panel("before", before, bins),
        _make_panel(f"after, T = {temperature:.3f}", after, bins),
    ]
    title = f"{classifier.title}; {split}, {images:,} images"
    reliability.draw_reliability(panels, run.folder / "calibration.png", title)
    print_calibration(title, content, found)
    print(f"written to {run.folder}: {FILE}, calibration.png, {name}")
    return content


def fit_classifier_temperature(
    classifier: Classifier, split: str = "validation"
) -> tuple[float, Predictions]:
    """Returns (the temperature of least NLL, the predictions that it was fitted on).

    The images are those of `validation`. Raises UserError for another split, for published weights,
    for a run without a validation split, for multilabel data, and as `fit_temperature`.
    """
    if classifier.run is None or classifier.dataset is None:
        raise UserError(
            f"{classifier.title}: published weights have no validation split of their own, on which"
            " a temperature is fitted; fine-tune or evaluate them as a run (docs/transfer.md)"
        )
    folder = classifier.run.folder
    if split != "validation":
        reason = {
            "test": "a temperature that is chosen on the test images makes their metrics too good",
            "train": "the network is surer of the images that it was trained on than of others",
        }.get(split, "the other splits have other uses")
        raise UserError(
            f"{folder}: a temperature is fitted on the validation split, not on {split}: {reason}"
        )
    if "validation" not in classifier.dataset.splits:
        raise UserError(
            f"{folder}: the run has no validation split, on which a temperature is fitted; train it"
            " with one: --config.data.validation=0.1 takes a tenth of the training images"
        )
    if classifier.task != "classes":
        raise UserError(
            f"{folder}: a run on {classifier.task} data predicts no single class, so it has no"
            " temperature; expected a run on data with one class per image"
        )
    predictions = predict_split(classifier, split)
    try:
        return fit_temperature(predictions), predictions
    except UserError as error:
        raise UserError(f"{folder}, step {classifier.run.step}, {split}: {error}") from None


def _make_panel(name: str, scores: Scores, bins: int) -> reliability.ReliabilityPanel:
    curve = calibration.find_risk_coverage(scores)
    return reliability.ReliabilityPanel(
        name, *calibration.bin_by_width(scores, bins), curve.coverage, curve.risk
    )


def print_calibration(title: str, content: Mapping[str, Any], found: CalibrationComparison) -> None:
    """Prints the temperature, and the metrics before and after it with their intervals."""
    table = Table()
    table.add_column("metric")
    for column in ("before", "after", "after - before"):
        table.add_column(column, justify="right")
    for name, (shown, is_percent) in ROWS.items():
        factor, form = (100, ".2f") if is_percent else (1, ".4f")
        cells = [
            _format(metrics[name], intervals[name], factor, form)
            for metrics, intervals in zip(found.metrics, found.intervals)
        ]
        change = found.metrics[1][name] - found.metrics[0][name]
        table.add_row(shown, *cells, _format(change, found.change[name], factor, f"+{form}"))
    console = make_console(width=max(110, make_console().width))
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
    fitted = content["fitted"]
    same = "; these are the same images" if content["split"] == fitted["split"] else ""
    print(
        f"temperature {content['temperature']:.4f}, fitted on {fitted['examples']:,} validation"
        f" images{same}. Brackets: 95 % bootstrap intervals over the images."
    )


def _format(value: float, interval: tuple[float, float], factor: int, form: str) -> str:
    low, high = (format(factor * end, form) for end in interval)
    return f"{factor * value:{form}} [{low}, {high}]"
