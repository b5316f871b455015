"""Evaluates a run or published weights on a set in a folder: shifted sets, or the user's photos."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from flax_cnns import files
from flax_cnns.data.types import DamagedImage, Dataset, Split
from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.crops import CropProtocol
from flax_cnns.evaluation.predictions import Predictions, measure
from flax_cnns.evaluation.shifted.measure import choose_among, count_answers
from flax_cnns.evaluation.shifted.opened import NetworkClasses, OpenedSet, SetCell
from flax_cnns.evaluation.shifted.opening import open_set
from flax_cnns.evaluation.shifted.rows import SETS
from flax_cnns.runs import tables
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import Classifier, LibraryReader, predict_split
from flax_cnns.runs.corruption_cells import digest_variables
from flax_cnns.runs.crops import CropOptions, predict_crops
from flax_cnns.runs.evaluate import count_confusion, describe_classes, measure_predictions
from flax_cnns.runs.evaluate_cells import evaluate_cells
from flax_cnns.runs.members import choose_file
from flax_cnns.runtime import output
from flax_cnns.weights.preprocessing import imagenet_classes, imagenet_wnids


@output.safe()
def evaluate_set(
    classifier: Classifier,
    name: str,
    folder: str | os.PathLike,
    *,
    crops: CropOptions | None = None,
    skip_damaged: bool = False,
    out: str | os.PathLike = "",
) -> dict[str, Any]:
    """Evaluates a classifier on a set, prints tables with 95 % intervals, and returns the results.

    `name`: a key of `evaluation.shifted.rows.SETS`; `folder` has the set as it is published. A run
    gets `evaluation_SET_STEP.json`; of two own folders of one name, the second's file ends in `_2`.
    `out` names the file, which published weights need if there is to be one. A set of corruptions
    also gets a .csv file, and is continued if it was stopped.
    `crops`: by default one, as the run or the library evaluates. `skip_damaged`: whether images
    that cannot be decoded are left out and counted; a run may say so too (`data.skip_damaged`).

    Raises UserError if the set is unknown, if the folder is not as the set is published, if the
    network lacks its classes, and for networks of multilabel data or of images that are not bytes.
    """
    _check_classifier(classifier)
    opened = open_set(name, folder, list_classes(classifier, name))
    classifier = _prepare_classifier(classifier, opened, skip_damaged)
    results: dict[str, Any] = {"split": name, **_describe_network(classifier)}
    protocol = None if crops is None else crops.make(classifier)
    path = _choose_path(classifier, opened, protocol, out)
    if jax.process_index() == 0:
        print(f"{classifier.title}\non {opened.row.title} ({opened.row.source})")
    if len(opened.cells) > 1:
        predict = functools.partial(_predict_cell, classifier, opened, crops=protocol)
        how = protocol.name if protocol else ""
        weights = digest_variables(classifier.variables)
        key = f"{classifier.title}; {weights}; {opened.folder}; {how}"
        results |= evaluate_cells(opened, predict, key=key, path=path)
    else:
        dataset, predictions = _predict_cell(classifier, opened, opened.cells[0], crops=protocol)
        results |= _measure(classifier, opened, predictions)
        results |= {"damaged_images": dataset.damaged} if dataset.damaged else {}
    results["protocol"] = _describe_protocol(opened, protocol)
    results |= {"left_out": dict(opened.left_out)} if opened.left_out else {}
    if jax.process_index() == 0:
        _report(results, opened, path)
    return results


def list_classes(classifier: Classifier, set_name: str) -> NetworkClasses:
    """Returns the classifier's classes, with ImageNet's names if the set can need them.

    Raises UserError if the set is one of ImageNet and the package imagenet-classes is missing.
    """
    classes = NetworkClasses(classifier.title, classifier.class_names)
    try:
        return classes._replace(imagenet_names=imagenet_classes(), wnids=imagenet_wnids())
    except UserError:
        if set_name in SETS and SETS[set_name].classes == "imagenet":
            raise
        return classes


def _check_classifier(classifier: Classifier) -> None:
    height, width, _ = classifier.image_shape
    if classifier.task != "classes":
        raise UserError(f"--set: a network of {classifier.task} data has no classes to match")
    if height != width:
        raise UserError(
            f"{classifier.title}: its images are {height}x{width}, but sets are read as squares"
        )
    if classifier.dataset is not None and not classifier.dataset.normalize:
        raise UserError(
            f"{classifier.title}: the run was trained with normalize=False, so images of a set"
            " cannot be prepared like its own"
        )


def _prepare_classifier(
    classifier: Classifier, opened: OpenedSet, skip_damaged: bool
) -> Classifier:
    """Returns the classifier as it reads this set."""
    reader, config = classifier.reader, classifier.data_config
    if opened.row.is_prepared and isinstance(reader, LibraryReader):
        whole = reader.preprocessing._replace(resize=reader.preprocessing.size)
        reader = LibraryReader(whole)
    dataset = classifier.dataset
    if opened.row.is_prepared and dataset is not None:
        dataset = dataclasses.replace(dataset, eval_share=1.0)
    if skip_damaged:
        config = config.copy_and_resolve_references()
        config.skip_damaged = True
    return classifier._replace(reader=reader, dataset=dataset, data_config=config)


def _make_dataset(classifier: Classifier, opened: OpenedSet, split: Split) -> Dataset:
    """Returns a data set whose test split has the images of a cell."""
    share = 1.0 if classifier.dataset is None else classifier.dataset.eval_share
    return Dataset(
        opened.row.title,
        len(classifier.class_names),
        tuple(classifier.class_names),
        classifier.image_shape,
        (),
        (),
        "the network",
        {"test": split},
        eval_share=share,
    )


def _limit_batch(classifier: Classifier, count: int) -> Classifier:
    """Returns the classifier with a batch that `count` images fill. It stays a multiple of the
    number of devices."""
    devices = jax.device_count()
    size = -(-count // devices) * devices
    if size >= classifier.data_config.eval_batch_size:
        return classifier
    config = classifier.data_config.copy_and_resolve_references()
    config.eval_batch_size = size
    return classifier._replace(data_config=config)


def _predict_cell(
    classifier: Classifier, opened: OpenedSet, cell: SetCell, *, crops: CropProtocol | None
) -> tuple[Dataset, Predictions]:
    split = cell.open(classifier.image_shape)
    dataset = _make_dataset(classifier, opened, split)
    classifier = _limit_batch(classifier, len(split))
    try:
        if crops is None:
            return dataset, predict_split(classifier, "test", dataset)
        return dataset, predict_crops(classifier, crops, "test", dataset)
    except DamagedImage as error:
        raise UserError(
            f"cannot decode {error.location}: {error.cause}; repair or delete it, or give"
            " --skip-damaged"
        ) from None


def _measure(classifier: Classifier, opened: OpenedSet, predictions: Predictions) -> dict[str, Any]:
    """Returns the metrics of a set without corruptions, with intervals."""
    results: dict[str, Any] = {"examples": len(predictions.logits)}
    if opened.answers is not None:
        answers = [opened.answers[number] for number in predictions.labels]
        hits = count_answers(predictions.logits, answers)
        n = len(answers)
        wilson = {key: list(uncertainty.wilson_interval(k, n)) for key, k in hits.items()}
        return results | {key: k / n for key, k in hits.items()} | {"intervals": wilson}
    names = list(classifier.class_names)
    if opened.row.chosen_among_own:
        predictions = choose_among(predictions, opened.classes)
        names = [names[k] for k in opened.classes]
        results |= measure(predictions)
        intervals = uncertainty.measure_intervals(predictions)
        results["intervals"] = {key: list(ends) for key, ends in intervals.items()}
    else:
        found = measure_predictions(classifier, predictions)
        results |= {k: v for k, v in found.items() if k not in ("classes", "confusion")}
    confusion = count_confusion(predictions)
    # Classes that neither occur nor are predicted are left out: five photos need no 1000 rows.
    shown = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    return results | describe_classes(confusion[np.ix_(shown, shown)], [names[k] for k in shown])


# ---------------------------------------------------------------------------- files and tables


def _describe_network(classifier: Classifier) -> dict[str, Any]:
    if classifier.run is None:
        return {"model": classifier.name, "network": classifier.title}
    return {"step": classifier.run.step, "checkpoint": classifier.run.checkpoint}


def _describe_protocol(opened: OpenedSet, crops: CropProtocol | None) -> dict[str, Any]:
    """Returns what differs from the plain evaluation of a run."""
    protocol: dict[str, Any] = {"set": opened.name, "set_dir": opened.folder}
    if opened.row.chosen_among_own:
        protocol["chosen_among"] = len(opened.classes)
    if difference := opened.describe_difference():
        protocol["differs"] = difference
    return protocol | ({} if crops is None else crops.as_dict())


def _choose_path(
    classifier: Classifier, opened: OpenedSet, crops: CropProtocol | None, out: str | os.PathLike
) -> pathlib.Path | None:
    """Returns the JSON file to write; None for published weights without `out`."""
    if out:
        path = pathlib.Path(out)
        if path.suffix != ".json":
            raise UserError(f"--out={path}: expected a name that ends in .json")
        files.check_writable(path)
        return path
    if classifier.run is None:
        return None
    run, suffix = classifier.run, f"_{crops.name}" if crops else ""
    if opened.name != "folder":
        return run.folder / f"evaluation_{opened.name}_{run.step}{suffix}.json"
    real = os.path.realpath(opened.folder)

    def is_ours(path: pathlib.Path) -> bool:
        try:
            return os.path.realpath(workdirs.read_json(path)["protocol"]["set_dir"]) == real
        except (UserError, KeyError, TypeError):  # a damaged file is replaced
            return True

    stem = f"evaluation_folder_{os.path.basename(real)}_{run.step}{suffix}"
    return choose_file(run.folder, stem, ".json", is_ours)


def _report(results: dict[str, Any], opened: OpenedSet, path: pathlib.Path | None) -> None:
    """Writes the file and prints tables and notes."""
    if path is not None:
        files.write_json(path, results)
    if "cells" in results:
        tables.print_corruptions(results)
    else:
        tables.print_evaluation(results, title=f"{opened.row.title}: {results['examples']} images")
    if difference := opened.describe_difference():
        print(f"note: {difference}")
    for kind, count in opened.left_out.items():
        print(f"left out: {kind}: {count:,}")
    if damaged := results.get("damaged_images"):
        images = "1 image" if len(damaged) == 1 else f"{len(damaged)} images"
        print(f"left out {images} that cannot be decoded: {', '.join(damaged[:3])}")
    if path is not None:
        also = f", {path.with_suffix('.csv').name}" if "cells" in results else ""
        print(f"written to {path.parent}: {path.name}{also}")
