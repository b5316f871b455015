"""Writes the report of a search of layers from the files in its folder. Trains nothing."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from flax_cnns import files
from flax_cnns.errors import UserError
from flax_cnns.models.nas import find_unread
from flax_cnns.runs import workdir as workdirs
from flax_cnns.studies.search.nas.layers import pictures
from flax_cnns.studies.search.nas.layers.space import LayersSpace
from flax_cnns.studies.search.nas.layers.trials import (
    METHODS,
    LayersTrial,
    find_best,
    read_trials,
)


class RewardComparison(NamedTuple):
    """Mean reward of the controller minus that of random search, over some trials of each."""

    difference: float
    low: float  # 95 % interval of Welch
    high: float
    p_rank: float  # two-sided, of Mann and Whitney: whether one's rewards are usually higher
    numbers: tuple[int, int]  # of trials


def compare_rewards(ours: Sequence[float], theirs: Sequence[float]) -> RewardComparison | None:
    """Compares two samples of rewards; None with fewer than two trials in one.

    The controller's trials depend on its earlier ones, so the interval tells about this search, not
    about searches with other seeds.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    difference = float(np.mean(ours) - np.mean(theirs))
    if np.ptp([*ours, *theirs]) == 0:
        return RewardComparison(0.0, 0.0, 0.0, 1.0, (len(ours), len(theirs)))
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    p = float(stats.mannwhitneyu(ours, theirs).pvalue)
    numbers = len(ours), len(theirs)
    return RewardComparison(difference, float(interval.low), float(interval.high), p, numbers)


def write(folder: str | os.PathLike) -> list[str]:
    """Writes report.md, trials.csv and the pictures. Returns their names.

    Raises UserError if the folder has no trials.
    """
    folder = pathlib.Path(folder)
    path = folder / "layers.json"
    found = {m: trials for m in METHODS if (trials := read_trials(folder, m))}
    if not path.is_file() or not found:
        raise UserError(f"{folder}: no search of layers here (no trials)")
    space = LayersSpace(**workdirs.read_json(path)["space"])
    window = max(5, min(map(len, found.values())) // 6)
    rewards = {method: [trial.reward for trial in trials] for method, trials in found.items()}
    pictures.draw_rewards(rewards, window, folder / "rewards.png")
    names = ["report.md", "trials.csv", "rewards.png"]
    for method, trials in found.items():
        best, name = find_best(trials), f"network-{method}.png"
        title = f"{method}: best of {len(trials)}, reward {best.reward:.4f}"
        fields = space.make_fields(best.decisions)
        strides = fields.get("strides", ())
        pictures.draw_network(fields["table"], folder / name, strides=strides, title=title)
        names.append(name)
    files.write_text(folder / "trials.csv", _format_csv(found))
    files.write_text(folder / "report.md", _format_markdown(folder, space, found, window))
    return names


def _format_csv(found: Mapping[str, Sequence[LayersTrial]]) -> str:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(("method", "trial", "network", "reward", "accuracy", "parameters", "seconds"))
    for method, trials in found.items():
        for t in trials:
            best = max(t.accuracies, default="")
            out.writerow((method, t.number, t.name, t.reward, best, t.params, t.seconds))
    return text.getvalue()


def _format_markdown(
    folder: pathlib.Path,
    space: LayersSpace,
    found: Mapping[str, Sequence[LayersTrial]],
    window: int,
) -> str:
    facts = workdirs.read_json(folder / "layers.json")
    lines = [
        f"# Search of {space.layers} layers: {folder.resolve().name}",
        "",
        f"{space.count_networks():.3g} networks; each child trains {facts['child_duration']} on"
        f" {facts['config']['data']['name']}, seed {facts['config']['seed']}. The reward is the"
        " cube of the best of the last five validation accuracies. No child reads the test split.",
        "",
        "| method | trials | networks trained | mean reward | first third | last third | best |"
        " at trial | parameters | hours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, trials in found.items():
        rewards, best = [t.reward for t in trials], find_best(trials)
        third = max(len(rewards) // 3, 1)
        seconds = {t.name: t.seconds for t in trials}
        means = (np.mean(rewards), np.mean(rewards[:third]), np.mean(rewards[-third:]))
        cells: list[Any] = [method, len(trials), len(seconds), *(f"{m:.4f}" for m in means)]
        cells += [f"{best.reward:.4f}", best.number, f"{best.params:,}"]
        cells += [f"{sum(seconds.values()) / 3600:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *_describe_comparison(found), ""]
    for method, trials in found.items():
        lines += [*_describe_network(method, space, find_best(trials)), ""]
    lines += [f"![rewards, and means of {window} trials](rewards.png)", ""]
    lines += [f"![best network of {method}](network-{method}.png)" for method in found]
    if (folder / "final" / "report.md").is_file():
        lines += ["", "Test accuracies of the best networks: [final](final/report.md)."]
    return "\n".join(lines) + "\n"


def _describe_comparison(found: Mapping[str, Sequence[LayersTrial]]) -> list[str]:
    """Says in words whether the controller proposed better networks than random search."""
    if set(found) != set(METHODS):
        other = next(method for method in METHODS if method not in found)
        return [
            f"Nothing to compare with yet: run the same command with --method={other} and as many"
            " trials."
        ]
    length = min(map(len, found.values()))
    ours, theirs = ([t.reward for t in found[m][:length]] for m in METHODS)
    half = length // 2
    compared = compare_rewards(ours[length - half :], theirs[length - half :])
    if compared is None:
        return ["Too few trials to compare the methods."]
    if compared.low > 0:
        verdict = "In this search the controller proposed better networks than random search."
    elif compared.high < 0:
        verdict = "In this search the controller proposed worse networks than random search."
    else:
        verdict = "This does not show that the controller proposes better networks than chance."
    our_best, their_best = max(ours), max(theirs)
    if our_best == their_best:
        ending = f"The best network of both has the reward {our_best:.4f}."
    else:
        ahead, behind = METHODS if our_best > their_best else METHODS[::-1]
        ending = (
            f"The best network of {length} is from {ahead}: {max(our_best, their_best):.4f}, and"
            f" {min(our_best, their_best):.4f} from {behind}. One search with one seed cannot tell"
            " whether that is more than luck."
        )
    return [
        f"In the second half ({half} trials each) the controller's mean reward minus random"
        f" search's is {compared.difference:+.4f}, 95 % interval {compared.low:+.4f} to"
        f" {compared.high:+.4f} (rank test: p = {compared.p_rank:.2g}). {verdict} {ending}"
    ]


def _describe_network(method: str, space: LayersSpace, trial: LayersTrial) -> list[str]:
    fields = space.make_fields(trial.decisions)
    table, strides = fields["table"], fields.get("strides", ())
    lines = [f"Best of {method}, trial {trial.number}, `{trial.name}`:", ""]
    lines += ["| layer | filters | takes |" + (" strides |" if strides else "")]
    lines += ["|---:|---|---|" + ("---|" if strides else "")]
    for i, ((height, width), filters, sources) in enumerate(table, 1):
        takes = ", ".join(str(j) if j else "images" for j in sources)
        row = f"| {i} | {height} × {width}, {filters} | {takes} |"
        lines.append(row + (f" {strides[i - 1][0]}, {strides[i - 1][1]} |" if strides else ""))
    unread = ", ".join(map(str, find_unread(table)))
    return [*lines, "", f"The head takes {unread}. `config.model.table={_to_literal(table)}`"]


def _to_literal(value: Any) -> str:
    """Formats nested rows as plain tuples without spaces, as a flag takes them."""
    if isinstance(value, tuple):
        inner = ",".join(map(_to_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)
