"""The report of an ablation: tables and pictures of what is complete.

Everything is made anew from `ablation.json` and each run's config and `metrics.jsonl`; a cell's own
JSON says only why it has no result.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_cnns.analysis import statistics
from flax_cnns.analysis.plots import forest
from flax_cnns.analysis.statistics import Difference, Interval
from flax_cnns.errors import UserError
from flax_cnns.files import write_text
from flax_cnns.names import printable
from flax_cnns.runs import record as records
from flax_cnns.runs import workdir as workdirs

LEVEL = 0.05  # of a corrected p-value below which a difference is printed bold


class Cell(NamedTuple):
    """A row with a seed."""

    status: str  # complete, failed, diverged, interrupted, damaged, missing
    error: str = ""
    record: records.Record | None = None  # of one that is complete


class Row(NamedTuple):
    name: str
    overrides: dict[str, Any]
    cells: dict[int, Cell]  # of all seeds

    @property
    def complete(self) -> dict[int, records.Record]:
        return {s: cell.record for s, cell in self.cells.items() if cell.record is not None}

    def values(self, name: str) -> dict[int, float]:
        """{seed: newest value} of the complete cells that have one."""
        found = {s: record.last(name) for s, record in self.complete.items()}
        return {s: value for s, value in found.items() if value is not None}

    @property
    def without(self) -> str:
        """How many cells have no result, and why: "2 failed, 1 missing"."""
        why = collections.Counter(c.status for c in self.cells.values() if c.record is None)
        return ", ".join(f"{n} {status}" for status, n in sorted(why.items()))


class Told(NamedTuple):
    """A line of the tables; NaN or None where nothing is known."""

    row: Row
    accuracy: Interval
    error: Interval
    difference: Difference | None  # None: the baseline
    p_holm: float
    gap: float | None  # of accuracy, on the training examples less the test's
    size: tuple[int, int] | None  # parameters, MACs
    seconds_per_step: float | None
    seconds: float | None

    @property
    def bold(self) -> bool:
        """Whether the difference stands out: its interval leaves zero out, as printed too, and the
        corrected p-value is small."""
        if self.difference is None or not self.p_holm < LEVEL:
            return False
        found = self.difference.interval
        return found._replace(low=round(found.low, 4), high=round(found.high, 4)).excludes_zero


def write(folder: str | os.PathLike, *, interval: str = "t") -> list[pathlib.Path]:
    """report.md, report.csv, forest.png and curves.png of an ablation's folder.

    `interval`: t or bootstrap (see `analysis.statistics`); p-values are those of paired t-tests
    with either. Raises `UserError` where there is no ablation, or no cell of it is complete.
    """
    statistics.check_method(interval)
    folder = pathlib.Path(folder)
    plan = _plan(folder)
    rows = [
        Row(one["name"], one["overrides"], _cells(folder / one["name"], plan["seeds"]))
        for one in plan["rows"]
    ]
    if not any(row.complete for row in rows):
        states = collections.Counter(cell.status for row in rows for cell in row.cells.values())
        counts = ", ".join(f"{n} {status}" for status, n in sorted(states.items()))
        raise UserError(f"{folder}: no cell is complete ({counts}): there is nothing to report")
    told = _tell(rows, plan["baseline"], interval)
    paths = [folder / name for name in ("report.md", "report.csv", "forest.png", "curves.png")]
    _forest(told, plan, paths[2])
    _curves(rows, plan["baseline"], paths[3])
    write_text(paths[1], printable(_csv(told, plan["seeds"])))
    write_text(paths[0], printable(_markdown(told, plan, interval, folder)))
    return paths


# ---------------------------------------------------------------------------- reading


def _plan(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "ablation.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no ablation here (ablation.json is missing); give an ablation's --workdir"
        )
    plan = workdirs.read_json(path)
    if missing := {"config", "baseline", "seeds", "rows"} - set(plan):
        raise UserError(f"{path} is damaged ({', '.join(sorted(missing))} missing)")
    return plan


def _cells(folder: pathlib.Path, number: int) -> dict[int, Cell]:
    return {seed: _cell(folder / f"seed{seed}") for seed in range(number)}


def _cell(workdir: pathlib.Path) -> Cell:
    """Complete is what has a test accuracy; a cell that cannot be read spoils no other."""
    try:
        record = records.read(workdir) if (workdir / "config.json").is_file() else None
        if record is not None and record.last("test/accuracy") is not None:
            return Cell("complete", record=record)
        beside = workdir.with_name(f"{workdir.name}.json")
        if not beside.is_file():
            return Cell("missing" if record is None else "interrupted")
        found = workdirs.read_json(beside)
        if found["status"] == "complete":
            return Cell("damaged", "said to be complete, and its log has no test accuracy")
        return Cell(found["status"], found.get("error") or "")
    except (UserError, KeyError, TypeError) as error:
        return Cell("damaged", str(error))


# ---------------------------------------------------------------------------- numbers


def _tell(rows: Sequence[Row], baseline: str, method: str) -> list[Told]:
    reference = next((r.values("test/accuracy") for r in rows if r.name == baseline), {})
    differences = [
        None
        if row.name == baseline
        else statistics.paired(row.values("test/accuracy"), reference, method=method)
        for row in rows
    ]
    corrected = statistics.holm([math.nan if d is None else d.p for d in differences])
    told = []
    for row, difference, p_holm in zip(rows, differences, corrected):
        accuracy, fit = row.values("test/accuracy"), row.values("fit/accuracy")
        done = row.complete.values()
        told.append(
            Told(
                row,
                statistics.mean(list(accuracy.values()), method=method),
                statistics.mean([1 - value for value in accuracy.values()], method=method),
                difference,
                p_holm,
                _mean(fit[s] - accuracy[s] for s in fit),
                next((size for record in done if (size := records.size(record))), None),
                _mean(record.seconds_per_step for record in done),
                _mean(record.seconds for record in done),
            )
        )
    return told


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


# ---------------------------------------------------------------------------- tables


def _csv(told: Sequence[Told], number: int) -> str:
    """Shares of 1, not per cent; empty where nothing is known; a column for each seed's value."""
    table = []
    for one in told:
        row, line = one.row, {"row": one.row.name, "seeds": number, "complete": one.accuracy.n}
        states = collections.Counter(cell.status for cell in row.cells.values())
        for status in ("failed", "diverged", "interrupted", "damaged", "missing"):
            line[status] = states[status]
        apart = one.difference or Difference(Interval(*[math.nan] * 3, 0), math.nan)
        for name, found in (
            ("accuracy", one.accuracy),
            ("error", one.error),
            ("difference", apart.interval),
        ):
            line |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        line |= {"pairs": apart.interval.n, "p": apart.p, "p_holm": one.p_holm, "gap": one.gap}
        line |= dict(zip(("parameters", "macs"), one.size or (None, None)))
        line |= {"seconds_per_step": one.seconds_per_step, "seconds": one.seconds}
        accuracy = row.values("test/accuracy")
        line |= {f"accuracy_seed{s}": accuracy.get(s) for s in range(number)}
        table.append({k: "" if v is None or v != v else v for k, v in line.items()})
    text = io.StringIO()
    out = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    out.writeheader()
    out.writerows(table)
    return text.getvalue()


