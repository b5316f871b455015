"""Compound scaling search, as in Tan & Le 2019, section 3.3: https://arxiv.org/abs/1905.11946

1. A grid over alpha (depth), beta (width) and gamma (resolution) with alpha * beta^2 * gamma^2
   close to a budget. Each point is trained once, and the best on the validation split wins. Widths
   and depths are rounded, so the formula is far off for small networks. Therefore points whose
   measured MACs miss the budget are skipped, and points that round to the same network are trained
   once (with few blocks in a stage, many values of alpha do; the smallest is used).
2. As in table 7 of the paper, the base network is scaled by depth alone, by width alone, by
   resolution alone, and by all three in the winner's proportions, each to the same number of MACs
   as far as the rounding allows. These networks are trained with other seeds than the grid and
   compared on the test split, because the validation split chose the winner.

Every trial is a run (`flax_cnns.run`) in its own directory under the search's folder. When the
search is started again, it skips complete trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.table import Table

from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.analysis.cost import cost
from flax_cnns.analysis.plots.style import save_picture
from flax_cnns.config.checks import is_reference
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model
from flax_cnns.names import open_log
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.network import get_model_fields, make_model
from flax_cnns.runs.own_parts import find_network
from flax_cnns.runs.train import run
from flax_cnns.runtime import output
from flax_cnns.runtime.preemption import Preempted
from flax_cnns.studies import own_parts

FORMULA_TOLERANCE = 0.1  # relative difference of alpha * beta^2 * gamma^2 from the budget
MACS_TOLERANCE = 0.15  # relative difference of the MACs from budget times the base's MACs


class ScalingFactors(NamedTuple):
    """Factors on the base network's width, depth and resolution."""

    width_mult: float = 1.0
    depth_mult: float = 1.0
    resolution_mult: float = 1.0


class Trial(NamedTuple):
    """A scaled network to train."""

    kind: str  # base, grid, depth, width, resolution, compound
    scale: ScalingFactors
    resolution: int  # pixels
    params: int
    macs: int  # of one image

    @property
    def network(self) -> tuple[int, int, int]:
        """A key that equal networks share: rounding can map many factors to one network."""
        return self.resolution, self.params, self.macs

    def config(self, base: ConfigDict, seed: int) -> ConfigDict:
        """Returns the config of a run of this trial."""
        config = ConfigDict(base.to_dict())
        config.model.width_mult = base.model.get("width_mult", 1.0) * self.scale.width_mult
        config.model.depth_mult = base.model.get("depth_mult", 1.0) * self.scale.depth_mult
        config.data.image_size = self.resolution
        config.seed = seed
        return config


class TrialResult(NamedTuple):
    """A trial with the accuracies of its runs."""

    trial: Trial
    accuracy: list[float]  # one for each seed; on validation in the grid, otherwise on test


class SearchResult(NamedTuple):
    """The result of `search`."""

    base: TrialResult
    grid: list[TrialResult]  # in the order of the trials
    winner: tuple[float, float, float]  # alpha, beta, gamma
    scaled: list[TrialResult]  # depth, width, resolution, compound


def make_grid(budget: float = 2.0, step: float = 0.1) -> list[tuple[float, float, float]]:
    """Returns all (alpha, beta, gamma) within 10 % of the budget, sorted.

    The values are 1 plus multiples of `step`, and alpha * beta^2 * gamma^2 is compared with
    `budget`. Raises UserError if there are none.
    """
    if budget <= 1 or step <= 0:
        raise UserError(f"expected a budget above 1 and a step above 0, got {budget} and {step}")
    steps = [1 + i * step for i in range(int((budget * (1 + FORMULA_TOLERANCE) - 1) / step) + 1)]
    points = [
        (round(a, 6), round(b, 6), round(c, 6))
        for a in steps
        for b in steps
        for c in steps
        if abs(a * b**2 * c**2 / budget - 1) <= FORMULA_TOLERANCE
    ]
    if not points:
        raise UserError(f"no multiples of {step} give {budget} within 10 %; use a smaller --step")
    return points


