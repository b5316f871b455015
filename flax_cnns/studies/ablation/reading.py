"""An ablation's folder as a report reads it: rows, and each cell's record, or why it has none."""

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
    """A row with a seed."""

    status: str  # complete, failed, diverged, interrupted, damaged, missing, without METRIC
    error: str = ""
    record: records.RunRecord | None = None  # of one that is complete


class RowResults(NamedTuple):
    name: str
    overrides: dict[str, Any]
    cells: dict[int, CellResult]  # of all seeds

    @property
    def records(self) -> dict[int, records.RunRecord]:
        return {s: cell.record for s, cell in self.cells.items() if cell.record is not None}

    def values(self, name: str) -> dict[int, float]:
        """{seed: newest value} of the complete cells that have one."""
        found = {s: record.last_value(name) for s, record in self.records.items()}
        return {s: value for s, value in found.items() if value is not None}

    @property
    def why_incomplete(self) -> str:
        """How many cells have no result, and why: "2 failed, 1 missing"."""
        why = collections.Counter(c.status for c in self.cells.values() if c.record is None)
        return ", ".join(f"{n} {status}" for status, n in sorted(why.items()))


def read_plan(folder: pathlib.Path) -> dict[str, Any]:
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
    return {seed: _cell(folder / f"seed{seed}") for seed in range(number)}


def _cell(workdir: pathlib.Path) -> CellResult:
    """Complete is what was tested, or has a summary; a cell that cannot be read spoils no other."""
    try:
        record = records.read_record(workdir) if (workdir / "config.json").is_file() else None
        if record is not None and (record.is_complete or _tested(record)):
            return CellResult("complete", record=record)
        beside = workdir.with_name(f"{workdir.name}.json")
        if not beside.is_file():
            return CellResult("missing" if record is None else "interrupted")
        found = workdirs.read_json(beside)
        if found["status"] == "complete":
            return CellResult("damaged", "said to be complete, and its log has no test metric")
        return CellResult(found["status"], found.get("error") or "")
    except (UserError, KeyError, TypeError) as error:
        return CellResult("damaged", str(error))


def _tested(record: records.RunRecord) -> set[str]:
    """The metrics of its test, without those that are not finite."""
    names = {name for line in record.lines for name in line if name.startswith("test/")}
    return {name.removeprefix("test/") for name in names if record.last_value(name) is not None}


def check_metric_logged(rows: Sequence[RowResults], metric: str, folder: pathlib.Path) -> None:
    """Raises `UserError` unless a complete cell has the metric."""
    known = {name for row in rows for r in row.records.values() for name in _tested(r)}
    if metric not in known:
        near = did_you_mean(metric, known) or "; nor any other metric of a test"
        raise UserError(f"--metric: no complete cell of {folder} logged test/{metric}{near}")


def require_metric(row: RowResults, metric: str) -> RowResults:
    """The row; a complete cell that has no such value is without a result."""
    without = f"without {metric}", f"its run is complete, without a finite test/{metric}"
    have = row.values(f"test/{metric}")
    cells = {
        seed: CellResult(*without) if cell.record is not None and seed not in have else cell
        for seed, cell in row.cells.items()
    }
    return row._replace(cells=cells)


def count_params_and_macs(record: records.RunRecord) -> tuple[int, int | None] | None:
    """(parameters, MACs); of a network of the user's own, whose code a report does not import, the
    parameters that its summary tells."""
    if (found := records.count_params_and_macs(record)) or not record.is_complete:
        return found
    with contextlib.suppress(UserError, KeyError, TypeError):  # damaged
        return workdirs.read_json(record.workdir / "summary.json")["params"], None
    return None


def count_datasets(rows: Sequence[RowResults], plan: dict[str, Any]) -> int:
    """How many data sets the complete cells have seen; rows that choose their data do not count."""
    name = str(plan["config"].get("data", {}).get("name", ""))
    of_own = f"own.{name_of(name)}." if is_reference(name) else "data"

    def chooses(field: str) -> bool:
        return field.startswith(("data", of_own)) and not field.startswith("data.augment")

    rows = [row for row in rows if not any(map(chooses, row.overrides))]
    facts = [
        workdirs.read_dataset_facts(cell.workdir) for row in rows for cell in row.records.values()
    ]
    known = {
        json.dumps(one["fingerprint"], sort_keys=True) for one in facts if "fingerprint" in one
    }
    return len(known)


def find_changed_sources(rows: Sequence[RowResults]) -> list[str]:
    """The user's own parts whose source was not the same in all complete cells."""
    digests = collections.defaultdict(set)
    for row in rows:
        for record in row.records.values():
            with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):  # or none
                for parts in workdirs.read_json(record.workdir / "own.json").values():
                    for part in parts:
                        digests[part["name"]].add(part["digest"])
    return sorted(name for name, found in digests.items() if len(found) > 1)
