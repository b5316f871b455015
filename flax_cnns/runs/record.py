"""Reads a run's directory, complete or not: its config and its `metrics.jsonl`."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from flax_cnns.runs import workdir as workdirs
from flax_cnns.train.writer import read_jsonl


class RunRecord(NamedTuple):
    """The config and the log of one run."""

    workdir: pathlib.Path
    config: Any  # a ConfigDict
    lines: list[dict[str, float]]  # the log, oldest line first

    @property
    def is_complete(self) -> bool:
        """Whether the run has written its summary."""
        return (self.workdir / "summary.json").is_file()

    @property
    def step(self) -> int:
        """The newest logged step; 0 if nothing was logged."""
        return max((int(line["step"]) for line in self.lines), default=0)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps, values) of a metric, [points] each. A value may be NaN."""
        points = [(line["step"], line[name]) for line in self.lines if name in line]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values

    def last_value(self, name: str) -> float | None:
        """The newest value of a metric; None if it is missing or not finite."""
        values = self.series(name)[1]
        return float(values[-1]) if values.size and np.isfinite(values[-1]) else None

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the log's windows, which exclude compiling, evaluating and saving."""
        rates = self.series("images_per_second")[1]
        rates = rates[np.isfinite(rates) & (rates > 0)]
        return float(self.config.data.batch_size / np.median(rates)) if rates.size else None

    @property
    def seconds(self) -> float | None:
        """Seconds from the start to the newest line, including compiling and evaluating.

        For a run that was interrupted, the sum over its sessions. Each session logs
        "time/first_step".
        """
        began, end, total = None, 0.0, 0.0
        for line in self.lines:
            if "time/first_step" in line:
                total += 0.0 if began is None else end - began
                began = line["time"] - line["time/first_step"]
            end = line["time"]
        return None if began is None else total + end - began


def read_record(workdir: str | os.PathLike) -> RunRecord:
    """Reads a run. Raises UserError if there is no run or if its files are damaged."""
    config, workdir = workdirs.read_config(workdir), pathlib.Path(workdir)
    log = workdir / "metrics.jsonl"
    return RunRecord(workdir, config, read_jsonl(log) if log.is_file() else [])


def count_params_and_macs(record: RunRecord) -> tuple[int, int] | None:
    """Returns (parameters, MACs of one image) of the run's network. Computes shapes only.

    Returns None for a network of the user's own, and if `dataset.json`, which holds the image size,
    is missing.
    """
    facts = record.workdir / "dataset.json"
    if not facts.is_file() or ":" in record.config.model.name:
        return None
    model, train = record.config.model.to_dict(), record.config.train.sync_batchnorm
    return _count_cached(json.dumps([model, train, workdirs.read_json(facts)], sort_keys=True))


@functools.lru_cache
def _count_cached(network: str) -> tuple[int, int]:
    """Counts from the JSON of [model, sync_batchnorm, facts], once for all runs of one network."""
    # Imported late, because reading a log needs no JAX.
    from ml_collections import ConfigDict

    from flax_cnns.analysis.cost import cost
    from flax_cnns.data.types import Dataset
    from flax_cnns.runs.network import make_model

    model, sync, facts = json.loads(network)
    config = ConfigDict(dict(model=model, train=dict(sync_batchnorm=sync)))
    dataset = Dataset.from_dict(facts)
    total = cost(make_model(config, dataset), (1, *dataset.image_shape))
    return total.params, total.macs
