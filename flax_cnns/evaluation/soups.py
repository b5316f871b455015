"""Model soups: networks with averaged weights (Wortsman et al. 2022,
https://arxiv.org/abs/2203.05482).

The ingredients are checkpoints of one network: of one run, or of runs that were fine-tuned from the
same weights. An average of networks that were trained from different random weights is useless.

A soup costs as much as one network. Its BatchNorm statistics are not the average of the
ingredients' statistics: `refresh` estimates them again for the averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_cnns import tree as pytree
from flax_cnns.errors import UserError
from flax_cnns.types import PyTree

SOUPS = ("uniform", "greedy")

# Variables -> the same variables with other BatchNorm statistics.
Refresh = Callable[[PyTree], PyTree]


class Taste(NamedTuple):
    """One step of the greedy recipe."""

    ingredient: int  # its number, in the order in which the ingredients were given
    score: float  # of the soup with this ingredient
    kept: bool


class Soup(NamedTuple):
    """Averaged variables, and what went into them."""

    variables: PyTree
    kept: tuple[int, ...]  # numbers of the ingredients
    tastes: tuple[Taste, ...] = ()  # of the greedy recipe, in the order of trying


class WeightSum:
    """The sum of variables in float64 on the host, for averages of any number of networks."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._dtypes: dict[str, Any] = {}
        self.names: list[str] = []

    def add(self, variables: PyTree, name: str) -> None:
        """Adds variables; messages call them `name`. Raises UserError if paths or shapes differ
        from those of the first."""
        flat = {path: np.asarray(leaf) for path, leaf in pytree.flatten(variables).items()}
        if self.names:
            check_same_shapes(self._sums, flat, self.names[0], name)
        else:
            self._dtypes = {path: leaf.dtype for path, leaf in flat.items()}
        wide = {path: leaf.astype(np.float64) for path, leaf in flat.items()}
        self._sums = {
            path: self._sums[path] + wide[path] if self.names else wide[path] for path in wide
        }
        self.names.append(name)

    def mean_with(self, variables: PyTree | None = None, name: str = "") -> PyTree:
        """Returns the mean, in the dtypes of the first variables; also of `variables`, without
        adding them."""
        sums, count = self._sums, len(self.names)
        if variables is not None:
            flat = {path: np.asarray(leaf) for path, leaf in pytree.flatten(variables).items()}
            check_same_shapes(sums, flat, self.names[0], name)
            sums = {path: total + flat[path].astype(np.float64) for path, total in sums.items()}
            count += 1
        return pytree.unflatten(
            {path: (total / count).astype(self._dtypes[path]) for path, total in sums.items()}
        )


def check_same_shapes(
    first: Mapping[str, Any], other: Mapping[str, Any], first_name: str, other_name: str
) -> None:
    """Compares two networks, {path: array or shape}. Raises UserError with the first path that only
    one has, or whose shapes differ."""
    for path in dict.fromkeys([*first, *other]):
        if path not in first or path not in other:
            has, lacks = (first_name, other_name) if path in first else (other_name, first_name)
            raise UserError(f"a soup needs one network: {has} has {path}, {lacks} does not")
        if first[path].shape != other[path].shape:
            raise UserError(
                f"a soup needs one network: {path} is {list(first[path].shape)} in {first_name} and"
                f" {list(other[path].shape)} in {other_name}"
            )


def make_uniform_soup(
    ingredients: Iterable[tuple[str, PyTree]], *, refresh: Refresh = lambda variables: variables
) -> Soup:
    """Averages all ingredients, (name, variables); each is loaded when it is needed.

    `refresh` is called once, with the average, unless there is only one ingredient: a soup of one
    is that network. Raises UserError if paths or shapes differ, or without an ingredient.
    """
    total = WeightSum()
    for name, variables in ingredients:
        total.add(variables, name)
    if not total.names:
        raise UserError("a soup needs at least one ingredient")
    mean = total.mean_with()
    kept = tuple(range(len(total.names)))
    return Soup(mean if len(kept) == 1 else refresh(mean), kept)


def make_greedy_soup(
    load: Callable[[int], tuple[str, PyTree]],
    scores: Sequence[float],
    measure: Callable[[PyTree], float],
    *,
    refresh: Refresh = lambda variables: variables,
    say: Callable[[Taste], None] = lambda taste: None,
) -> Soup:
    """Adds ingredients from the best to the worst, and keeps those with which the soup is not worse
    (Wortsman et al. 2022, recipe 1).

    `load(i)` returns (name, variables) of ingredient `i`, `scores` [M] are the ingredients' own
    scores on held-out images, higher is better, and `measure` returns the score of variables on the
    same images. Among equal scores the first comes first. `refresh` is called with each average
    before it is measured, so what is measured is what is returned. `say` is called after each
    taste. Raises UserError if paths or shapes differ, or without an ingredient.
    """
    if not len(scores):
        raise UserError("a soup needs at least one ingredient")
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    total = WeightSum()
    name, soup = load(order[0])
    total.add(soup, name)
    tastes = [Taste(order[0], scores[order[0]], True)]
    say(tastes[0])
    best = scores[order[0]]
    for number in order[1:]:
        name, variables = load(number)
        tried = refresh(total.mean_with(variables, name))
        score = measure(tried)
        tastes.append(Taste(number, score, kept=score >= best))
        say(tastes[-1])
        if tastes[-1].kept:
            total.add(variables, name)
            soup, best = tried, score
    return Soup(soup, tuple(taste.ingredient for taste in tastes if taste.kept), tuple(tastes))
