"""Compound scaling, searched for as Tan & Le 2019 do, section 3.3: https://arxiv.org/abs/1905.11946

First a grid over alpha (depth), beta (width) and gamma (resolution) with alpha * beta^2 * gamma^2
close to a budget, each point trained once; the best on the validation split wins. Widths and depths
are rounded, so that the formula is far off for small networks: only points count whose MACs, as
counted, are close to the budget too, and of points that are one network the first (with few blocks
a stage many alphas are: the smallest stands for them). Then, as in the
paper's table 7, the network scaled in one way alone, by depth, width or resolution, and in all
three by the winner, to the same number of MACs, as near as the rounding lets it. Those are trained
anew with other seeds than the grid's, and told by the test split, since the winner was chosen by
the other one.

Every trial is a run (`flax_cnns.run`) in a directory of its own under the search's: started again,
the search repeats none that is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

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

FORMULA_TOLERANCE = 0.1  # of alpha * beta^2 * gamma^2 from the budget, relative
MACS_TOLERANCE = 0.15  # of the MACs from budget times the base's, relative


class ScalingFactors(NamedTuple):
    """On the base network's width, depth and resolution."""

    width_mult: float = 1.0
    depth_mult: float = 1.0
    resolution_mult: float = 1.0


class Trial(NamedTuple):
    """A network to train: the base, scaled."""

    kind: str  # base, grid, depth, width, resolution, compound
    scale: ScalingFactors
    resolution: int  # pixels
    params: int
    macs: int  # of one image

    @property
    def network(self) -> tuple[int, int, int]:
        """Equal for equal networks: rounding makes one of many factors."""
        return self.resolution, self.params, self.macs

    def config(self, base: ConfigDict, seed: int) -> ConfigDict:
        config = ConfigDict(base.to_dict())
        config.model.width_mult = base.model.get("width_mult", 1.0) * self.scale.width_mult
        config.model.depth_mult = base.model.get("depth_mult", 1.0) * self.scale.depth_mult
        config.data.image_size = self.resolution
        config.seed = seed
        return config


class TrialResult(NamedTuple):
    """A trial with what its runs reached."""

    trial: Trial
    accuracy: list[float]  # of each seed: the grid's on validation, else on test


class SearchResult(NamedTuple):
    base: TrialResult
    grid: list[TrialResult]  # in the order of trials
    winner: tuple[float, float, float]  # alpha, beta, gamma
    scaled: list[TrialResult]  # depth, width, resolution, compound


def make_grid(budget: float = 2.0, step: float = 0.1) -> list[tuple[float, float, float]]:
    """(alpha, beta, gamma), multiples of `step` from 1 with alpha * beta^2 * gamma^2 within 10 % of
    `budget`; sorted. Raises `UserError` where there are none."""
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
        raise UserError(f"no multiples of {step} give {budget} within 10 %; take a smaller --step")
    return points


