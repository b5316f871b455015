"""Draws the values of trials.

Each draw has a random generator of its own, seeded by (seed, number of the trial, path of the
field). So a draw depends on these and on the trials that have ended, and not on how often the
search was stopped. (With several jobs it also depends on the order in which trials end.)

tpe     the tree-structured Parzen estimator of Bergstra et al. 2011 (NeurIPS, Algorithms for
        hyper-parameter optimization), as in Optuna, with each field drawn by itself; the first ten
        trials are random. Running trials count as bad ones ("constant liar"), so that jobs at the
        same time do not try the same values.
random  independent draws
qmc     points of a scrambled Sobol sequence (Bergstra and Bengio 2012, JMLR 13, section 5): trial n
        is point n, and each field of the space is a dimension, whether drawn or not
grid    all combinations of the choices, of the integers, and of a few values of each other range,
        in an order shuffled by the seed
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flax_cnns import config as configs
from flax_cnns.config.spaces import Distribution, is_active
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.studies.search.tuning.storage import Journal, import_optuna

SAMPLERS = ("tpe", "random", "qmc", "grid")
GRID_POINTS = 5  # values of a range that is neither a choice nor at most this many integers
MAX_GRID = 10_000  # points

# (number of the trial, path, distribution) -> drawn value; a label for a choice
Draw = Callable[[int, str, Distribution], Any]


def check_sampler(sampler: str) -> None:
    """Raises UserError for an unknown sampler."""
    if sampler not in SAMPLERS:
        raise UserError(f"--sampler: unknown {sampler!r}{did_you_mean(sampler, SAMPLERS)}")


class Drawing:
    """The values of a trial.

    params: {path: drawn value} as Optuna knows it: a label for a choice.
    values: {path: drawn value}.
    fields: {path: value of the config's field}, made by `to_value`.
    """

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.fields: dict[str, Any] = {}


class Sampler:
    """Draws the trials of a study from a space. `config` is the config without the values.

    `first`: {path: drawn value} of the first trials. Fields that they lack are drawn at random.
    """

    def __init__(
        self,
        name: str,
        config: ConfigDict,
        space: Mapping[str, Distribution],
        seed: int,
        first: Sequence[Mapping[str, Any]] = (),
    ):
        check_sampler(name)
        self.name, self.config, self.space, self.seed = name, config, dict(space), seed
        self.first = [make_params(values, space) for values in first]
        self._flat = configs.flatten(config)

    def count_points(self) -> int | None:
        """Returns how many trials there can be; None if there is no limit."""
        return len(self.first) + len(self._grid) if self.name == "grid" else None

    def draw(self, number: int, journal: Journal | None = None) -> Drawing:
        """Draws the values of a trial. TPE reads the earlier trials from the journal."""
        if number < len(self.first):
            given = self.first[number]
            return self._follow(
                lambda path, distribution: (
                    given[path] if path in given else self._draw_random(number, path, distribution)
                )
            )
        if self.name == "grid":
            point = self._grid[number - len(self.first)]
            return self._follow(lambda path, distribution: point[path])
        if self.name == "qmc":
            at = self._sobol(number)
            return self._follow(lambda path, distribution: place(distribution, at[path]))
        if self.name == "random" or journal is None:
            return self._follow(functools.partial(self._draw_random, number))
        study = journal.load_study()
        return self._follow(functools.partial(self._draw_tpe, study, number, journal))

    def _follow(self, draw: Callable[[str, Distribution], Any]) -> Drawing:
        """Draws the fields in their order, without those whose condition is false."""
        drawing, flat = Drawing(), dict(self._flat)
        for path, distribution in self.space.items():
            if not is_active(distribution, flat):
                continue
            param = value = draw(path, distribution)
            if distribution.kind == "choice":
                value = distribution.values[distribution.labels.index(param)]
            field = distribution.make_value(value)
            drawing.params[path], drawing.values[path], drawing.fields[path] = param, value, field
            flat[path] = field
        drawing.values = configs.to_plain(drawing.values)
        drawing.fields = configs.to_plain(drawing.fields)
        return drawing

    def _draw_random(self, number: int, path: str, distribution: Distribution) -> Any:
        generator = np.random.default_rng(make_seed(self.seed, number, path))
        return place(distribution, generator.random())

    def _draw_tpe(
        self, study: Any, number: int, journal: Journal, path: str, distribution: Distribution
    ) -> Any:
        optuna = import_optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=make_seed(self.seed, number, path), multivariate=False, constant_liar=True
            )
        trial = optuna.trial.FrozenTrial(
            number=number,
            trial_id=-1,
            state=optuna.trial.TrialState.RUNNING,
            value=None,
            datetime_start=None,
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )
        return sampler.sample_independent(study, trial, path, journal.distributions[path])

    def _sobol(self, number: int) -> dict[str, float]:
        """Returns the coordinates of a point in [0, 1), by path."""
        from scipy.stats import qmc

        # A new sequence for each trial. Point 2^30 would be the last.
        sequence = qmc.Sobol(len(self.space), scramble=True, rng=np.random.default_rng(self.seed))
        if number:
            sequence.fast_forward(number)
        return dict(zip(self.space, sequence.random(1)[0].tolist()))

    @functools.cached_property
    def _grid(self) -> list[dict[str, Any]]:
        """The points in the order of the trials. Fields that a point does not use are absent."""
        points = list(itertools.islice(self._combine(), MAX_GRID + 1))
        if len(points) > MAX_GRID:
            raise UserError(
                f"--sampler=grid: the space has more than {MAX_GRID:,} points; use fewer fields, or"
                " another sampler"
            )
        order = np.random.default_rng(self.seed).permutation(len(points))
        return [points[i] for i in order]

    def _combine(self) -> Iterator[dict[str, Any]]:
        paths = list(self.space)

        def follow(point: dict[str, Any], flat: dict[str, Any], depth: int) -> Iterator[Any]:
            if depth == len(paths):
                yield point
                return
            path, distribution = paths[depth], self.space[paths[depth]]
            if not is_active(distribution, flat):
                yield from follow(point, flat, depth + 1)
                return
            for param in list_grid_values(distribution):
                value = param
                if distribution.kind == "choice":
                    value = distribution.values[distribution.labels.index(param)]
                field = distribution.make_value(value)
                yield from follow({**point, path: param}, {**flat, path: field}, depth + 1)

        yield from follow({}, self._flat, 0)


def make_params(values: Mapping[str, Any], space: Mapping[str, Distribution]) -> dict[str, Any]:
    """Returns the drawn values of a trial as Optuna knows them: with labels for choices.

    Raises UserError for a value that the space does not have.
    """
    params = {}
    for path, value in values.items():
        if path not in space:
            raise UserError(f"a first trial sets {path}, which the space does not have")
        distribution = space[path]
        if distribution.kind == "choice":
            known = [configs.to_plain({"value": each}) for each in distribution.values]
            wanted = configs.to_plain({"value": value})
            is_inside = wanted in known
            params[path] = distribution.labels[known.index(wanted)] if is_inside else value
        else:
            is_inside = distribution.low <= value <= distribution.high
            params[path] = value
        if not is_inside:
            raise UserError(f"a first trial has {path}={value!r}, which the space does not have")
    return params


def make_seed(seed: int, number: int, path: str) -> int:
    """Returns the seed of one draw, from 0 to 2^32 - 1."""
    digest = hashlib.sha256(f"{seed} {number} {path}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def place(distribution: Distribution, at: float) -> Any:
    """Returns the value at a place from 0 to 1 of a distribution: its inverse cumulative function.

    Returns a label for a choice.
    """
    if distribution.kind == "choice":
        return distribution.labels[
            min(int(at * len(distribution.labels)), len(distribution.labels) - 1)
        ]
    low, high = float(distribution.low), float(distribution.high)
    if distribution.kind == "integer":  # each integer has the interval of half a unit on each side
        low, high = low - 0.5, high + 0.5
    if distribution.log:
        value = math.exp(math.log(low) + at * (math.log(high) - math.log(low)))
    else:
        value = low + at * (high - low)
    value = min(max(value, distribution.low), distribution.high)
    return round(value) if distribution.kind == "integer" else value


def list_grid_values(distribution: Distribution, points: int = GRID_POINTS) -> list[Any]:
    """Returns the values of a grid: all choices or all of at most `points` integers, otherwise
    `points` values at equal distances (of the logarithm) from low to high."""
    if distribution.kind == "choice":
        return list(distribution.labels)
    low, high = distribution.low, distribution.high
    if distribution.kind == "integer" and high - low < points:
        return list(range(int(low), int(high) + 1))
    spaced = np.geomspace if distribution.log else np.linspace
    values = [low, *spaced(low, high, points)[1:-1].tolist(), high]
    if distribution.kind == "integer":
        return list(dict.fromkeys(round(value) for value in values))
    return [float(value) for value in values]
