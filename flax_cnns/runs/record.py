"""What a run's directory tells of it, finished or not: its config and its `metrics.jsonl`."""

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
    """One run."""

    workdir: pathlib.Path
    config: Any  # a ConfigDict
    lines: list[dict[str, float]]  # of the log, oldest first

    @property
    def is_complete(self) -> bool:
        return (self.workdir / "summary.json").is_file()

    @property
    def step(self) -> int:
        """The newest that was logged; 0 before any was."""
        return max((line["step"] for line in self.lines), default=0)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values), [points] each; a value may be NaN."""
        points = [(line["step"], line[name]) for line in self.lines if name in line]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values

    def last_value(self, name: str) -> float | None:
        """The newest value, if there is a finite one."""
        values = self.series(name)[1]
        return float(values[-1]) if values.size and np.isfinite(values[-1]) else None

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the log's windows, which leave out compiling, evaluating and saving."""
        rates = self.series("images_per_second")[1]
        rates = rates[np.isfinite(rates) & (rates > 0)]
        return float(self.config.data.batch_size / np.median(rates)) if rates.size else None

    @property
    def seconds(self) -> float | None:
        """From the start of the run to its newest line, compiling and evaluating included; of one
        that was cut the sum over its sessions, each of which logs when its first step was done."""
        began, end, total = None, 0.0, 0.0
        for line in self.lines:
            if "time/first_step" in line:
                total += 0.0 if began is None else end - began
                began = line["time"] - line["time/first_step"]
            end = line["time"]
        return None if began is None else total + end - began


def read_record(workdir: str | os.PathLike) -> RunRecord:
    """Raises `UserError` where there is no run, or its files are damaged."""
    config, workdir = workdirs.read_config(workdir), pathlib.Path(workdir)
    log = workdir / "metrics.jsonl"
    return RunRecord(workdir, config, read_jsonl(log) if log.is_file() else [])


def count_params_and_macs(record: RunRecord) -> tuple[int, int] | None:
    """(parameters, MACs of an image) of the run's network; None where no `dataset.json` says what
    the images are, and for a network that is not of this package. Computes shapes only."""
    facts = record.workdir / "dataset.json"
    if not facts.is_file() or ":" in record.config.model.name:
        return None
    model, train = record.config.model.to_dict(), record.config.train.sync_batchnorm
    return _size(json.dumps([model, train, workdirs.read_json(facts)], sort_keys=True))


@functools.lru_cache
def _size(network: str) -> tuple[int, int]:
    """Of the JSON: counted once for all the runs that share a network."""
    # Late: whoever reads a log needs no JAX.
    from ml_collections import ConfigDict

    from flax_cnns.analysis.cost import cost
    from flax_cnns.data.types import Dataset
    from flax_cnns.runs.network import make_model

    model, sync, facts = json.loads(network)
    config = ConfigDict(dict(model=model, train=dict(sync_batchnorm=sync)))
    dataset = Dataset.from_dict(facts)
    found = cost(make_model(config, dataset), (1, *dataset.image_shape))
    return found.params, found.macs