class Planner:
    """Scales the config's network and counts its parameters and MACs. Trains nothing."""

    def __init__(self, config: ConfigDict):
        dataset = load_dataset(config.data)
        self.fingerprint = dataset.fingerprint
        self.size, self.channels = config.data.image_size, dataset.image_shape[-1]
        self.config, self.dataset, self.network = config, dataset, find_network(config)
        self.fields = {"num_classes": dataset.num_classes, **get_model_fields(config)}
        self.width = self.fields.pop("width_mult", 1.0)
        self.depth = self.fields.pop("depth_mult", 1.0)
        self._counted: dict[tuple, tuple[int, int]] = {}

    def make_trial(self, kind: str, scale: ScalingFactors) -> Trial:
        """Scales the network and counts it, once for each network."""
        size = round(self.size * scale.resolution_mult)
        key = (self.width * scale.width_mult, self.depth * scale.depth_mult, size)
        if key not in self._counted:
            width, depth, _ = key
            shape = (size, size, self.channels)
            multipliers: dict[str, Any] = dict(width_mult=width, depth_mult=depth)
            total = cost(self._make_network(multipliers, shape), (1, *shape))
            self._counted[key] = total.params, total.macs
        return Trial(kind, scale, size, *self._counted[key])

    def _make_network(self, multipliers: dict[str, Any], shape: tuple[int, int, int]) -> nn.Module:
        if self.network is None:
            return create_model(**self.fields, **multipliers, input_size=shape)
        config = ConfigDict(self.config.to_dict())
        config.model.update(multipliers)
        dataset = dataclasses.replace(self.dataset, image_shape=shape)
        return make_model(config, dataset, self.network)

    def select_near(self, macs: float, points: list[tuple[float, float, float]]) -> list[Trial]:
        """Returns the trials of a grid's points within 15 % of these MACs, each network once.

        Raises UserError if there are none.
        """
        trials = [self.make_trial("grid", make_compound_factors(point, 1.0)) for point in points]
        near = [trial for trial in trials if abs(trial.macs / macs - 1) <= MACS_TOLERANCE]
        if not near:
            raise UserError(
                f"none of the grid's {len(points)} networks has {macs:.3g} MACs within"
                f" {MACS_TOLERANCE:.0%}; use a smaller --step"
            )
        unique = {trial.network: trial for trial in reversed(near)}
        return list(reversed(unique.values()))

    def find_at_macs(
        self, kind: str, macs: float, scale: Callable[[float], ScalingFactors]
    ) -> Trial:
        """Returns the trial `scale(x)`, x >= 0, whose MACs are nearest to `macs`.

        The MACs must grow with x; they grow in steps. Raises UserError if they stay below `macs`.
        """
        low, high = 0.0, 1.0
        while self.make_trial(kind, scale(high)).macs < macs:
            if high > 1e3:
                raise UserError(f"scaling by {kind} does not reach {macs:.3g} MACs")
            low, high = high, 2 * high
        while high - low > 1e-3:
            middle = (low + high) / 2
            if self.make_trial(kind, scale(middle)).macs < macs:
                low = middle
            else:
                high = middle
        return min(
            (self.make_trial(kind, scale(x)) for x in (low, high)), key=lambda t: abs(t.macs - macs)
        )


def make_compound_factors(winner: tuple[float, float, float], phi: float) -> ScalingFactors:
    """Returns depth alpha^phi, width beta^phi and resolution gamma^phi."""
    alpha, beta, gamma = winner
    return ScalingFactors(width_mult=beta**phi, depth_mult=alpha**phi, resolution_mult=gamma**phi)


