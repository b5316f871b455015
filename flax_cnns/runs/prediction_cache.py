"""Keeps predictions of runs as files, so that a killed table of many evaluations goes on.

The files lie in `predictions/` of a run's directory and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import zipfile
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_cnns import config as configs
from flax_cnns.evaluation.predictions import Predictions
from flax_cnns.files import replace_atomically
from flax_cnns.runs.classifier import Classifier

FOLDER = "predictions"
LIMIT = 2**30  # bytes of all files together; the oldest are deleted
_FORMAT = 1
# Config fields that decide the logits: the network and the images, not how many are read at once.
_RELEVANT = (
    *("model.", "own.", "train.ema", "data.image_size", "data.channels", "data.classes"),
    *("data.fraction", "data.validation", "data.split_seed", "data.mean", "data.std"),
    *("data.skip_damaged", "data.augment.normalize", "data.labels"),
)


class CacheEntry(NamedTuple):
    """The file of one run's predictions, and what they depend on."""

    path: pathlib.Path
    key: str


class PredictionCache:
    """The kept predictions in the directory of a run; of several processes, nothing is kept."""

    def __init__(self, run: str | os.PathLike, limit: int = LIMIT):
        self.folder = pathlib.Path(run) / FOLDER
        self.limit = limit

    def find_entry(self, classifier: Classifier, split: str, protocol: str) -> CacheEntry | None:
        """Returns where the predictions of a run for a split belong; None if they are not kept:
        without a fingerprint of the data or the weights, or on several processes."""
        run, dataset = classifier.run, classifier.dataset
        if run is None or dataset is None or dataset.is_stream or jax.process_count() > 1:
            return None
        manifest = run.folder / "checkpoints" / str(run.step) / "manifest" / "metadata"
        if not dataset.fingerprint or not manifest.is_file():
            return None
        config = configs.flatten(configs.to_plain(run.components.config))
        relevant = {k: v for k, v in config.items() if k.startswith(_RELEVANT)}
        facts: dict[str, Any] = {
            "format": _FORMAT,
            "weights": hashlib.sha256(manifest.read_bytes()).hexdigest(),
            "config": relevant,
            "own": run.components.describe_own_parts(),
            "data": dataset.fingerprint,
            "normalization": [dataset.mean, dataset.std],
            "image_shape": dataset.image_shape,
            "split": split,
            "protocol": protocol,
        }
        # Another version may read images or compute logits in another way.
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts["version"] = metadata.version("flax_cnns")
        key = json.dumps(facts, sort_keys=True, default=str)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        name = f"{run.folder.name[:60]}_{run.step}_{split}_{protocol[:60]}_{digest}.npz"
        return CacheEntry(self.folder / name, key)

    def read(self, entry: CacheEntry | None) -> Predictions | None:
        """Returns the kept predictions; None if there are none, or if the file is damaged."""
        if entry is None or not entry.path.is_file():
            return None
        try:
            with np.load(entry.path) as kept:
                if str(kept["key"]) != entry.key:
                    return None
                found = Predictions(kept["logits"], kept["labels"], str(kept["task"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        with contextlib.suppress(OSError):
            os.utime(entry.path)  # the least recently used are deleted first
        return found

    def write(self, entry: CacheEntry | None, predictions: Predictions) -> None:
        """Keeps predictions, and deletes the least recently used files beyond the limit. What
        cannot be written is not kept."""
        size = predictions.logits.nbytes + predictions.labels.nbytes
        if entry is None or size > self.limit:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            with replace_atomically(entry.path) as temporary, temporary.open("wb") as file:
                np.savez(
                    file,
                    logits=predictions.logits,
                    labels=predictions.labels,
                    task=np.array(predictions.task),
                    key=np.array(entry.key),
                )
            self._delete_oldest(entry.path)

    def _delete_oldest(self, newest: pathlib.Path) -> None:
        others = [path for path in self.folder.glob("*.npz") if path != newest]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        total = newest.stat().st_size
        for path in others:
            total += path.stat().st_size
            if total > self.limit:
                path.unlink()

    def describe(self) -> str:
        """Returns a line about the kept files; "" if there are none."""
        sizes = [path.stat().st_size for path in self.folder.glob("*.npz")]
        if not sizes:
            return ""
        return (
            f"kept for the next table: {len(sizes)} files of predictions in {self.folder},"
            f" {sum(sizes) / 2**20:,.1f} of at most {self.limit / 2**20:,.0f} MiB"
        )
