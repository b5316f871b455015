"""Evaluates a set of corruptions at several severities, one cell after the other."""

from __future__ import annotations

import csv
import io
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_cnns import files
from flax_cnns.data.types import Dataset
from flax_cnns.errors import UserError
from flax_cnns.evaluation import uncertainty
from flax_cnns.evaluation.predictions import Predictions, measure
from flax_cnns.evaluation.shifted.measure import mean_corruption_error
from flax_cnns.evaluation.shifted.opened import OpenedSet, SetCell
from flax_cnns.evaluation.shifted.rows import CORRUPTIONS
from flax_cnns.train.progress import format_duration

Predict = Callable[[SetCell], tuple[Dataset, Predictions]]


class _CellHits(NamedTuple):
    labels: np.ndarray  # i32 [N]
    top1: np.ndarray  # bool [N]
    top5: np.ndarray  # bool [N]
    loss: float
    damaged: tuple[str, ...]


def evaluate_cells(
    opened: OpenedSet, predict: Predict, *, key: str, path: pathlib.Path | None
) -> dict[str, Any]:
    """Returns the results of all cells: "cells", "corruptions" (the mean over severities), and
    the mean "accuracy" over the 15 corruptions and all severities; of the whole ImageNet-C also
    "mce", the mean corruption error.

    The interval of the mean is the bootstrap over images, whose cells are drawn together. After
    each cell, what is finished is saved beside `path`; the same evaluation, which `key` describes,
    goes on from there. A .csv file beside `path` has a row for each cell.
    """
    partial = None if path is None else path.with_suffix(".partial.npz")
    done = _read_partial(partial, key)
    if jax.process_count() > 1:  # all must evaluate the same cells, and have the others
        names = [f"{cell.corruption} {cell.severity}" for cell in opened.cells]
        known = multihost_utils.process_allgather(np.array([name in done for name in names]))
        done = {name: done[name] for name, all_have in zip(names, known.all(0)) if all_have}
    primary, begun, fresh = jax.process_index() == 0, time.monotonic(), 0
    if done and primary:
        print(f"{len(done)} of {len(opened.cells)} cells were finished earlier")
    for cell in opened.cells:
        name = f"{cell.corruption} {cell.severity}"
        if name in done:
            continue
        done[name] = _count_hits(*predict(cell))
        fresh += 1
        if primary:
            if partial is not None:
                _write_partial(partial, key, done)
            left = (time.monotonic() - begun) / fresh * (len(opened.cells) - len(done))
            print(
                f"{len(done)}/{len(opened.cells)} {name}: accuracy {done[name].top1.mean():.2%}"
                f"  ETA {format_duration(left)}",
                flush=True,
            )
    results = _summarize(opened, done)
    if primary and path is not None:
        files.write_text(path.with_suffix(".csv"), _format_csv(results["cells"]))
        assert partial is not None
        partial.unlink(missing_ok=True)
    return results


def _count_hits(dataset: Dataset, predictions: Predictions) -> _CellHits:
    return _CellHits(
        predictions.labels,
        predictions.is_correct(),
        predictions.is_correct(5),
        measure(predictions)["loss"],
        tuple(dataset.damaged),
    )


def _summarize(opened: OpenedSet, done: dict[str, _CellHits]) -> dict[str, Any]:
    cells, by_corruption = [], dict[str, list[float]]()
    for cell in opened.cells:
        hits = done[f"{cell.corruption} {cell.severity}"]
        n, right = len(hits.top1), int(hits.top1.sum())
        row = {
            "corruption": cell.corruption,
            "severity": cell.severity,
            "examples": n,
            "loss": hits.loss,
            "accuracy": right / n,
            "top5": float(hits.top5.mean()),
        }
        row["intervals"] = {"accuracy": list(uncertainty.wilson_interval(right, n))}
        cells.append(row)
        by_corruption.setdefault(cell.corruption, []).append(right / n)
    means = {name: float(np.mean(values)) for name, values in by_corruption.items()}
    counted = [name for name in means if name in CORRUPTIONS] or list(means)
    results: dict[str, Any] = {
        "examples": sum(cell["examples"] for cell in cells),
        "accuracy": float(np.mean([means[name] for name in counted])),
        "corruptions": means,
        "cells": cells,
    }
    members = [each for name, each in done.items() if name.rpartition(" ")[0] in counted]
    if all(np.array_equal(each.labels, members[0].labels) for each in members):
        of_images = np.mean([each.top1 for each in members], 0)
        results["intervals"] = {"accuracy": list(uncertainty.bootstrap_interval(of_images))}
    if opened.name == "imagenet_c" and set(counted) == set(CORRUPTIONS):
        results["mce"] = mean_corruption_error(means)
    if damaged := [name for each in done.values() for name in each.damaged]:
        results["damaged_images"] = damaged
    return results


def _format_csv(cells: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("corruption", "severity", "examples", "loss", "accuracy", "low", "high", "top5")
    )
    for cell in cells:
        numbers = [cell["accuracy"], *cell["intervals"]["accuracy"], cell["top5"]]
        writer.writerow(
            [cell["corruption"], cell["severity"], cell["examples"], f"{cell['loss']:.6g}"]
            + [f"{number:.6f}" for number in numbers]
        )
    return text.getvalue()


# ---------------------------------------------------------------------------- finished cells


def _read_partial(path: pathlib.Path | None, key: str) -> dict[str, _CellHits]:
    """Returns the finished cells by name; {} if there are none of this evaluation."""
    if path is None or not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as saved:
            if str(saved["key"]) != key:
                return {}
            names = [name.removesuffix("/loss") for name in saved if name.endswith("/loss")]
            return {
                name: _CellHits(
                    saved[f"{name}/labels"],
                    saved[f"{name}/top1"],
                    saved[f"{name}/top5"],
                    float(saved[f"{name}/loss"]),
                    tuple(map(str, saved[f"{name}/damaged"])),
                )
                for name in names
            }
    except (OSError, ValueError, EOFError, KeyError):
        return {}  # a damaged file: the cells are evaluated again


def _write_partial(path: pathlib.Path, key: str, done: dict[str, _CellHits]) -> None:
    arrays: dict[str, Any] = {"key": np.str_(key)}
    for name, hits in done.items():
        for field, value in zip(hits._fields, hits):
            arrays[f"{name}/{field}"] = (
                np.array(value, np.str_) if field == "damaged" else np.asarray(value)
            )
    try:
        with files.replace_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
