"""Evaluates a run on a split, with the variables of one of its checkpoints."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis.plots import confusion as confusion_plot
from flax_cnns.checkpoint import finding, reading
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.evaluation.exact import per_class_metrics, summarize
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import RunComponents, build_components, check_run_data, initialize_jax
from flax_cnns.runs.references import check_trust
from flax_cnns.runtime import output
from flax_cnns.types import PyTree


def list_class_names(dataset: Dataset, width: int) -> list[str]:
    """Returns the names of all logits: a head may have more classes than the data set."""
    return [*dataset.class_names, *map(str, range(len(dataset.class_names), width))]


def load_variables(
    components: RunComponents, workdir: str | os.PathLike, checkpoint: str = ""
) -> tuple[PyTree, finding.StepChoice]:
    """Returns (the variables with which the run is evaluated, the chosen checkpoint).

    The variables have named blocks, and are the averaged weights if the run has them. `checkpoint`:
    best, latest, a step, or "" (see `finding.choose_step`). Reads only the needed arrays. Raises
    UserError.
    """
    source = finding.find_step_arrays(workdir, checkpoint)
    sharding = jax.sharding.NamedSharding(components.mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(components.init_variables),
    )
    if components.config.train.ema > 0:
        variables = reading.read_tree(source, {"ema": target})["ema"]
    else:
        variables = reading.read_tree(source, target)
    return variables, finding.choose_step(workdir, checkpoint)


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
    workdir, checkpoint = workdirs.split_checkpoint(workdir, checkpoint)
    config = workdirs.read_config(workdir)
    configs.validate(config)
    check_trust(config, trust, str(workdir))
    problems = configs.find_problems(config)
    initialize_jax(config)
    try:
        components = build_components(config, confusion=True, begun=True, callbacks=False)
    except UserError as error:
        directory = config.data.dir
        if not directory or os.path.exists(os.path.expanduser(directory)):
            raise
        cure = "if the data moved, first start the run's own command with the new data.dir"
        raise UserError(f"{error}; {cure}") from None
    if problems and jax.process_index() == 0:
        print(configs.format_note(workdir, problems))
    dataset = components.dataset
    change = check_run_data(workdir, dataset, accept_changed_data)
    if split not in dataset.splits:
        raise UserError(
            f"--split: {dataset.name} has no split {split!r}{did_you_mean(split, dataset.splits)}"
        )
    variables, (step, why) = load_variables(components, workdir, checkpoint)
    sums = components.evaluate(variables, split)
    confusion = sums.get("confusion")
    results: dict[str, Any] = {
        "split": split,
        "step": step,
        "checkpoint": why,
        "examples": int(sums["count"]),
        **summarize(sums),
        **(_describe_classes(confusion, dataset) if confusion is not None else {}),
        **({"changed_data": change} if change else {}),
    }
    if jax.process_index() > 0:
        return results
    if not change:
        workdirs.add_fingerprint(workdir, dataset.as_dict())
    name = f"evaluation_{split}_{step}"
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