def _markdown(told: Sequence[Told], plan: dict[str, Any], method: str, folder: pathlib.Path) -> str:
    columns = [
        *("row", "seeds", "test accuracy, %", "test error, %", "difference, points", "p", "p Holm"),
        *("train − test, points", "parameters", "MACs", "s per step", "time, s"),
    ]
    lines = [
        f"# Ablation: {folder.resolve().name}",
        "",
        f"{len(told)} rows × {plan['seeds']} seeds; the baseline is `{plan['baseline']}`.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|",
    ]
    lines += ["| " + " | ".join(_line(one)) + " |" for one in told]
    lines += ["", *_notes(told, plan, method), "", "![differences to the baseline](forest.png)", ""]
    lines += ["![learning curves](curves.png)", "", "## Rows", ""]
    for one in told:
        changed = ", ".join(f"`{name}={value!r}`" for name, value in one.row.overrides.items())
        lines.append(f"- {one.row.name}: {changed or 'the config as it is'}")
    broken = [
        f"- {one.row.name}, seed {s}: {cell.status}" + (f": {cell.error}" if cell.error else "")
        for one in told
        for s, cell in one.row.cells.items()
        if cell.record is None
    ]
    if broken:
        lines += ["", "## Cells without a result", "", *broken]
    return "\n".join(lines) + "\n"


def _notes(told: Sequence[Told], plan: dict[str, Any], method: str) -> list[str]:
    tests = sum(not math.isnan(one.p_holm) for one in told)
    kind = (
        "Student's t over the seeds"
        if method == "t"
        else f"the percentile bootstrap of {statistics.RESAMPLES:,} resamples, too narrow from a"
        " few seeds"
    )
    notes = [
        f"In brackets: 95 % intervals, {kind}. Differences to the baseline are paired by seed, over"
        f" the seeds that both have; p is that of the paired t-test, Holm's corrects for {tests}"
        f" tests. Bold: zero is outside the interval, and the corrected p is below {LEVEL}. No"
        " brackets: one seed, or equal values in all, which tell nothing of the spread.",
        "",
        "Means over the complete seeds: train − test is the accuracy on the training examples as"
        " they are (`train.evaluate_train`) less the test's; seconds per step leave out compiling,"
        " evaluating and saving, the time of a run does not.",
    ]
    if short := [one.row for one in told if one.row.without]:
        named = "; ".join(f"{row.name} ({row.without})" for row in short)
        notes += ["", f"Not all seeds are complete: {named}."]
    if not any(one.row.complete for one in told if one.row.name == plan["baseline"]):
        notes += ["", "No seed of the baseline is complete: there are no differences yet."]
    if _count_data(told) > 1:
        notes += [
            "",
            "**Not all cells have seen the same data**: they changed between the runs.",
        ]
        notes += ["The same command without --rows and --index runs the older cells again."]
    return notes


