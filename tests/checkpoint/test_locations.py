"""Folders of any name hold checkpoints, or are refused before anything is written."""

import os

import numpy as np
import orbax.checkpoint as ocp
import pytest

from flax_cnns.checkpoint import reading
from flax_cnns.checkpoint.finding import find_arrays
from flax_cnns.checkpoint.locations import check_location
from flax_cnns.checkpoint.manager import Checkpoints, write_tree
from flax_cnns.checkpoint.reading import read_tree
from flax_cnns.errors import UserError
from tests.checkpoint.test_manager import assert_same, flip_a_bit

SMALL = {"w": np.arange(1000.0)}

NAMES = ("a[b]", "a*", "what?", "a\\b", "caf\udce9", "tab\t$x#%41 ä")


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_do_not_depend_on_the_name_of_a_folder_above(tmp_path, name):
    """Orbax reads `[`, `*` and `?` as a glob pattern, and TensorStore reads `\\` as `/`."""
    (tmp_path / "a/checkpoints/1/state/ocdbt.process_9").mkdir(parents=True)  # fits the glob a*
    with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, SMALL, host={})
        assert_same(checkpoints.restore(SMALL)[0], SMALL)
    assert_same(read_tree(tmp_path / name, SMALL), SMALL)
    write_tree(tmp_path / name / f"{name} too", SMALL, {})
    assert_same(read_tree(tmp_path / name / f"{name} too", SMALL), SMALL)
    assert sorted(os.listdir(tmp_path)) == sorted(["a", name])


def test_names_that_orbax_misreads_are_refused_where_they_have_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    with pytest.raises(UserError, match=r"below a name with '\[\*'.*, such as /x/a_b\]/_$"):
        check_location("/x/a[b]/*")
    check_location("/x/a]b")


def test_a_first_save_that_cannot_be_read_back_ends_the_run(tmp_path, monkeypatch):
    wait = ocp.CheckpointManager.wait_until_finished

    def lose_a_bit(manager):
        wait(manager)
        for step in tmp_path.glob("run/checkpoints/[0-9]"):
            flip_a_bit(step)

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", lose_a_bit)

    def save():
        with Checkpoints(tmp_path / "run/checkpoints", report=print) as checkpoints:
            checkpoints.save(1, SMALL, host={})

    with pytest.raises(UserError, match=r"cannot be read back, .* another --workdir") as raised:
        save()
    assert "\n" not in str(raised.value)


def test_only_the_first_save_of_a_process_is_read_back(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, SMALL, host={})
        monkeypatch.setattr(reading, "verify_step", None)
        checkpoints.save(2, SMALL, host={})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(SMALL)  # earlier checkpoints can be read
        checkpoints.save(3, SMALL, host={})


def test_places_that_cannot_hold_checkpoints_are_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoints is not a folder, but checkpoints are saved"):
        Checkpoints(tmp_path / "checkpoints")
    for name, words in {
        "run.orbax-checkpoint-tmp": "which marks unfinished saves",
        "ä" * 128: "has 256 bytes",
        "a/" * 2100: "the path has 4",
    }.items():
        with pytest.raises(UserError, match=words):
            check_location(tmp_path / name)
        with pytest.raises(UserError, match="no checkpoint or run"):
            find_arrays(tmp_path / name)
    check_location("b" * 255)