class Planner:
    """Scales the config's network and counts it; nothing is trained."""

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
        size = round(self.size * scale.resolution_mult)
        key = (self.width * scale.width_mult, self.depth * scale.depth_mult, size)
        if key not in self._counted:
            width, depth, _ = key
            shape = (size, size, self.channels)
            mults = dict(width_mult=width, depth_mult=depth)
            found = cost(self._make(mults, shape), (1, *shape))
            self._counted[key] = found.params, found.macs
        return Trial(kind, scale, size, *self._counted[key])

    def _make(self, mults: dict[str, float], shape: tuple[int, int, int]) -> nn.Module:
        if self.network is None:
            return create_model(**self.fields, **mults, input_size=shape)
        config = ConfigDict(self.config.to_dict())
        config.model.update(mults)
        dataset = dataclasses.replace(self.dataset, image_shape=shape)
        return make_model(config, dataset, self.network)

    def select_near(self, macs: float, points: list[tuple[float, float, float]]) -> list[Trial]:
        """Of a grid's points those within 15 % of these MACs, each network once. Raises `UserError`
        where there is none."""
        trials = [self.make_trial("grid", make_compound_factors(point, 1.0)) for point in points]
        near = [trial for trial in trials if abs(trial.macs / macs - 1) <= MACS_TOLERANCE]
        if not near:
            raise UserError(
                f"none of the grid's {len(points)} networks has {macs:.3g} MACs within "
                f"{MACS_TOLERANCE:.0%}; take a smaller --step"
            )
        unique = {trial.network: trial for trial in reversed(near)}
        return list(reversed(unique.values()))

    def find_at_macs(
        self, kind: str, macs: float, scale: Callable[[float], ScalingFactors]
    ) -> Trial:
        """Of the trials `scale(x)`, x from 0 on, the one whose MACs, which grow by steps, are
        nearest. Raises `UserError` where they do not reach so many."""
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
    """The grid, its winner, and the ways to spend budget^phi times the base network's MACs.

    `config` is that of a run; its network has the fields `width_mult` and `depth_mult`, and its
    `data.image_size` is the base resolution. `accept_changed_data`: as in `run`. Raises `UserError`
    as a run does.
    """
    workdirs.check_location(folder)
    folder = pathlib.Path(folder)
    if not 0 < phi < math.inf:
        raise UserError(f"phi is above 0, got {phi}: what is compared is larger than the base")
    configs.validate(config)
    configs.check_new_run(config, folder, begun=any(folder.glob("*/config.json")), say=say)
    _check_own(config)
    planner = Planner(config)
    base = planner.make_trial("base", ScalingFactors())
    say("counting the grid's networks")
    trials = planner.select_near(base.macs * budget, make_grid(budget, step))
    say(f"{len(trials)} points of the grid, then 5 networks with {seeds} seeds each")
    data = dict(accept_changed_data=accept_changed_data, fingerprint=planner.fingerprint)
    runner = _Runner(config, folder, len(trials) + 5 * seeds, say, data)
    tried = [TrialResult(t, [runner.accuracy(t, config.seed, "validation")]) for t in trials]
    # Of equal ones the cheapest, then the first.
    best = max(tried, key=lambda found: (found.accuracy[0], -found.trial.macs)).trial.scale
    winner = best.depth_mult, best.width_mult, best.resolution_mult
    macs = base.macs * budget**phi
    trials = [
        base,
        planner.find_at_macs("depth", macs, lambda x: ScalingFactors(depth_mult=1 + x)),
        planner.find_at_macs("width", macs, lambda x: ScalingFactors(width_mult=1 + x)),
        planner.find_at_macs("resolution", macs, lambda x: ScalingFactors(resolution_mult=1 + x)),
        planner.find_at_macs("compound", macs, lambda x: make_compound_factors(winner, x)),
    ]
    others = range(config.seed + 1, config.seed + 1 + seeds)
    told: dict[tuple, list[float]] = {}  # a winner of one way alone is that network: trained once
    for trial in trials:
        if trial.network not in told:
            told[trial.network] = [runner.accuracy(trial, seed, "test") for seed in others]
    found = [TrialResult(trial, told[trial.network]) for trial in trials]
    return SearchResult(found[0], tried, winner, found[1:])


def _check_own(config: ConfigDict) -> None:
    """Raises `UserError` for own parts with which there is nothing to search or to compare."""
    own_parts.refuse_opaque(config, "the search starts its runs from configs")
    if is_reference(config.data.name) or config.data.name.endswith(".npz"):
        raise UserError(
            f"data.name={config.data.name!r}: the search scales data.image_size, and own data come"
            " at their own size; name a data set of the package, such as folder"
        )
    if config.train.best_by not in ("auto", "validation/accuracy"):
        raise UserError(
            f"train.best_by={config.train.best_by!r}: the search compares validation accuracies;"
            " leave it at 'auto'"
        )


# ---------------------------------------------------------------------------- what it found


def make_table(result: SearchResult) -> Table:
    """The grid, best first, and below it the networks of equal MACs."""
    out = Table(title="compound scaling: depth, width and resolution are factors on the base's")
    columns = ("network", "depth", "width", "resolution", "parameters", "MACs", "of the base's")
    for column in (*columns, "accuracy"):
        out.add_column(column, justify="left" if column == "network" else "right")

    def add(name: str, found: TrialResult) -> None:
        trial, s = found.trial, found.trial.scale
        mean, accuracies = np.mean(found.accuracy), found.accuracy
        n = len(accuracies)
        spread = f" sd {np.std(accuracies, ddof=1):.2%}, n={n}" if n > 1 else ", n=1"
        factors = (
            f"{s.depth_mult:.2f}",
            f"{s.width_mult:.2f}",
            f"{s.resolution_mult:.2f} ({trial.resolution})",
        )
        counts = (f"{trial.params:,}", f"{trial.macs / 1e6:.2f} M")
        counts += (f"{trial.macs / result.base.trial.macs:.2f}",)
        out.add_row(name, *factors, *counts, f"{mean:.2%}{spread}")

    for found in sorted(result.grid, key=lambda found: -found.accuracy[0]):
        add("grid, validation", found)
    out.add_section()
    for found in (result.base, *result.scaled):
        add(f"{found.trial.kind}, test", found)
    return out


