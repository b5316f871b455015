"""Spaces, the table and its noise, searchers, regret, and the command, without trainings."""

from __future__ import annotations

import json
import re
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

from flax_cnns.errors import UserError
from flax_cnns.models.nas_bench_201 import parse_cell, write_cell
from flax_cnns.studies.search.nas.cells import regret, report, searchers, table
from flax_cnns.studies.search.nas.cells.space import (
    FULL_SPACE,
    SMALL_SPACE,
    describe_function,
    is_connected,
    list_cells,
    prune_cell,
)
from flax_cnns.studies.search.nas.cells.table import CellRow, CellTable
from flax_cnns.studies.search.nas.cells.training import Recipe, Trained

NONE, SKIP, CONV = SMALL_SPACE
POOL = "avg_pool_3x3"


# ---- space


def test_sizes_of_the_spaces():
    cells = list_cells(SMALL_SPACE)
    assert len(set(cells)) == 729
    assert len(set(list_cells(FULL_SPACE))) == 15_625
    # Without a path there is no edge 0-3. If 0-1 and 0-2 are missing too, the other three edges may
    # be anything (27). With 0-1 alone (2), 1-3 is missing, and one of 1-2 and 2-3 (5). With 0-2
    # alone (2), 2-3 is missing (9). With both (4), 1-3 and 2-3 are missing (3).
    assert sum(not is_connected(cell) for cell in cells) == 27 + 2 * 5 + 2 * 9 + 4 * 3 == 67


@pytest.mark.parametrize(
    ("operations", "pruned", "function"),
    [
        # Node 2 leads nowhere.
        ((CONV, CONV, SKIP, SKIP, SKIP, NONE), (CONV, NONE, NONE, SKIP, SKIP, NONE), "3x3(x) + x"),
        # Nothing enters node 1, and a skip passes its zeros on.
        ((NONE, SKIP, SKIP, NONE, SKIP, CONV), (NONE, SKIP, NONE, NONE, NONE, CONV), "3x3(x)"),
        # A convolution of zeros adds a shift.
        ((NONE, SKIP, CONV, NONE, NONE, CONV), (NONE, SKIP, CONV, NONE, NONE, CONV), "3x3(b + x)"),
        # Skips of a sum, and nothing that leads to the output.
        (
            (CONV, SKIP, SKIP, NONE, SKIP, SKIP),
            (CONV, SKIP, SKIP, NONE, SKIP, SKIP),
            "3x3(x) + 3x3(x) + x",
        ),
        ((CONV, CONV, NONE, NONE, NONE, NONE), (NONE,) * 6, ""),
        (
            (POOL, NONE, NONE, NONE, CONV, POOL),
            (POOL, NONE, NONE, NONE, CONV, NONE),
            "3x3(mean(x))",
        ),
    ],
)
def test_pruned_cells_and_functions(operations, pruned, function):
    cell = write_cell(operations)
    assert prune_cell(cell) == write_cell(pruned)
    assert describe_function(cell) == describe_function(prune_cell(cell)) == function


def test_pruning_changes_no_function():
    """The formulas are found in another way than the pruned cells."""
    cells = list_cells(SMALL_SPACE)
    assert len({prune_cell(cell) for cell in cells}) == 360
    assert len({describe_function(cell) for cell in cells}) == 111
    assert all(describe_function(cell) == describe_function(prune_cell(cell)) for cell in cells)
    assert all(("x" in re.sub("3x3", "", describe_function(c))) == is_connected(c) for c in cells)


# ---- table


def test_the_plan_has_every_cell_once_and_every_tenth_with_three_seeds():
    plan, cells = table.plan_trainings(), list_cells(SMALL_SPACE)
    assert len(plan) == len(set(plan)) == 476
    assert {(prune_cell(cell), 0) for cell in cells} <= set(plan)
    for seed in (1, 2):
        assert {t.cell for t in plan if t.seed == seed} == {prune_cell(c) for c in cells[::10]}


def test_the_shipped_table():
    """Its rows, sizes, repeated seeds, and that no cell took more than 10 s."""
    path = table.SHIPPED
    assert path.stat().st_size < 200_000
    shipped = table.read_table()
    assert list(shipped.rows) == list_cells(SMALL_SPACE)
    assert Recipe(**{**shipped.recipe, "widths": tuple(shipped.recipe["widths"])}) == Recipe()
    for i, row in enumerate(shipped.rows.values()):
        convolutions = row.cell.count(CONV)
        # 16 channels, 7x7 pixels, 2 cells: the stem, convolutions of 16x16x3x3, the last norm, head
        params = 9 * 16 + 32 + 2 * convolutions * (9 * 16 * 16 + 32) + 32 + 16 * 10 + 10
        macs = 49 * 9 * 16 + 2 * convolutions * 49 * 9 * 16 * 16 + 160
        assert (row.params, row.macs) == (params, macs)
        assert 0 < row.seconds < 10
        assert len(row.validation) == len(row.test) >= (3 if i % 10 == 0 else 1)
        assert is_connected(row.cell) or max(*row.validation, *row.test) < 0.13
        twin = shipped.rows[prune_cell(row.cell)]
        assert (row.validation, row.test) == (twin.validation, twin.test)