def _count_data(told: Sequence[Told]) -> int:
    """How many data sets the complete cells have seen; rows that choose their data do not count."""

    def chooses(field: str) -> bool:
        return field.startswith("data") and not field.startswith("data.augment")

    rows = [one.row for one in told if not any(map(chooses, one.row.overrides))]
    facts = [workdirs.read_facts(cell.workdir) for row in rows for cell in row.complete.values()]
    known = {
        json.dumps(one["fingerprint"], sort_keys=True) for one in facts if "fingerprint" in one
    }
    return len(known)


def _line(one: Told) -> list[str]:
    row, apart = one.row, one.difference
    parameters, macs = one.size or (None, None)
    difference = "baseline" if apart is None else _interval(apart.interval, "+.2f")
    if apart is not None and apart.interval.n < one.accuracy.n:
        difference += f" ({apart.interval.n} pairs)"
    return [
        row.name,
        f"{one.accuracy.n} of {len(row.cells)}" + (f" ({row.without})" if row.without else ""),
        _interval(one.accuracy),
        _interval(one.error),
        f"**{difference}**" if one.bold else difference,
        _p(math.nan if apart is None else apart.p),
        _p(one.p_holm),
        "-" if one.gap is None else f"{100 * one.gap:+.2f}",
        "-" if parameters is None else f"{parameters:,}",
        "-" if macs is None else f"{macs:,}",
        "-" if one.seconds_per_step is None else f"{one.seconds_per_step:.3g}",
        "-" if one.seconds is None else f"{one.seconds:.0f}",
    ]


def _interval(found: Interval, form: str = ".2f") -> str:
    if not found.n:
        return "-"
    # Zero is added so that none is -0.00.
    mean, low, high = (f"{round(100 * value, 2) + 0.0:{form}}" for value in found[:3])
    return f"{mean} [{low}, {high}]" if found.known else mean


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


# ---------------------------------------------------------------------------- pictures


def _forest(told: Sequence[Told], plan: dict[str, Any], png: pathlib.Path) -> None:
    baseline = next((one for one in told if one.row.name == plan["baseline"]), None)
    effects = []
    for one in told:
        if one.difference is None:
            continue
        mean, low, high, n = one.difference.interval
        points = Interval(100 * mean, 100 * low, 100 * high, n)
        ours = one.row.values("test/accuracy")
        theirs = baseline.row.values("test/accuracy") if baseline else {}
        pairs = [100 * (ours[s] - theirs[s]) for s in sorted(ours.keys() & theirs.keys())]
        without = f" ({one.row.without})" if one.row.without else ""
        effects.append(forest.Effect(one.row.name, points, pairs, f"no complete pair{without}"))
    title = f"against {plan['baseline']}"
    if baseline and baseline.accuracy.n:
        title += f": {100 * baseline.accuracy.mean:.2f} %, n={baseline.accuracy.n}"
    forest.draw_forest(effects, png, title=title, what="difference of test accuracy, points")


def _curves(rows: Sequence[Row], baseline: str, png: pathlib.Path) -> None:
    """Against the images seen, since batch sizes may differ; of the training batches, as they are
    augmented and mixed, where most runs validate too seldom for a curve."""
    logs = [record for row in rows for record in row.complete.values()]
    often = np.median([record.series("validation/accuracy")[0].size for record in logs]) > 2
    split, what = ("validation", "validation") if often else ("train", "training batches'")
    most = max(record.step * record.config.data.batch_size for record in logs)
    unit, word = (1000, "thousand images seen") if most >= 10_000 else (1, "images seen")
    drawn = {}
    for row in rows:
        drawn[row.name] = []
        for record in row.complete.values():
            steps, accuracy = record.series(f"{split}/accuracy")
            if not often:
                steps, accuracy = _windows(steps), _windows(accuracy)
            drawn[row.name].append((steps * record.config.data.batch_size / unit, 100 * accuracy))
    forest.draw_rows(drawn, baseline, png, what=f"{what} accuracy, %", across=word)


def _windows(series: np.ndarray, most: int = 25) -> np.ndarray:
    """Means of `most` windows at most: a few batches' accuracy is too noisy for a picture."""
    return np.array([part.mean() for part in np.array_split(series, most) if part.size])