def draw(result: SearchResult, png: pathlib.Path) -> None:
    """Left what the grid saw, right what each way of scaling reached."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    alpha, beta, gamma = np.array([_point(found) for found in result.grid]).T
    best = [found.accuracy[0] for found in result.grid]
    dots = left.scatter(
        beta, gamma, c=np.multiply(best, 100), s=30 + 400 * (alpha - 1), cmap="viridis", alpha=0.8
    )
    left.scatter(*result.winner[1:], marker="x", color="black", s=80, label="winner")
    figure.colorbar(dots, ax=left, label="validation accuracy, %")
    left.set(xlabel="beta: width", ylabel="gamma: resolution", title="grid; size of a dot: alpha")
    left.legend()
    for found in (result.base, *result.scaled):
        accuracy = np.multiply(found.accuracy, 100)
        macs = found.trial.macs / 1e6
        (line,) = right.plot([macs], [accuracy.mean()], "o", label=found.trial.kind)
        right.plot([macs] * len(accuracy), accuracy, "_", color=line.get_color(), markersize=10)
        if found is not result.base:
            start = result.base.trial.macs / 1e6, 100 * np.mean(result.base.accuracy)
            ends = zip(start, (macs, accuracy.mean()))
            right.plot(*ends, color=line.get_color(), alpha=0.4)
    right.set(xlabel="MACs of an image, millions", ylabel="test accuracy, %")
    right.set_title(f"each seed a dash; {len(result.base.accuracy)} seeds")
    right.legend(fontsize=8)
    save_picture(figure, png)


def save(result: SearchResult, path: pathlib.Path, flags: dict[str, float]) -> None:
    """Everything as JSON."""

    def row(found: TrialResult) -> dict:
        trial = found.trial
        return trial._asdict() | {"scale": trial.scale._asdict(), "accuracy": found.accuracy}

    content = {
        "flags": flags,
        "winner": dict(zip(("alpha", "beta", "gamma"), result.winner)),
        "grid": [row(found) for found in result.grid],  # validation accuracy
        "base": row(result.base),  # test accuracy from here on
        "scaled": [row(found) for found in result.scaled],
    }
    files.write_json(path, content)


def _point(found: TrialResult) -> tuple[float, float, float]:
    s = found.trial.scale
    return s.depth_mult, s.width_mult, s.resolution_mult


class _Runner:
    def __init__(
        self, config: ConfigDict, folder: pathlib.Path, total: int, say: Callable, data: dict
    ):
        self.config, self.folder, self.total, self.say = config, folder, total, say
        self.data = data  # arguments of `run`
        self.done, self.seconds = 0, []

    def accuracy(self, trial: Trial, seed: int, split: str) -> float:
        """Of the finished run on `split`; what the run itself prints is in its output.txt."""
        s = trial.scale
        name = f"{trial.kind}-d{s.depth_mult:.3f}-w{s.width_mult:.3f}-r{trial.resolution}-{seed}"
        workdir, began = self.folder / name, time.perf_counter()
        new = not (workdir / "summary.json").is_file()
        self.folder.mkdir(parents=True, exist_ok=True)
        config = workdirs.reset_inert_if_new(trial.config(self.config, seed), workdir)
        try:
            with open_log(self.folder / f"{name}.txt") as log, contextlib.redirect_stdout(log):
                summary = run(config, workdir, **self.data)
        except Preempted as left:
            self.say(f"{name}: saved at step {left.step}; the same command goes on")
            raise
        jax.clear_caches()  # dozens of programs, none of which comes again
        self.done += 1
        if new:
            self.seconds.append(time.perf_counter() - began)
        left = sum(self.seconds) / max(len(self.seconds), 1) * (self.total - self.done) / 60
        accuracy = summary["test/accuracy" if split == "test" else "validation/best_accuracy"]
        self.say(
            f"{self.done}/{self.total} {name}: {trial.macs / 1e6:.1f} MMACs, {accuracy:.2%} "
            f"{split}, about {left:.0f} min left"
        )
        return accuracy
