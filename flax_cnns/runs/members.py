"""The predictions of several runs on the same images, with one network in memory at a time."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax_cnns.checkpoint import finding
from flax_cnns.errors import UserError
from flax_cnns.evaluation.crops import CropProtocol, list_views
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.classifier import Classifier, make_classifier_from_run, predict_split
from flax_cnns.runs.crops import CropOptions, predict_crops
from flax_cnns.runs.prediction_cache import PredictionCache
from flax_cnns.runs.same_images import SplitFacts, check_same_images, describe_split

PLAIN = "1"  # of --crops: each run's own evaluation


class RunOptions(NamedTuple):
    """How runs are opened, and the split that they classify."""

    split: str = "test"
    accept_changed_data: bool = False
    trust: bool = False


class PredictedRun(NamedTuple):
    """What remains of a run after its predictions: no variables and no images."""

    name: str  # as the user named it: RUN or RUN@STEP
    classifier: Classifier
    facts: SplitFacts
    protocols: list[CropProtocol | None]  # None: the run's own evaluation
    predictions: list[Predictions]  # one for each protocol
    seconds: list[float]  # of predicting; 0: they were kept

    @property
    def step(self) -> int:
        assert self.classifier.run is not None
        return self.classifier.run.step

    def describe(self) -> dict[str, Any]:
        """Returns the run's entry in `protocol.members` of an evaluation's file."""
        run = self.classifier.run
        assert run is not None
        return {
            "run": self.name,
            "step": run.step,
            "checkpoint": run.checkpoint,
            "model": run.components.config.model.name,
        }


def choose_crops(crops: Sequence[str]) -> list[CropOptions | None]:
    """Returns the crops of a table; None for "1", each run's own evaluation.

    Raises UserError for unknown and repeated numbers.
    """
    if not crops or len(set(crops)) < len(crops):
        raise UserError(f"--crops: expected numbers of crops, each once; got {','.join(crops)!r}")
    for name in crops:
        list_views(name)  # raises for an unknown number
    return [None if name == PLAIN else CropOptions(name) for name in crops]


def check_members(runs: Sequence[str], least: int, flag: str) -> None:
    """Raises UserError if there are too few runs, or one twice, or if a checkpoint is missing."""
    if len(runs) < least:
        raise UserError(f"{flag}: expected {least} or more runs, RUN,RUN@STEP,...; got {len(runs)}")
    seen: dict[Any, str] = {}
    for run in runs:
        folder, checkpoint = workdirs.split_checkpoint(run, "")
        workdirs.read_config(folder)
        finding.find_step_arrays(folder, checkpoint)
        key = os.path.realpath(folder), finding.choose_step(folder, checkpoint).step
        if key in seen:
            raise UserError(f"{flag}: {seen[key]} and {run} are the same checkpoint")
        seen[key] = run


def choose_file(
    folder: pathlib.Path, stem: str, suffix: str, is_ours: Callable[[pathlib.Path], bool]
) -> pathlib.Path:
    """Returns the first of STEM, STEM_2, STEM_3, ... with `suffix` that does not exist or is ours,
    so that no file about other members is replaced."""
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'_{number}'}{suffix}"
        if not path.exists() or is_ours(path):
            break
    return path


def choose_members_file(
    folder: pathlib.Path, stem: str, members: Sequence[Mapping[str, Any]]
) -> pathlib.Path:
    """Returns the .json file for members with "run" and "step"; see `choose_file`. Their order has
    no effect. A damaged file is replaced."""

    def identify(members: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
        folders = [workdirs.split_checkpoint(each["run"], "")[0] for each in members]
        return sorted((os.path.realpath(f), each["step"]) for f, each in zip(folders, members))

    def is_ours(path: pathlib.Path) -> bool:
        try:
            return identify(workdirs.read_json(path)["protocol"]["members"]) == identify(members)
        except (UserError, KeyError, TypeError):
            return True

    return choose_file(folder, stem, ".json", is_ours)


def predict_run(
    name: str,
    crops: Sequence[CropOptions | None],
    options: RunOptions,
    cache: PredictionCache | None = None,
    first: SplitFacts | None = None,
) -> PredictedRun:
    """Returns a run's predictions for a split with all `crops`; None is the run's own evaluation.

    Predictions that `cache` has are read, and others are kept there. Raises UserError, also if the
    images or classes differ from those of the run `first`.
    """
    classifier = make_classifier_from_run(
        name,
        accept_changed_data=options.accept_changed_data,
        trust=options.trust,
        from_files=any(each is not None for each in crops),
    )
    dataset, split = classifier.dataset, options.split
    assert dataset is not None
    facts = describe_split(name, dataset, split, len(classifier.class_names))
    if first is not None:
        check_same_images(first, facts)
    protocols = [None if each is None else each.make(classifier) for each in crops]
    predictions, seconds = [], []
    for protocol in protocols:
        entry = None
        if cache is not None:
            entry = cache.find_entry(classifier, split, protocol.name if protocol else "plain")
        found = cache.read(entry) if cache is not None else None
        began = time.monotonic()
        if found is not None:
            seconds.append(0.0)
        else:
            if protocol is None:
                found = predict_split(classifier, split)
            else:
                found = predict_crops(classifier, protocol, split)
            seconds.append(time.monotonic() - began)
            if cache is not None:
                cache.write(entry, found)
        predictions.append(found)
    return PredictedRun(name, _lighten(classifier), facts, protocols, predictions, seconds)


def _lighten(classifier: Classifier) -> Classifier:
    """Returns the classifier without its variables and images."""
    run = classifier.run
    assert run is not None
    empty = dataclasses.replace(run.components.dataset, splits={})
    run = run._replace(components=run.components._replace(dataset=empty))
    return classifier._replace(variables=None, dataset=empty, run=run)
