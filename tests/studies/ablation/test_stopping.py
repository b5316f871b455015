"""Seeds that are added until intervals are narrow, and baselines of another ablation."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats

from configs.common import get_config
from flax_cnns.data.fingerprint import DataSnapshot
from flax_cnns.errors import UserError
from flax_cnns.runs.metric import make_metric
from flax_cnns.studies.ablation import ablate, pictures, plan, sharing, stopping
from flax_cnns.studies.ablation import report as ablation_report
from flax_cnns.studies.ablation.forecast import RowCost
from flax_cnns.studies.ablation.stopping import StoppingRule
from tests.sweeps import write_json, write_run, write_sweep

# Differences from the baseline, in points, of seeds 0, 1, ...
CALM = [0.9, 1.0, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0]
WILD = [5.0, -5.0, 4.0, -4.0, 5.0, -5.0, 4.0, -4.0]


def compute_widths(points):
    """The width of Student's interval over the first n differences, by n."""
    return {
        n: 2 * stats.sem(points[:n]) * stats.t.ppf(0.975, n - 1) for n in range(2, len(points) + 1)
    }


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(config, sweep, folder, started cells): cells are made up, with known differences."""
    config = get_config()
    sweep = [("none", {}), ("calm", {"mix.mixup": 0.1}), ("wild", {"mix.mixup": 0.2})]
    started = []

    def run_cells(cells, slots, costs, **_):
        for cell in cells:
            if cell.read_status()["status"] == "complete":
                continue
            started.append(f"{cell.row.name}{cell.seed}")
            gain = {"none": 8 * [0.0], "calm": CALM, "wild": WILD}[cell.row.name][cell.seed]
            accuracy = 0.8 + 0.01 * gain + 1e-3 * cell.seed
            write_run(cell.workdir, accuracy, seed=cell.seed, mix__mixup=cell.config.mix.mixup)
        return {"complete": len(cells)}

    monkeypatch.setattr(ablate, "run_cells", run_cells)
    monkeypatch.setattr(
        ablate.forecast,
        "measure_rows",
        lambda cells: {c.row.name: RowCost(1, 1, 1, metrics=("accuracy",)) for c in cells},
    )
    for name in ("draw_differences", "draw_curves"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    return config, sweep, tmp_path / "sweep", started


def test_a_row_stops_when_its_interval_is_narrow_or_there_are_most_seeds(world):
    config, sweep, folder, started = world
    widths = compute_widths(CALM)
    assert widths[2] > 0.4 > widths[4] > 0  # in points
    stop = next(n for n in range(2, 9) if widths[n] <= 0.4)
    ablate.ablate(config, sweep, folder, seeds=2, width=0.4, most=6)
    assert sorted(name for name in started if name.startswith("calm")) == [
        f"calm{seed}" for seed in range(stop)
    ]
    for name in ("none", "wild"):  # the baseline has the seeds of the row that has most
        assert [n for n in started if n.startswith(name)] == [f"{name}{s}" for s in range(6)]
    report = (folder / "report.md").read_text()
    assert f"3 rows × {stop} to 6 seeds" in report
    wide = compute_widths(WILD)[6]
    assert f"Narrow enough, with their seeds: calm ({stop})." in report
    assert f"At 6 seeds, with their widths: wild ({wide:.2f} points)." in report
    assert "looks at the width alone, never at the sign or the p-value" in report
    row = next(line for line in report.splitlines() if line.startswith("| calm |"))
    assert f"| {stop} of {stop} |" in row

    # The same command does nothing, and one that was killed goes on as if it was not.
    started.clear()
    ablate.ablate(config, sweep, folder, seeds=2, width=0.4, most=6)
    assert started == []
    for name in ("wild/seed4", "wild/seed5", "none/seed5"):
        shutil.rmtree(folder / name)
    ablate.ablate(config, sweep, folder, seeds=2, width=0.4, most=6)
    assert sorted(started) == ["none5", "wild4", "wild5"]
    # Without the rule, the further seeds stay in the report.
    ablate.ablate(config, sweep, folder, seeds=2)
    assert f"3 rows × {stop} to 6 seeds" in (folder / "report.md").read_text()


def test_the_rule_does_not_look_at_the_sign():
    """A row and its mirror image, and a row far from zero, stop at the same seed."""
    rule, metric = StoppingRule(0.4, 8), make_metric("accuracy")
    ends = []
    for sign, shift in ((1, 0.0), (-1, 0.0), (1, 20.0)):
        rows = {"none": make_cells(8 * [0.0]), "row": make_cells([sign * p + shift for p in CALM])}
        ends.append(stopping.judge_rows(rows, "none", rule, metric, 2)["row"])
    assert len({(end.seeds, end.reason) for end in ends}) == 1
    assert ends[0].reason == "narrow"


def make_cells(points):
    """Complete cells without a run: what `judge_rows` reads of them."""
    return {seed: Cell(0.8 + 0.01 * point) for seed, point in enumerate(points)}


class Cell:
    status = "complete"

    def __init__(self, value):
        self.record, self.value = self, value

    def last_value(self, name):
        assert name == "test/accuracy"
        return self.value


def test_coverage_of_the_rule_in_simulated_rows():
    """The numbers of docs/ablations.md: nominal 95 %, from three and from five seeds.

    4,000 rows of normal differences; the width is 1.5 standard deviations, at most 20 seeds.
    """
    draws = np.random.default_rng(0).normal(0.0, 1.0, (4_000, 20))
    for start, expected in ((3, 0.910), (5, 0.930)):
        covered = np.full(len(draws), np.nan)
        for n in range(start, 21):
            half = stats.sem(draws[:, :n], axis=1) * stats.t.ppf(0.975, n - 1)
            stops = np.isnan(covered) & ((2 * half <= 1.5) | (n == 20))
            covered[stops] = (np.abs(draws[:, :n].mean(axis=1)) < half)[stops]
        assert covered.mean() == pytest.approx(expected, abs=4 * 0.0045)


@pytest.mark.parametrize(
    ("width", "most", "seeds", "message"),
    [
        (0.5, None, 3, "--width needs --most"),
        (None, 9, 3, "--most needs --width"),
        (0.0, 9, 3, "--width: expected a number of points above 0, got 0"),
        (math.nan, 9, 3, "--width: expected a number"),
        (0.5, 2, 3, "--most: expected at least --seeds=3, got 2"),
        (0.5, 9, 1, "--width needs --seeds=2 or more at the start, got 1"),
    ],
)
def test_mistakes_of_the_rule(width, most, seeds, message):
    with pytest.raises(UserError, match=message):
        stopping.check_rule(width, most, seeds)


def test_the_rule_and_its_flags(world):
    config, sweep, folder, _ = world
    with pytest.raises(UserError, match="--index: --width adds cells as it goes"):
        ablate.ablate(config, sweep, folder, seeds=2, width=1, most=3, index=0)
    with pytest.raises(UserError, match="--width needs the baseline's cells; add it: --rows=none"):
        ablate.ablate(config, sweep, folder, seeds=2, width=1, most=3, rows=["calm"])


# ---- power


def test_the_seeds_that_a_difference_needs_are_in_the_report(tmp_path, monkeypatch):
    for name in ("draw_differences", "draw_curves"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    rows = {
        "plain": ({}, [(0.80, None), (0.81, None), (0.79, None)]),
        # Differences 1, 2, 3 points: a standard deviation of one point, see test_power.py.
        "row": ({"mix.mixup": 0.2}, [(0.81, None), (0.83, None), (0.82, None)]),
    }
    folder = write_sweep(tmp_path, rows)
    ablation_report.write(folder, power=1.0)
    report = (folder / "report.md").read_text()
    assert "| seeds for 1 point |" in report
    assert "| 10 (to be safe 38) |" in report
    assert "with 80% probability" in report
    csv_lines = (folder / "report.csv").read_text().splitlines()
    header, line = csv_lines[0].split(","), csv_lines[2].split(",")
    found = dict(zip(header, line))
    assert (found["seeds_needed"], found["seeds_needed_safe"]) == ("10", "38")
    assert float(found["spread"]) == pytest.approx(0.01)
    with pytest.raises(UserError, match="--power: expected a difference above 0"):
        ablation_report.write(folder, power=-1.0)


# ---- a shared baseline


def test_a_baseline_is_taken_from_another_ablation(world, tmp_path, capsys):
    config, sweep, folder, started = world
    ablate.ablate(config, sweep, tmp_path / "first", seeds=2)
    started.clear()
    rows = [("none", {}), ("calm", {"mix.label_smoothing": 0.1})]
    ablate.ablate(config, rows, folder, seeds=3, baseline=tmp_path / "first")
    assert started == ["calm0", "calm1", "none2", "calm2"]  # seeds 0 and 1 are not trained again
    for seed in range(2):
        ours, theirs = (f / f"none/seed{seed}" for f in (folder, tmp_path / "first"))
        assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
        assert json.loads((ours / "shared.json").read_text()) == {"from": str(theirs.resolve())}
    assert "none: 1 cell is not in" in capsys.readouterr().out
    report = (folder / "report.md").read_text()
    assert (
        f"Seeds 0, 1 of the baseline were trained in {(tmp_path / 'first/none').resolve()}"
        in report
    )
    assert not list(folder.glob("none/.shared*"))
    # Repeating the command, also without the other folder, trains nothing.
    shutil.rmtree(tmp_path / "first")
    started.clear()
    ablate.ablate(config, rows, folder, seeds=3)
    assert started == []


def test_only_the_same_runs_are_shared(world, tmp_path):
    config, sweep, folder, _ = world
    ablate.ablate(config, sweep, tmp_path / "first", seeds=1)
    changed = config.copy_and_resolve_references()
    changed.schedule.learning_rate = 0.7
    (cell,) = plan.make_cells(plan.make_rows(changed, sweep[:1]), folder, 1)
    with pytest.raises(UserError) as error:
        sharing.share_cells([cell], tmp_path / "first", DataSnapshot({}))
    assert "first has no run of none, seed 0: the nearest is" in str(error.value)
    assert "schedule.learning_rate: " in str(error.value)
    assert not folder.exists()
    # Another place of the data is not another run, but other data are.
    moved = config.copy_and_resolve_references()
    moved.data.dir = "elsewhere"
    (cell,) = plan.make_cells(plan.make_rows(moved, sweep[:1]), folder, 1)
    assert sharing.share_cells([cell], tmp_path / "first", DataSnapshot({}), dry_run=True) == 1
    facts = tmp_path / "first/none/seed0/dataset.json"
    was = {"classes": ["a"], "splits": {}}
    write_json(facts, json.loads(facts.read_text()) | {"fingerprint": was})
    data = DataSnapshot({"classes": ["b"], "splits": {}})
    with pytest.raises(UserError, match="saw other data"):
        sharing.share_cells([cell], tmp_path / "first", data)
    with pytest.raises(UserError, match="no ablation here"):
        sharing.share_cells([cell], tmp_path / "nothing", data)