@output.safe()
def search(
    config: ConfigDict,
    folder: str | os.PathLike,
    *,
    budget: float = 2.0,
    step: float = 0.1,
    phi: float = 2.0,
    seeds: int = 3,
    accept_changed_data: bool = False,
    say: Callable[[str], None] = print,
) -> SearchResult:
    """Trains the grid, then compares ways to spend budget^phi times the base network's MACs.

    The network of `config`, the config of a run, must have `width_mult` and `depth_mult`; its
    `data.image_size` is the base resolution. `accept_changed_data`: as in `run`. Raises UserError
    as a run does.
    """
    workdirs.check_location(folder := pathlib.Path(folder))
    if not 0 < phi < math.inf:
        raise UserError(f"expected phi above 0, got {phi}: the search scales the base network up")
    configs.validate(config)
    configs.check_new_run(config, folder, begun=any(folder.glob("*/config.json")), say=say)
    _check_config(config)
    planner = Planner(config)
    base = planner.make_trial("base", ScalingFactors())
    say("counting the grid's networks")
    trials = planner.select_near(base.macs * budget, make_grid(budget, step))
    say(
        f"{len(trials)} points of the grid, then 5 networks with {seeds}"
        f" {'seed' if seeds == 1 else 'seeds'} each"
    )
    data = dict(accept_changed_data=accept_changed_data, fingerprint=planner.fingerprint)
    runner = _Runner(config, folder, len(trials) + 5 * seeds, say, data)
    grid = [TrialResult(t, [runner.get_accuracy(t, config.seed, "validation")]) for t in trials]
    # Of equal accuracies, the cheapest network wins, then the first.
    best = max(grid, key=lambda result: (result.accuracy[0], -result.trial.macs)).trial.scale
    winner = best.depth_mult, best.width_mult, best.resolution_mult
    macs = base.macs * budget**phi
    trials = [
        base,
        planner.find_at_macs("depth", macs, lambda x: ScalingFactors(depth_mult=1 + x)),
        planner.find_at_macs("width", macs, lambda x: ScalingFactors(width_mult=1 + x)),
        planner.find_at_macs("resolution", macs, lambda x: ScalingFactors(resolution_mult=1 + x)),
        planner.find_at_macs("compound", macs, lambda x: make_compound_factors(winner, x)),
    ]
    test_seeds = range(config.seed + 1, config.seed + 1 + seeds)
    # If the winner scales in one way alone, two trials have the same network, trained once.
    accuracies: dict[tuple, list[float]] = {}
    for trial in trials:
        if trial.network not in accuracies:
            accuracies[trial.network] = [
                runner.get_accuracy(trial, seed, "test") for seed in test_seeds
            ]
    results = [TrialResult(trial, accuracies[trial.network]) for trial in trials]
    return SearchResult(results[0], grid, winner, results[1:])


def _check_config(config: ConfigDict) -> None:
    """Raises UserError for a config with which the search cannot scale or compare networks."""
    configs.require_test(config, "networks are compared on the test split")
    own_parts.refuse_opaque(config, "the search starts its runs from configs")
    if is_reference(config.data.name) or config.data.name.endswith(".npz"):
        raise UserError(
            f"data.name={config.data.name!r}: the search scales data.image_size, but own data have"
            " a fixed size; use a data set of the package, such as folder"
        )
    if config.train.best_by not in ("auto", "validation/accuracy"):
        raise UserError(
            f"train.best_by={config.train.best_by!r}: the search compares validation accuracies;"
            " leave it at 'auto'"
        )


# ---------------------------------------------------------------------------- results


def make_table(result: SearchResult) -> Table:
    """Makes a table of the grid, best first, and of the networks with equal MACs."""
    out = Table(title="compound scaling: depth, width and resolution relative to the base network")
    columns = ("network", "depth", "width", "resolution", "parameters", "MACs", "of the base's")
    for column in (*columns, "accuracy"):
        out.add_column(column, justify="left" if column == "network" else "right")

    def add(name: str, result: TrialResult, base_macs: int) -> None:
        trial, s = result.trial, result.trial.scale
        mean, n = np.mean(result.accuracy), len(result.accuracy)
        spread = f" sd {np.std(result.accuracy, ddof=1):.2%}, n={n}" if n > 1 else ", n=1"
        out.add_row(
            name,
            f"{s.depth_mult:.2f}",
            f"{s.width_mult:.2f}",
            f"{s.resolution_mult:.2f} ({trial.resolution})",
            f"{trial.params:,}",
            f"{trial.macs / 1e6:.2f} M",
            f"{trial.macs / base_macs:.2f}",
            f"{mean:.2%}{spread}",
        )

    base_macs = result.base.trial.macs
    for grid_result in sorted(result.grid, key=lambda r: -r.accuracy[0]):
        add("grid, validation", grid_result, base_macs)
    out.add_section()
    for scaled in (result.base, *result.scaled):
        add(f"{scaled.trial.kind}, test", scaled, base_macs)
    return out