def test_differences_of_the_shipped_table_are_larger_than_its_noise():
    noise = regret.measure_noise(table.read_table())
    assert noise.connected == 662
    assert noise.spread > 5 * noise.seed_noise
    assert noise.seed_rank > 0.8


class FakeTrainer:
    calls: ClassVar[list] = []

    def __init__(self, recipe, images):
        pass

    def train(self, cell, seed):
        self.calls.append((cell, seed))
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        accuracy = (sum(map(ord, cell)) % 1000 + seed) / 1234
        return Trained(accuracy, accuracy / 2, 1.5)


def make(folder, monkeypatch, recipe=table.RECIPE, dies_at=0):
    monkeypatch.setattr(table, "CellTrainer", FakeTrainer)
    monkeypatch.setattr(table, "read_images", lambda *_: None)
    monkeypatch.setattr(FakeTrainer, "calls", [])
    monkeypatch.setattr(FakeTrainer, "dies_at", dies_at, raising=False)
    plan, said = table.plan_trainings()[:30], []
    path = table.make_table(folder, folder, recipe, plan=plan, say=said.append)
    return path.read_bytes(), FakeTrainer.calls, said


def test_a_killed_table_goes_on_and_is_the_same(tmp_path, monkeypatch):
    whole, calls, said = make(tmp_path / "a", monkeypatch)
    assert calls == [calls[0], *(tuple(t) for t in table.plan_trainings()[:30])]  # one compiles
    assert said[0] == "30 trainings, 0 of them done"
    assert re.fullmatch(r"20/30 trainings, [\d.]+ s each, about 0 min left", said[3])
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b", monkeypatch, dies_at=12)
    with (tmp_path / "b/trainings.jsonl").open("a") as file:
        file.write('{"cell": "|none~0|+')  # what kill -9 may leave
    again, calls, said = make(tmp_path / "b", monkeypatch)
    assert (again, len(calls), said[0]) == (whole, 21, "30 trainings, 10 of them done")
    assert make(tmp_path / "b", monkeypatch)[:2] == (whole, [])
    rows = table.read_table(tmp_path / "b/table.json").rows
    first = table.plan_trainings()[0]
    assert rows[first.cell].test == (FakeTrainer(0, 0).train(*first).test.__round__(5),)
    with pytest.raises(UserError, match="has trainings with depth=2, not 1; use another --workdir"):
        make(tmp_path / "b", monkeypatch, Recipe(depth=1))


def test_costs_are_those_of_the_cells_network():
    cell = write_cell((CONV, NONE, CONV, SKIP, NONE, SKIP))
    row = table.read_table().rows[cell]
    assert table.count_cost(cell, table.RECIPE, table.IMAGE_SHAPE) == (row.params, row.macs)


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot read the table .*t\.json: 'rows'; make one with"):
        table.read_table(tmp_path / "t.json")


# ---- searchers


def note_all(evaluate, search, evaluations=30, seed=0):
    seen = []

    def note(cell):
        seen.append(cell)
        return evaluate(cell)

    history = search(note, evaluations, seed)
    assert history == seen
    return history


@pytest.mark.parametrize("name", ["random", "evolution", "controller"])
def test_searches_repeat_themselves_and_differ_by_seed(name):
    search = searchers.SEARCHERS[name].search

    def evaluate(cell):
        return 0.5 + 0.05 * cell.count(CONV)

    first = note_all(evaluate, search)
    assert len(first) == 30
    assert all(set(parse_cell(cell)) <= set(SMALL_SPACE) for cell in first)
    assert note_all(evaluate, search) == first
    assert note_all(evaluate, search, seed=1) != first


def test_evolution_mutates_the_best_of_a_sample_and_lets_the_oldest_die():
    scores = {cell: stats.norm.rvs(random_state=i) for i, cell in enumerate(list_cells())}
    history = searchers.search_by_evolution(scores.__getitem__, 60, 3)
    assert history[:10] == searchers.search_at_random(scores.__getitem__, 10, 3)
    for i in range(10, 60):
        population = history[i - 10 : i]
        parents = [
            cell
            for cell in population
            if sum(a != b for a, b in zip(parse_cell(cell), parse_cell(history[i]))) == 1
        ]
        # The best of three different members is at most the third from below.
        worse = [sum(scores[c] <= scores[p] for c in population) for p in parents]
        assert max(worse) >= 3


def test_learning_searchers_beat_random_search_where_they_must():
    """With a smooth score and 200 evaluations; random search is the weakest."""

    def evaluate(cell):
        return cell.count(CONV) / 10

    means = {
        name: np.mean([evaluate(c) for c in each.search(evaluate, 200, 0)[-50:]])
        for name, each in searchers.SEARCHERS.items()
        if name != "controller, paper's rate"
    }
    assert means["evolution"] > means["random"] + 0.1
    assert means["controller"] > means["random"] + 0.1


