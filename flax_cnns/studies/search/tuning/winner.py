"""The winner of a search: its config as a file, and its retraining with several seeds.

The file starts from the defaults and sets every field that differs, so it does not depend on the
config file that the search was given. Retraining is an ablation with the rows `given` and `winner`
in WORKDIR/retraining. Its seeds begin at `config.seed + 1`: no trial used them, because every trial
has `config.seed`. Only these runs are tested, with the given config's `train.test_on`.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis import statistics
from flax_cnns.errors import UserError
from flax_cnns.names import escape_unprintable
from flax_cnns.runs.metric import Metric, make_metric
from flax_cnns.studies.ablation import ablate as ablation
from flax_cnns.studies.ablation import plan, reading

WINNER_FILE = "winner.py"
RETRAINING_FOLDER = "retraining"
ROWS = ("given", "winner")


class FieldChange(NamedTuple):
    """A field in which the winner differs from the given config."""

    path: str
    given: Any  # None if the given config lacks the field
    winner: Any


def make_winner_config(given: ConfigDict, trial: ConfigDict) -> ConfigDict:
    """Returns the config of the best trial, tested as the given config says."""
    config = ConfigDict(trial.to_dict())
    config.train.test_on = given.train.test_on
    config.train.best_by = given.train.best_by  # --metric changes it in the trials
    return config


def list_changes(given: Any, winner: Any) -> list[FieldChange]:
    """Lists the fields of `winner` that differ from `given`. Values are those of JSON."""
    here, there = (configs.flatten(configs.to_plain(config)) for config in (winner, given))
    return [
        FieldChange(path, there.get(path), value)
        for path, value in here.items()
        if path not in there or there[path] != value
    ]


def format_winner(given: Any, winner: Any, title: str, workdir: str | os.PathLike) -> str:
    """Returns the source of a config file for `flax-cnns train`. `title` says what won."""
    changes = {change.path: change for change in list_changes(given, winner)}
    defaults = configs.flatten(configs.to_plain(configs.default_config()))
    flat = configs.flatten(configs.to_plain(winner))
    differing = {p: v for p, v in flat.items() if p not in defaults or defaults[p] != v}
    path = str(pathlib.Path(workdir) / WINNER_FILE)
    lines = [
        f'"""{_escape(title)}',
        "",
        f"  flax-cnns train --config={_escape(path)} --workdir=runs/winner",
        '"""',
        "",
        "from flax_cnns.config import default_config, set_config_field",
        "",
        "# Fields of the given config that differ from the defaults.",
        *_format_fields("GIVEN", {p: v for p, v in differing.items() if p not in changes}),
        "",
        "# Fields that the search changed.",
        *_format_fields("FOUND", {p: flat[p] for p in changes}, changes),
        "",
        "",
        "def get_config():",
        "    config = default_config()",
        "    for path, value in (GIVEN | FOUND).items():",
        "        set_config_field(config, path, value)",
        "    return config",
    ]
    return "\n".join(lines) + "\n"


def _format_fields(
    name: str, values: Mapping[str, Any], changes: Mapping[str, FieldChange] | None = None
) -> list[str]:
    lines = [f"{name} = {{"]
    for path, value in values.items():
        line = f"    {_format_value(path)}: {_format_value(value)},"
        if changes is not None:
            line += f"  # given: {_format_value(changes[path].given)}"
        lines.append(line)
    return [*lines, "}"] if values else [f"{name} = {{}}"]


def _escape(text: str) -> str:
    return escape_unprintable(text).replace("\\", "\\\\").replace('"', '\\"')


def _format_value(value: Any) -> str:
    """Returns the value as Python source: strings in double quotes, lists as tuples."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_format_value, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def write_winner(given: Any, winner: Any, title: str, folder: str | os.PathLike) -> pathlib.Path:
    """Writes winner.py into a search's folder. Raises UserError if it cannot be written."""
    path = pathlib.Path(folder) / WINNER_FILE
    files.write_text(path, format_winner(given, winner, title, folder))
    return path


def retrain(
    given: ConfigDict,
    winner: ConfigDict,
    folder: str | os.PathLike,
    *,
    seeds: int,
    metric: str = "accuracy",
    jobs: int | None = None,
    accept_changed_data: bool = False,
) -> dict[str, int]:
    """Trains the given config and the winner with `seeds` seeds each, and tests each run once.

    `metric`: NAME of `test/NAME`, which the ablation reports. Resumes as an ablation does. Returns
    {status: number of runs}. Raises UserError if the winner equals the given config, or if the
    given config is never tested.
    """
    changes = list_changes(given, winner)
    if not changes:
        raise UserError("the winner is the given config, so there is nothing to compare")
    base = ConfigDict(given.to_dict())
    base.seed += 1
    sweep = [(ROWS[0], {}), (ROWS[1], {change.path: change.winner for change in changes})]
    (_, row) = plan.make_rows(base, sweep)
    expected = configs.to_plain(winner) | {"seed": base.seed}
    if differs := configs.list_differences(configs.to_plain(row.config), expected):
        raise UserError(
            f"the winner cannot be made of the given config by setting fields: {'; '.join(differs)}"
        )
    return ablation.ablate(
        base,
        sweep,
        pathlib.Path(folder) / RETRAINING_FOLDER,
        seeds=seeds,
        metric=metric,
        jobs=jobs,
        accept_changed_data=accept_changed_data,
    )


def summarize_retraining(
    folder: str | os.PathLike, name: str = "accuracy", *, maximize: bool = True
) -> list[str] | None:
    """Returns the lines of the report on the retraining, about `test/NAME`; None if no pair of runs
    is complete."""
    place = pathlib.Path(folder) / RETRAINING_FOLDER
    if not (place / "ablation.json").is_file():
        return None
    seeds = reading.read_plan(place)["seeds"]
    values = {}
    for label in ROWS:
        row = reading.RowResults(label, {}, reading.read_cells(place / label, seeds))
        values[label] = row.values(f"test/{name}")
    difference = statistics.paired_difference(values["winner"], values["given"])
    if not difference.interval.n:
        return None
    metric = make_metric(name, [value for row in values.values() for value in row.values()])
    lines = [f"| config | seeds | test {name}{metric.unit} |", "|---|---:|---:|"]
    for label in ROWS:
        mean = statistics.mean(list(values[label].values()))
        lines.append(f"| {label} | {mean.n} | {_format_interval(mean, metric)} |")
    n, p = difference.interval.n, difference.p
    verdict = "the interval includes 0, so these seeds do not show a difference"
    if difference.interval.excludes_zero:
        better = "better" if (difference.interval.mean > 0) == maximize else "worse"
        verdict = f"the winner is {better} than the given config"
    elif not difference.interval.is_known:
        verdict = "the spread is unknown"
    lines += [
        "",
        f"Winner minus given, paired over {n} seed{'s' if n > 1 else ''}:"
        f" {_format_interval(difference.interval, metric, '+')}"
        f"{metric.difference_unit.replace(', ', ' ')}, p"
        f" {statistics.format_p(p)}; {verdict}.",
    ]
    return lines


def _format_interval(interval: statistics.Interval, metric: Metric, sign: str = "") -> str:
    mean, low, high = (metric.format(value, sign) for value in interval[:3])
    return f"{mean} [{low}, {high}]" if interval.is_known else mean
