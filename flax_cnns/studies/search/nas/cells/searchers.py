"""Searches of cells that read a table: random search, regularized evolution, and the controller.

A search sees validation accuracies only. A cell that it proposes again counts as an evaluation
again. Searches with the same seed depend on nothing else, so a repeated search is the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from flax_cnns.models.nas_bench_201 import EDGES, parse_cell, write_cell
from flax_cnns.studies.search.nas.cells.space import SMALL_SPACE, list_cells
from flax_cnns.studies.search.nas.controller import (
    Categorical,
    Controller,
    search_with_controller,
)

POPULATION, SAMPLE = 10, 3  # of the evolution
CONTROLLER_RATE = 0.03
Evaluate = Callable[[str], float]  # cell -> validation accuracy in 0..1


class Searcher(NamedTuple):
    """A way to search. `search(evaluate, evaluations, seed)` returns the cells in their order."""

    search: Callable[[Evaluate, int, int], list[str]]
    description: str


def search_at_random(evaluate: Evaluate, evaluations: int, seed: int) -> list[str]:
    """Evaluates different cells, drawn at random."""
    cells = _draw_cells(evaluations, seed)
    for cell in cells:
        evaluate(cell)
    return cells


def search_by_evolution(evaluate: Evaluate, evaluations: int, seed: int) -> list[str]:
    """Regularized evolution: Real et al. 2019, https://arxiv.org/abs/1802.01548, algorithm 1.

    The first cells are drawn at random. Then the best of a sample of the population is the parent
    of a new cell, with another operation on one edge, and the oldest cell dies. The paper has a
    population of 100 and samples of 25 for 20,000 evaluations. The first cells are those of
    `search_at_random` with the same seed.
    """
    random = np.random.RandomState(seed + 1_000_000)
    history = _draw_cells(min(POPULATION, evaluations), seed)
    population = deque((cell, evaluate(cell)) for cell in history)
    while len(history) < evaluations:
        sample = [population[i] for i in random.choice(len(population), SAMPLE, replace=False)]
        parent = max(sample, key=lambda member: member[1])[0]
        child = _mutate(parent, random)
        population.append((child, evaluate(child)))
        population.popleft()
        history.append(child)
    return history


def search_by_controller(
    evaluate: Evaluate, evaluations: int, seed: int, learning_rate: float = CONTROLLER_RATE
) -> list[str]:
    """REINFORCE: Zoph & Le 2016, with an update after each cell.

    The reward is the cube of the accuracy, as in the paper.
    """
    history: list[str] = []

    def reward(decisions: Sequence[int]) -> float:
        history.append(write_cell([SMALL_SPACE[i] for i in decisions]))
        return evaluate(history[-1]) ** 3

    controller = _make_controller(learning_rate)
    search_with_controller(controller, reward, trials=evaluations, seed=seed)
    return history


@cache  # one compilation for all seeds
def _make_controller(learning_rate: float) -> Controller:
    edges = [Categorical(f"edge{i}_{j}", len(SMALL_SPACE)) for i, j in EDGES]
    return Controller(edges, learning_rate=learning_rate)


def _search_with_paper_rate(evaluate: Evaluate, evaluations: int, seed: int) -> list[str]:
    return search_by_controller(evaluate, evaluations, seed, learning_rate=6e-4)


SEARCHERS = {
    "random": Searcher(search_at_random, "different cells at random"),
    "evolution": Searcher(
        search_by_evolution,
        f"regularized evolution, population {POPULATION}, samples of {SAMPLE}",
    ),
    "controller": Searcher(
        search_by_controller, f"LSTM and REINFORCE, learning rate {CONTROLLER_RATE:g}"
    ),
    "controller, paper's rate": Searcher(
        _search_with_paper_rate, "LSTM and REINFORCE, learning rate 0.0006"
    ),
}


def _draw_cells(count: int, seed: int) -> list[str]:
    cells = list_cells(SMALL_SPACE)
    return [cells[i] for i in np.random.RandomState(seed).permutation(len(cells))[:count]]


def _mutate(cell: str, random: np.random.RandomState) -> str:
    """Returns the cell with another operation on one edge."""
    operations = list(parse_cell(cell))
    edge = random.randint(len(operations))
    others = [name for name in SMALL_SPACE if name != operations[edge]]
    operations[edge] = others[random.randint(len(others))]
    return write_cell(operations)
