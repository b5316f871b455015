"""Reads an ablation's folder for the report: its rows, and the result of each cell."""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax_cnns.config.checks import is_reference
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import record as records
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.references import name_of


class CellResult(NamedTuple):
    """The result of a cell, or why it has none."""

    status: str  # complete, failed, diverged, interrupted, damaged, missing, without METRIC
    error: str = ""
    record: records.RunRecord | None = None  # of a complete cell


class RowResults(NamedTuple):
    """The results of a row's cells."""

    name: str
    overrides: dict[str, Any]
    cells: dict[int, CellResult]  # {seed: result}

    @property
    def records(self) -> dict[int, records.RunRecord]:
        """{seed: record} of the complete cells."""
        return {s: cell.record for s, cell in self.cells.items() if cell.record is not None}

    def values(self, name: str) -> dict[int, float]:
        """{seed: newest value of a metric} of the complete cells that logged it."""
        values = {s: record.last_value(name) for s, record in self.records.items()}
        return {s: value for s, value in values.items() if value is not None}


def read_plan(folder: pathlib.Path) -> dict[str, Any]:
    """Reads ablation.json. Raises UserError if it is missing or damaged."""
    path = folder / "ablation.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no ablation here (ablation.json is missing); give an ablation's --workdir"
        )
    plan = workdirs.read_json(path)
    if missing := {"config", "baseline", "seeds", "rows"} - set(plan):
        raise UserError(f"{path} is damaged ({', '.join(sorted(missing))} missing)")
    return plan


def read_cells(folder: pathlib.Path, number: int) -> dict[int, CellResult]:
    """Reads the cells of a row's folder for seeds 0 to `number - 1`."""
    return {seed: _read_cell(folder / f"seed{seed}") for seed in range(number)}


def _read_cell(workdir: pathlib.Path) -> CellResult:
    """Reads a cell. It is complete if its run has a summary or logged a test metric. If a file is
    damaged, its status is "damaged"."""
    try:
        record = records.read_record(workdir) if (workdir / "config.json").is_file() else None
        if record is not None and (record.is_complete or _list_test_metrics(record)):
            return CellResult("complete", record=record)
        status_file = workdir.with_name(f"{workdir.name}.json")
        if not status_file.is_file():
            return CellResult("missing" if record is None else "interrupted")
        known = workdirs.read_json(status_file)
        if known["status"] == "complete":
            return CellResult("damaged", "its status is complete, but its log has no test metric")
        return CellResult(known["status"], known.get("error") or "")
    except (UserError, KeyError, TypeError) as error:
        return CellResult("damaged", str(error))


def _list_test_metrics(record: records.RunRecord) -> set[str]:
    """Returns the test metrics that the run logged with finite values."""
    names = {name for line in record.lines for name in line if name.startswith("test/")}
    return {name.removeprefix("test/") for name in names if record.last_value(name) is not None}


def check_metric_logged(rows: Sequence[RowResults], metric: str, folder: pathlib.Path) -> None:
    """Raises UserError unless a complete cell logged the metric."""
    known = {name for row in rows for r in row.records.values() for name in _list_test_metrics(r)}
    if metric not in known:
        near = did_you_mean(metric, known) or "; they logged no test metric"
        raise UserError(f"--metric: no complete cell of {folder} logged test/{metric}{near}")


def require_metric(row: RowResults, metric: str) -> RowResults:
    """Returns the row without the results of complete cells that lack a finite value."""
    without = f"without {metric}", f"its run is complete, but has no finite test/{metric}"
    seeds_with_value = row.values(f"test/{metric}")
    cells = {
        seed: CellResult(*without)
        if cell.record is not None and seed not in seeds_with_value
        else cell
        for seed, cell in row.cells.items()
    }
    return row._replace(cells=cells)


def count_params_and_macs(record: records.RunRecord) -> tuple[int, int | None] | None:
    """Returns (parameters, MACs) of a run's network.

    For a network of the user's own, whose code a report does not import, returns the parameters
    from the run's summary and None.
    """
    counts = records.count_params_and_macs(record)
    if counts or not record.is_complete:
        return counts
    with contextlib.suppress(UserError, KeyError, TypeError):  # a damaged summary
        return workdirs.read_json(record.workdir / "summary.json")["params"], None
    return None


def count_datasets(rows: Sequence[RowResults], plan: dict[str, Any]) -> int:
    """Counts the different data sets that the complete cells saw.

    Rows whose overrides change the data do not count.
    """
    name = str(plan["config"].get("data", {}).get("name", ""))
    own_prefix = f"own.{name_of(name)}." if is_reference(name) else "data"

    def changes_data(field: str) -> bool:
        return field.startswith(("data", own_prefix)) and not field.startswith("data.augment")

    rows = [row for row in rows if not any(map(changes_data, row.overrides))]
    all_records = [record for row in rows for record in row.records.values()]
    facts = [workdirs.read_dataset_facts(record.workdir) for record in all_records]
    fingerprints = {
        json.dumps(f["fingerprint"], sort_keys=True) for f in facts if "fingerprint" in f
    }
    return len(fingerprints)


def find_changed_sources(rows: Sequence[RowResults]) -> list[str]:
    """Returns the own parts whose source differs between complete cells."""
    digests = collections.defaultdict(set)
    for row in rows:
        for record in row.records.values():
            # Ignores a missing or damaged file.
            with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):
                for parts in workdirs.read_json(record.workdir / "own.json").values():
                    for part in parts:
                        digests[part["name"]].add(part["digest"])
    return sorted(name for name, values in digests.items() if len(values) > 1)