def draw(result: SearchResult, png: pathlib.Path) -> None:
    """Draws the grid's accuracies (left) and those of each way of scaling (right)."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    alpha, beta, gamma = np.array([_get_point(r) for r in result.grid]).T
    best = [r.accuracy[0] for r in result.grid]
    dots = left.scatter(
        beta, gamma, c=np.multiply(best, 100), s=30 + 400 * (alpha - 1), cmap="viridis", alpha=0.8
    )
    left.scatter(*result.winner[1:], marker="x", color="black", s=80, label="winner")
    figure.colorbar(dots, ax=left, label="validation accuracy, %")
    left.set(xlabel="beta: width", ylabel="gamma: resolution", title="grid; size of a dot: alpha")
    left.legend()
    for scaled in (result.base, *result.scaled):
        accuracy = np.multiply(scaled.accuracy, 100)
        macs = scaled.trial.macs / 1e6
        (line,) = right.plot([macs], [accuracy.mean()], "o", label=scaled.trial.kind)
        right.plot([macs] * len(accuracy), accuracy, "_", color=line.get_color(), markersize=10)
        if scaled is not result.base:
            start = result.base.trial.macs / 1e6, 100 * np.mean(result.base.accuracy)
            ends = zip(start, (macs, accuracy.mean()))
            right.plot(*ends, color=line.get_color(), alpha=0.4)
    right.set(xlabel="MACs of an image, millions", ylabel="test accuracy, %")
    right.set_title(f"dashes: single seeds ({len(result.base.accuracy)})")
    right.legend(fontsize=8)
    save_picture(figure, png)


def save(result: SearchResult, path: pathlib.Path, flags: dict[str, float]) -> None:
    """Writes the result and the command's flags into a JSON file."""

    def to_dict(result: TrialResult) -> dict:
        trial = result.trial
        return trial._asdict() | {"scale": trial.scale._asdict(), "accuracy": result.accuracy}

    content = {
        "flags": flags,
        "winner": dict(zip(("alpha", "beta", "gamma"), result.winner)),
        "grid": [to_dict(r) for r in result.grid],  # validation accuracy
        "base": to_dict(result.base),  # test accuracy from here on
        "scaled": [to_dict(r) for r in result.scaled],
    }
    files.write_json(path, content)


def _get_point(result: TrialResult) -> tuple[float, float, float]:
    width_mult, depth_mult, resolution_mult = result.trial.scale
    return depth_mult, width_mult, resolution_mult


class _Runner:
    """Trains trials one after the other and prints the progress."""

    def __init__(
        self, config: ConfigDict, folder: pathlib.Path, total: int, say: Callable, data: dict
    ):
        self.config, self.folder, self.total, self.say = config, folder, total, say
        self.data = data  # arguments of `run`
        self.done = 0
        self.seconds: list[float] = []

    def get_accuracy(self, trial: Trial, seed: int, split: str) -> float:
        """Trains a trial unless its run is complete. Returns the accuracy on `split`.

        The run's output goes into a text file with the name of its directory.
        """
        s = trial.scale
        name = f"{trial.kind}-d{s.depth_mult:.3f}-w{s.width_mult:.3f}-r{trial.resolution}-{seed}"
        workdir, start_time = self.folder / name, time.perf_counter()
        is_new = not (workdir / "summary.json").is_file()
        self.folder.mkdir(parents=True, exist_ok=True)
        config = workdirs.reset_inert_if_new(trial.config(self.config, seed), workdir)
        try:
            with open_log(self.folder / f"{name}.txt") as log, contextlib.redirect_stdout(log):
                summary = run(config, workdir, **self.data)
        except Preempted as preempted:
            step = preempted.step
            self.say(f"{name}: saved at step {step}; run the same command again to resume")
            raise
        jax.clear_caches()  # dozens of programs that are not used again
        self.done += 1
        if is_new:
            self.seconds.append(time.perf_counter() - start_time)
        mean_seconds = sum(self.seconds) / max(len(self.seconds), 1)
        minutes_left = mean_seconds * (self.total - self.done) / 60
        accuracy = summary["test/accuracy" if split == "test" else "validation/best_accuracy"]
        self.say(
            f"{self.done}/{self.total} {name}: {trial.macs / 1e6:.1f} MMACs, {accuracy:.2%} "
            f"{split}, about {minutes_left:.0f} min left"
        )
        return accuracy
