"""The winner's config as a file, and its retraining as an ablation."""

from __future__ import annotations

import json
import runpy

import pytest
from scipy import stats

from configs import digits_lenet5
from flax_cnns import config as configs
from flax_cnns.config import set_config_field
from flax_cnns.errors import UserError
from flax_cnns.studies.ablation import plan
from flax_cnns.studies.search.tuning import winner


def make_configs():
    given = digits_lenet5.get_config()
    best = digits_lenet5.get_config()
    changes = {
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.123456789,
        "optimizer.weight_decay": ((r".*/kernel\d*", 5e-4), (".*", 0.0)),
        "schedule.learning_rate": 0.1 + 0.2,
        "train.dropout": (0.25,),
        "model.name": "lenet5",
    }
    for path, value in changes.items():
        set_config_field(best, path, value)
    best.train.test_on = "never"
    return given, winner.make_winner_config(given, best)


def test_the_file_gives_the_same_config_to_the_bit(tmp_path):
    given, best = make_configs()
    path = winner.write_winner(given, best, 'The "winner" of a\\b', tmp_path)
    module = runpy.run_path(str(path))
    assert configs.to_plain(module["get_config"]()) == configs.to_plain(best)
    assert module["__doc__"].startswith('The "winner" of a\\b\n')
    assert module["FOUND"]["schedule.learning_rate"] == 0.1 + 0.2
    assert set(module["FOUND"]) == {change.path for change in winner.list_changes(given, best)}
    assert module["GIVEN"]["data.augment.rotate"] == 15.0


def test_changes_are_those_of_the_searched_fields_alone():
    given, best = make_configs()
    changes = {path: values for path, *values in winner.list_changes(given, best)}
    assert changes["train.dropout"] == [[], [0.25]]
    assert changes["optimizer.name"] == ["adam", "sgd"]
    assert "model.name" not in changes  # equal
    assert "train.test_on" not in changes  # the given config's
    assert len(changes) == 5


@pytest.fixture
def ablations(monkeypatch):
    """The arguments of `ablate`."""
    calls = []

    def ablate(config, sweep, folder, **options):
        calls.append((config, sweep, folder, options))
        return {"complete": 4}

    monkeypatch.setattr(winner.ablation, "ablate", ablate)
    return calls


def test_retraining_is_an_ablation_with_seeds_that_no_trial_had(tmp_path, ablations):
    given, best = make_configs()
    assert winner.retrain(given, best, tmp_path, seeds=2, jobs=1) == {"complete": 4}
    ((config, sweep, folder, options),) = ablations
    assert folder == tmp_path / "retraining"
    assert options == dict(seeds=2, jobs=1, metric="accuracy", accept_changed_data=False)
    first, second = plan.make_cells(plan.make_rows(config, sweep), folder, 1)
    assert (first.row.name, second.row.name) == ("given", "winner")
    assert first.config.seed == second.config.seed == given.seed + 1
    for cell, expected in ((first, given), (second, best)):
        plain = configs.to_plain(cell.config) | {"seed": given.seed}
        assert plain == configs.to_plain(expected)
        assert cell.config.train.test_on == "latest"


def test_nothing_is_retrained_that_is_equal_or_never_tested(tmp_path, ablations):
    given, best = make_configs()
    with pytest.raises(UserError, match="the winner is the given config"):
        winner.retrain(given, given, tmp_path, seeds=2)
    given.train.test_on = best.train.test_on = "never"
    with pytest.raises(UserError, match=r"expected 'latest' or 'best', got 'never'"):
        winner.retrain(given, best, tmp_path, seeds=2)
    assert ablations == []


def write_cells(folder, accuracies, metric="accuracy"):
    """Writes the folder of a retraining as an ablation leaves it."""
    config = configs.to_plain(digits_lenet5.get_config())
    rows = [{"name": name, "overrides": {}} for name in accuracies]
    seeds = max(map(len, accuracies.values()))
    folder.mkdir()
    written = {"config": config, "baseline": "given", "seeds": seeds, "rows": rows}
    (folder / "ablation.json").write_text(json.dumps(written))
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            run = folder / name / f"seed{seed}"
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps(config))
            line = {"step": 5, "time": 1.0, f"test/{metric}": value}
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            (run / "summary.json").write_text(json.dumps({f"test/{metric}": value}))


def test_the_summary_is_the_paired_t_interval_of_scipy(tmp_path):
    given, best = [0.90, 0.91, 0.93, 0.90], [0.93, 0.936, 0.95, 0.94]
    write_cells(tmp_path / "retraining", {"given": given, "winner": best})
    lines = winner.summarize_retraining(tmp_path)
    test = stats.ttest_rel(best, given)
    low, high = test.confidence_interval()
    expected = f"{100 * (sum(best) - sum(given)) / 4:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    assert (
        f"over 4 seeds: {expected} points, p {test.pvalue:.3f}; the winner is better" in lines[-1]
    )
    assert lines[2].startswith("| given | 4 | 91.00 [")


def test_the_summary_says_when_there_is_no_difference(tmp_path):
    assert winner.summarize_retraining(tmp_path) is None
    write_cells(tmp_path / "retraining", {"given": [0.9, 0.94, 0.9], "winner": [0.92, 0.9, 0.93]})
    assert (
        "the interval includes 0, so these seeds do not show a difference"
        in (winner.summarize_retraining(tmp_path)[-1])
    )


def test_less_loss_is_better(tmp_path):
    losses = {"given": [0.50, 0.52, 0.51], "winner": [0.30, 0.33, 0.31]}
    write_cells(tmp_path / "retraining", losses, metric="loss")
    lines = winner.summarize_retraining(tmp_path, "loss", maximize=False)
    assert lines[0] == "| config | seeds | test loss |"
    assert "-0.1967 [" in lines[-1]
    assert "the winner is better than the given config" in lines[-1]
