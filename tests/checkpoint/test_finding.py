"""Which checkpoint a name means; a damaged or renamed one is never taken for another."""

import json

import numpy as np
import pytest

from flax_cnns.checkpoint import finding
from flax_cnns.checkpoint.finding import DamagedError, find_arrays
from flax_cnns.checkpoint.manager import Checkpoints
from flax_cnns.checkpoint.reading import read_metadata
from flax_cnns.errors import UserError
from tests.checkpoint.test_manager import change_metrics

SMALL = {"w": np.arange(1000.0)}


@pytest.fixture
def run(tmp_path):
    """A run with the steps 1, 2 and 3; step 1 is the best."""
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        for step, value in ((1, 0.9), (2, 0.5), (3, 0.7)):
            found = {"validation/accuracy": value}
            checkpoints.save(step, SMALL, host={}, metrics=found)
    return tmp_path / "run"


def test_run_alone_means_what_its_summary_tested_and_the_latest_of_an_unfinished_one(run):
    def step(source=run):
        return int(find_arrays(source).parent.name)

    (run / "config.json").write_text('{"train": {"test_on": "best"}}')
    assert step() == step(run / "checkpoints") == 3
    assert finding.choose_step(run) == (3, "latest, unfinished")
    (run / "summary.json").write_text('{"test/step": 2}')
    assert step() == step(run / "checkpoints") == 2
    assert (step(f"{run}@best"), step(f"{run}@latest"), step(f"{run}@3")) == (1, 3, 3)
    (run / "summary.json").write_text('{"fit/step": 2}')  # the run had no test split
    assert step() == 2
    (run / "summary.json").write_text("{}")  # a version that did not record the step
    assert step() == 1
    (run / "summary.json").write_text('{"test/step": 12}')  # a step that was removed
    with pytest.raises(
        UserError, match=r"no checkpoint 12, the one that was tested for summary.json; it h"
    ):
        find_arrays(run)
    (run / "summary.json").write_text("[]")
    with pytest.raises(DamagedError, match=r"summary.json is damaged: .* a list; remove the file"):
        find_arrays(run)
    assert step(f"{run}@best") == 1


def test_a_flipped_bit_in_metrics_makes_no_other_checkpoint_the_best(run):
    change_metrics(run / "checkpoints/3")
    with pytest.raises(DamagedError, match="3/metrics/metrics is damaged: its CRC32 differs"):
        find_arrays(f"{run}@best")
    assert find_arrays(f"{run}@3") == run / "checkpoints/3/state"


def test_a_step_that_was_renamed_is_not_taken_for_another(run):
    (run / "checkpoints/2").rename(run / "checkpoints/20")
    message = "checkpoints/20 was saved as step 2 and then renamed"
    with pytest.raises(DamagedError, match=message):
        read_metadata(f"{run}@20")
    lines = []
    with Checkpoints(run / "checkpoints", report=lines.append) as checkpoints:
        assert checkpoints.restore(SMALL)[2] == 3
    assert message in lines[0]


def test_manifests_without_step_and_metrics_are_older_and_as_good(run):
    for step in (1, 2, 3):
        file = run / f"checkpoints/{step}/manifest/metadata"
        content = json.loads(file.read_text())
        del content["step"], content["metrics_crc32"]
        file.write_text(json.dumps(content))
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.restore(SMALL)[2] == 3
        assert checkpoints.best_step() == 1


@pytest.mark.parametrize("name", ["\u00b2", "\u0663", "007"])
def test_folders_named_by_digits_that_are_not_steps(run, name):
    (run / "checkpoints" / name).mkdir()
    assert finding.all_steps(run) == [1, 2, 3]
    with pytest.raises(UserError, match="is not a step: expected"):
        Checkpoints(run / "checkpoints")
    with pytest.raises(UserError, match="it has best, latest, 1, 2, 3"):
        find_arrays(f"{run}@{name}")
