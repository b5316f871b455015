"""The temperature of a run: its fit on the validation split, and its file.

    temperature = load_temperature("runs/digits@best")
    probabilities = jax.nn.softmax(logits / temperature)

`calibration.json` in the run's directory holds the temperature of one checkpoint. The probabilities
of another checkpoint need another temperature, so the file is refused for it.
"""

from __future__ import annotations

import os
import pathlib

from flax_cnns.checkpoint import finding
from flax_cnns.errors import UserError
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.evaluation.temperature import check_temperature, fit_temperature
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import Classifier, predict_split

FILE = "calibration.json"


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


def load_temperature(workdir: str | os.PathLike, checkpoint: str = "") -> float:
    """Returns the temperature of a run's checkpoint, which `evaluate --calibrate` fitted.

    `workdir`: RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    Raises UserError if the run has no temperature, or only that of another step.
    """
    folder, checkpoint = workdirs.split_checkpoint(workdir, checkpoint)
    return read_temperature(folder, finding.choose_step(folder, checkpoint).step)


def read_temperature(folder: pathlib.Path, step: int) -> float:
    """Returns the temperature in a run's `calibration.json`. Raises UserError if there is no such
    file, if it is of another step than `step`, or if it is damaged."""
    path = folder / FILE
    command = f"flax-cnns evaluate --workdir={folder}@{step} --calibrate"
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE}, so no temperature; fit it: {command}")
    content = workdirs.read_json(path)
    fitted, temperature = content.get("step"), content.get("temperature")
    if fitted != step:
        raise UserError(
            f"{path} has the temperature of step {fitted}, and step {step} is used; fit its own:"
            f" {command}"
        )
    try:
        check_temperature(temperature)
    except UserError as error:
        raise UserError(f"{path}: {error}; fit it again: {command}") from None
    return float(temperature)
