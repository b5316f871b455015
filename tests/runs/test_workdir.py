"""The run directory: changes of the data since the run began, and damaged JSON files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from configs.common import get_config
from flax_cnns import config as configs
from flax_cnns import files
from flax_cnns.data.fingerprint import DataSnapshot
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from tests.sweeps import write_json, write_run

SPLITS = {"train": {"images": 6, "classes": [3, 3], "digests": ["a", "b"]}}
WAS = {"reader": "folder", "classes": ["arch", "bench"], "sized": True, "splits": SPLITS}
NOW = WAS | {"splits": {"train": {"images": 7, "classes": [3, 4], "digests": ["a", "c"]}}}


@pytest.fixture
def begun(tmp_path):
    """A run that is not complete and has a fingerprint."""
    write_run(tmp_path / "run", 0.5, end=False, points=3)
    facts = json.loads((tmp_path / "run/dataset.json").read_text())
    write_json(tmp_path / "run/dataset.json", facts | {"fingerprint": WAS})
    return tmp_path / "run"


def test_other_data_are_refused_or_accepted_and_recorded_once(begun, capsys):
    assert workdirs.check_data(begun, DataSnapshot(WAS)) is None
    message = r"the data of .*run changed since it began: train/bench had 3 images, has 4; .* with "
    with pytest.raises(workdirs.ChangedData, match=message + "--accept-changed-data") as raised:
        workdirs.check_data(begun, DataSnapshot(NOW))
    assert isinstance(raised.value, UserError)
    change = workdirs.check_data(begun, DataSnapshot(NOW), accept=True)
    assert (change["was"], change["is"]) == (WAS, NOW)
    for _ in range(2):
        workdirs.record_accepted_change(begun, change)
    facts = workdirs.read_dataset_facts(begun)
    assert facts["accepted_changes"] == [{"step": 0, **change}]
    workdirs.write_dataset_facts(begun, facts | {"fingerprint": NOW})  # as a resumed run does
    assert workdirs.check_data(begun, DataSnapshot(NOW)) is None
    assert workdirs.read_dataset_facts(begun)["accepted_changes"]
    assert "accepted: the data of" in capsys.readouterr().out


def test_a_run_that_has_not_begun_is_not_compared(tmp_path):
    write_json(tmp_path / "dataset.json", {"fingerprint": WAS})
    assert workdirs.check_data(tmp_path, DataSnapshot(NOW)) is None


def test_a_run_without_a_fingerprint_is_compared_by_names_and_counts(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, 0.5)
    digits = WAS | {"classes": [str(digit) for digit in range(10)]}
    counts = {"train": 640, "test": 100}
    summary = {"step": 20, "epochs": 2.0, "test/examples": 100}  # with batches of 64
    write_json(run / "summary.json", summary)
    assert workdirs.check_data(run, DataSnapshot(digits, counts)) is None
    assert "its class names and counts were compared" in capsys.readouterr().out
    with pytest.raises(workdirs.ChangedData, match="test had 100 images, has 90; restore"):
        workdirs.check_data(run, DataSnapshot(digits, counts | {"test": 90}))
    with pytest.raises(workdirs.ChangedData, match="train had 640 images, has 641"):
        workdirs.check_data(run, DataSnapshot(digits, counts | {"train": 641}))
    with pytest.raises(workdirs.ChangedData, match="it had 10 classes, has 2"):
        workdirs.check_data(run, DataSnapshot(WAS, counts))
    facts = workdirs.read_dataset_facts(run) | {"mean": [0.5], "normalized_by": "training images"}
    write_json(run / "dataset.json", facts)
    with pytest.raises(workdirs.ChangedData, match=r"mean of the training images was \(0.5\), is"):
        workdirs.check_data(run, DataSnapshot(digits, counts, (0.5003,)))
    assert workdirs.check_data(run, DataSnapshot(digits, counts, (0.50005,))) is None
    # Left-out images count as part of the data set, but were not tested.
    write_json(run / "summary.json", summary | {"damaged_images": ["a.png"]})
    assert workdirs.check_data(run, DataSnapshot(digits, counts | {"test": 103})) is None


def test_a_run_older_than_dataset_json_gets_a_note(tmp_path, capsys):
    write_run(tmp_path / "run", 0.5, end=False)
    (tmp_path / "run/dataset.json").unlink()
    assert workdirs.check_data(tmp_path / "run", DataSnapshot(WAS)) is None
    assert "nothing was compared" in capsys.readouterr().out
    workdirs.add_fingerprint(tmp_path / "run", {"name": "x", "fingerprint": WAS})
    workdirs.add_fingerprint(tmp_path / "run", {"name": "y", "fingerprint": NOW})
    assert workdirs.read_dataset_facts(tmp_path / "run") == {"name": "x", "fingerprint": WAS}


def test_another_data_dir_is_allowed_if_a_fingerprint_proves_equal_data(begun):
    config = get_config()
    config.model.name = "lenet5"
    config.data.update(dict(image_size=32, batch_size=64, dir="/moved"))
    resolved = configs.to_plain(config)
    workdirs.check_workdir(begun, resolved)
    facts = workdirs.read_dataset_facts(begun)
    del facts["fingerprint"]
    write_json(begun / "dataset.json", facts)
    with pytest.raises(UserError, match=r"\(data\.dir: '' there, .*or --accept-changed-data"):
        workdirs.check_workdir(begun, resolved)
    workdirs.check_workdir(begun, resolved, accept_changed_data=True)


@pytest.mark.parametrize("text", ["", "[1]", '{"fingerprint": {"reader": "folder"}}'])
def test_a_damaged_dataset_json_is_one_line_with_a_way_out(begun, text):
    (begun / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json is damaged: .*; remove the file"):
        workdirs.check_data(begun, DataSnapshot(WAS))


def test_set_aside_renames_and_keeps_the_directory(tmp_path):
    for i in (1, 2):
        (tmp_path / "seed0").mkdir()
        (tmp_path / "seed0" / str(i)).touch()
        assert workdirs.set_aside(tmp_path / "seed0") == tmp_path / f"old-data-{i}-seed0"
    assert (tmp_path / "old-data-2-seed0/2").exists()


def test_numbers_that_are_not_finite_are_null_in_json_and_none_when_read(tmp_path):
    file = tmp_path / "summary.json"
    given = {
        "loss": math.nan,
        "rates": (1.5, -math.inf),
        "deep": [{"a": np.float64("inf")}],
        "n": 3,
    }
    files.write_json(file, given)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    expected = {"loss": None, "rates": [1.5, None], "deep": [{"a": None}], "n": 3}
    assert json.loads(file.read_text(), parse_constant=refuse) == expected
    assert workdirs.read_json(file) == files.replace_nonfinite(given) == expected
    file.write_text('{"loss": NaN, "rates": [1.5, -Infinity], "n": 3}')  # by an older version
    assert workdirs.read_json(file) == {"loss": None, "rates": [1.5, None], "n": 3}
