"""Errors of a classifier for each corruption and severity: one file per cell, so that a killed
evaluation goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_cnns import files
from flax_cnns.data.types import Dataset, Split, Subset, take_rows
from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.corruptions import table
from flax_cnns.evaluation.corruptions.steps import make_corrupted_step
from flax_cnns.evaluation.predictions import Predictions, PredictStep, make_predict_step, measure
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import Classifier, predict_split
from flax_cnns.train import parallel
from flax_cnns.train.progress import format_duration

CLEAN = "clean"
MAX_NAME = 100  # characters of the list of corruptions in the name of a file


class CorruptedCell(NamedTuple):
    """The evaluation of one corruption at one severity; or of clean images, with severity 0."""

    corruption: str
    severity: int
    results: dict[str, Any]  # the content of the cell's file
    correct: np.ndarray  # bool [N], in the order of the split

    @property
    def error(self) -> float:
        return 1 - float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the error."""
        wrong = int((~self.correct).sum())
        return uncertainty.wilson_interval(wrong, len(self.correct))


def evaluate_cells(
    classifier: Classifier,
    folder: pathlib.Path,
    corruptions: Sequence[table.Corruption],
    severities: Sequence[int],
    *,
    split: str,
    dataset: Dataset,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
) -> dict[tuple[str, int], CorruptedCell]:
    """Returns {(corruption, severity): cell}, with ("clean", 0) first.

    A cell is written into `folder` as soon as it is known, and read again if the same weights, data
    and seed are asked for. `facts`: the entries split, step and checkpoint of the files. Raises
    UserError for multilabel data and float images.
    """
    if classifier.task != "classes":
        raise UserError("corruptions need one class per image; these data are multilabel")
    shape = dataset.image_shape
    origin = {
        "constants": table.name_constants(shape),
        "seed": seed,
        "weights": digest_variables(classifier.variables),
        "data": _digest_text({**dataset.fingerprint, "rows": len(dataset.splits[split])}),
    }
    wanted = [(CLEAN, 0), *((row.name, level) for row in corruptions for level in severities)]
    cells = {at: _read_cell(folder, *at, origin) for at in wanted}
    is_known = np.array([cells[at] is not None for at in wanted])
    if jax.process_count() > 1:  # all must evaluate the same cells, and have the others
        is_known = np.all(multihost_utils.process_allgather(is_known), 0)
    missing = [at for at, known in zip(wanted, is_known) if not known]
    if len(missing) < len(wanted):
        _print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are in {folder}")
    mesh = parallel.make_mesh()
    network = make_predict_step(
        classifier.apply, normalize=classifier.normalize, transform=None, mesh=mesh
    )
    own: dict[str, Any] = {}
    if classifier.run:
        parts = classifier.run.components.own_parts
        own = dict(loss=parts.loss, own_metrics=parts.metrics)
    rows = {row.name: row for row in corruptions}
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
    start, at_name, at, constants = time.perf_counter(), "", None, {}
    for done, (name, severity) in enumerate(missing):
        step: PredictStep = network
        if severity:
            if name != at_name:
                at = make_corrupted_step(network, rows[name], mesh)
                at_name, constants = name, table.prepare_constants(rows[name], shape)
            assert at is not None
            step = at(table.pick_severity(constants, severity), seed)
        predictions = predict_split(classifier, split, dataset, step=step)
        results = {**(facts or {}), **_describe(predictions, own)}
        results["protocol"] = {"corruption": name, "severity": severity, **origin}
        cells[name, severity] = _make_cell(name, severity, results)
        if jax.process_index() == 0:
            files.write_json(_name_file(folder, name, severity), results)
        left = (time.perf_counter() - start) / (done + 1) * (len(missing) - done - 1)
        _print(
            f"{done + 1:3}/{len(missing)}  {name} {severity or ''}".ljust(32)
            + f"error {1 - results['accuracy']:.2%}"
            + (f"  ETA {format_duration(left)}" if left else "")
        )
    return {at: cell for at, cell in cells.items() if cell is not None}


def name_folder(classifier: Classifier, split: str, images: int, seed: int) -> pathlib.Path:
    """The folder of the cells. An evaluation of some of the images, or with another seed, has its
    own, so that it does not replace that of all of them."""
    run, dataset = classifier.run, classifier.dataset
    assert run is not None
    assert dataset is not None
    some = f"_images{images}" if 0 < images < len(dataset.splits[split]) else ""
    some += f"_seed{seed}" if seed else ""
    return run.folder / f"evaluation_{split}_{run.step}_corruptions{some}"


def name_selection(rows: Sequence[table.Corruption], severities: Sequence[int]) -> str:
    """What a report's name says of its corruptions and severities: "" of all, "_fog,snow" and
    "_severities1,5" of some. A long list is a number and a digest."""
    words = table.name_selection(rows)
    if len(words) > MAX_NAME:
        words = f"{len(rows)}_{zlib.crc32(words.encode()):08x}"
    some = "" if words == "all" else f"_{words}"
    if len(severities) < len(table.SEVERITIES):
        some += "_severities" + ",".join(map(str, severities))
    return some


def take_images(dataset: Dataset, split: str, count: int) -> Dataset:
    """Returns the data set with `count` evenly spaced images of the split; all of them if `count`
    is 0 or more than there are. Raises UserError if the images come from a user's factory."""
    given = dataset.splits[split]
    if not count or count >= len(given):
        return dataset
    rows = np.arange(count) * len(given) // count
    labels = None if given.labels is None else given.labels[rows]
    if given.images is not None:
        some = Split(labels, images=take_rows(given.images, rows))
    elif given.source is not None:
        some = Split(labels, source=Subset(given.source, rows, f"{count} of {split}"))
    else:
        raise UserError(f"--images: {dataset.name} is a stream of batches; leave the flag out")
    return dataclasses.replace(dataset, splits={**dataset.splits, split: some})


def _describe(predictions: Predictions, own: dict[str, Any]) -> dict[str, Any]:
    correct = predictions.is_correct()
    ends = uncertainty.wilson_interval(int(correct.sum()), len(correct))
    return {
        "examples": len(correct),
        **measure(predictions, **own),
        "accuracy": float(correct.mean()),
        "intervals": {"accuracy": list(ends)},
        "correct": np.packbits(correct).tobytes().hex(),  # one bit per image, in order
    }


def _make_cell(corruption: str, severity: int, results: dict[str, Any]) -> CorruptedCell:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(results["correct"]), np.uint8))
    return CorruptedCell(corruption, severity, results, bits[: results["examples"]].astype(bool))


def _read_cell(
    folder: pathlib.Path, corruption: str, severity: int, origin: dict[str, Any]
) -> CorruptedCell | None:
    path = _name_file(folder, corruption, severity)
    if not path.is_file():
        return None
    results = workdirs.read_json(path)
    if results.get("protocol") != {"corruption": corruption, "severity": severity, **origin}:
        return None  # of other weights, data or numbers: evaluated again
    return _make_cell(corruption, severity, results)


def _name_file(folder: pathlib.Path, corruption: str, severity: int) -> pathlib.Path:
    return folder / f"{corruption}_{severity}.json"


def digest_variables(variables: Any) -> str:
    """Returns 16 hexadecimal digits that depend on all numbers."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _digest_text(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _print(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