# ---- regret


@pytest.fixture
def small_table():
    rows = {}
    for i, cell in enumerate(list_cells(SMALL_SPACE)):
        seeds = 3 if i % 10 == 0 else 1
        validation = tuple((i * 37 + 11 * s) % 729 / 1000 for s in range(seeds))
        rows[cell] = CellRow(cell, 1, 1, 1.0, validation, tuple(v + 0.1 for v in validation))
    return CellTable(rows, {})


def test_regret_by_hand(small_table):
    cells = sorted(small_table.rows, key=lambda cell: small_table.rows[cell].validation[0])
    order = [cells[5], cells[3], cells[700], cells[700], cells[728]]
    assert [row.cell for row in regret.find_best_so_far(small_table, order)] == [
        *(cells[5], cells[5], cells[700], cells[700], cells[728])
    ]
    comparison = regret.SearcherComparison(small_table, 5, {"random": {0: order, 1: order[::-1]}})
    assert np.allclose(
        regret.measure_regret(comparison)["random"], [[72.3, 72.3, 2.8, 2.8, 0], [0] * 5]
    )
    assert regret.measure_floor(small_table) == 0
    assert regret.find_winner(comparison) == (small_table.rows[cells[728]], 2)


def test_regret_goes_by_validation(small_table):
    """The chosen cell need not be the best on test."""
    rows = dict(small_table.rows)
    top = max(rows.values(), key=lambda row: row.validation[0])
    rows[top.cell] = top._replace(test=(0.5,))
    assert regret.measure_floor(CellTable(rows, {})) == pytest.approx(100 * (0.827 - 0.5))


def test_noise_by_hand(small_table):
    noise = regret.measure_noise(small_table)
    rows = [row for row in small_table.rows.values() if is_connected(row.cell)]
    several = {prune_cell(row.cell): row.test for row in rows if len(row.test) > 1}
    assert noise.repeated == len(several)
    values = 100 * np.array(list(several.values()))
    within = [np.std(row, ddof=1) ** 2 for row in values]
    assert noise.seed_noise == pytest.approx(np.sqrt(np.mean(within)))
    pairs = [(0, 1), (0, 2), (1, 2)]
    ranks = [stats.spearmanr(values[:, i], values[:, j]).statistic for i, j in pairs]
    assert noise.seed_rank == pytest.approx(np.mean(ranks))
    assert noise.split_rank == pytest.approx(1)


def test_summary_and_report(small_table, tmp_path, monkeypatch):
    said = []
    few = {name: searchers.SEARCHERS[name] for name in ("random", "evolution")}
    monkeypatch.setattr(regret, "SEARCHERS", few)
    arguments = dict(evaluations=30, seeds=6, say=said.append)
    comparison = regret.compare_searchers(small_table, tmp_path, **arguments)
    assert said == ["random: 6 of 6 searches to do", "evolution: 6 of 6 searches to do"]
    text = (tmp_path / "searches.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (tmp_path / "searches.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    assert regret.compare_searchers(small_table, tmp_path, **arguments) == comparison
    assert (tmp_path / "searches.jsonl").read_text() == text
    random, evolution = regret.summarize(comparison)
    ends = {name: r[:, -1] for name, r in regret.measure_regret(comparison).items()}
    test = stats.ttest_rel(ends["evolution"], ends["random"])
    assert evolution["p"] == pytest.approx(test.pvalue)
    wanted = test.confidence_interval()
    assert (evolution["difference_low"], evolution["difference_high"]) == pytest.approx(wanted)
    assert random["regret"] == pytest.approx(ends["random"].mean())
    names = report.write_report(comparison, tmp_path)
    assert all((tmp_path / name).stat().st_size > 0 for name in names)
    assert f"| random | {random['regret']:.2f} (" in (tmp_path / "cells.md").read_text()
    assert json.loads((tmp_path / "cell.json").read_text())["cell"] in small_table.rows
    assert len((tmp_path / "regret.csv").read_text().splitlines()) == 1 + 2 * 30
    with pytest.raises(UserError, match="has searches with 30 evaluations, not 31"):
        regret.compare_searchers(small_table, tmp_path, **arguments | {"evaluations": 31})
    with pytest.raises(UserError, match="has searches over another table"):
        regret.compare_searchers(table.read_table(), tmp_path, **arguments)
    with pytest.raises(UserError, match="expected 1 to 729 evaluations"):
        regret.compare_searchers(small_table, tmp_path, **arguments | {"evaluations": 730})


def test_an_interval_that_is_unknown_is_not_printed():
    nan = float("nan")
    assert report._format_interval(0.0, nan, nan) == "0.00"
    assert report._format_interval(1.2, 0.7, 1.7) == "1.20 (0.70 to 1.70)"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-2, -1, "beats random search"),
        (-1, 1, "does not beat random search"),
        (1, 2, "is worse than random search"),
    ],
)
def test_verdicts(low, high, verdict):
    assert regret.judge(low, high) == verdict
