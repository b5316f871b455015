"""The temperature of a run, which `evaluate --calibrate` fitted.

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
from flax_cnns.evaluation.temperature import check_temperature
from flax_cnns.runs import workdir as workdirs

FILE = "calibration.json"


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
        return check_temperature(temperature)
    except UserError as error:
        raise UserError(f"{path}: {error}; fit it again: {command}") from None
