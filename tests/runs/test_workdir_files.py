"""A run's directory: which files may be in it, and one-line errors for bad files."""

import pytest

from configs.common import get_config
from flax_cnns import files
from flax_cnns.config import to_plain
from flax_cnns.errors import UserError, did_you_mean
from flax_cnns.runs import record, workdir

CONFIG = to_plain(get_config())


@pytest.fixture
def run(tmp_path):
    files.write_json(tmp_path / "config.json", CONFIG)
    return tmp_path


BAD = ["[]", "3", "{", "{}", '{"model": 3}', '{"model": [1]}', "\x00"]


@pytest.mark.parametrize("content", BAD)
def test_a_config_of_the_wrong_kind_is_one_line_with_a_cure(run, content):
    (run / "checkpoints/3").mkdir(parents=True)
    (run / "config.json").write_text(content)
    check = lambda run: workdir.check_workdir(run, CONFIG)  # noqa: E731
    for read in (workdir.read_config, record.read_record, check):
        with pytest.raises(UserError, match=r"config.json is damaged: .*copy that file") as raised:
            read(run)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "cure"), [("summary.json", "remove the file"), ("dataset.json", "remove the file")]
)
def test_json_that_is_no_object_is_one_line_with_the_cheapest_cure(run, name, cure):
    (run / name).write_text("[1]")
    with pytest.raises(UserError, match=f"{name} is damaged: .* a list; {cure}"):
        workdir.read_json(run / name)


def test_a_file_where_the_run_needs_a_folder_is_reported_before_it_starts(run):
    (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is not a folder, but the run writes a folder"):
        workdir.check_workdir(run, CONFIG)
    (run / "checkpoints").unlink()
    (run / "checkpoints").symlink_to(run / "nowhere")
    with pytest.raises(UserError, match="checkpoints is not a folder"):
        workdir.check_workdir(run, CONFIG)
    (run / "checkpoints").unlink()
    (run / "summary.json").mkdir()
    with pytest.raises(UserError, match=r"summary.json is not a file, but the run writes a file"):
        workdir.check_workdir(run, CONFIG)


def test_a_checkpoint_is_named_once():
    assert workdir.split_checkpoint("runs/x@best") == workdir.split_checkpoint("runs/x", "best")
    assert workdir.split_checkpoint("runs/x@3", "3")[1] == "3"
    assert workdir.split_checkpoint("runs/x")[1] == ""
    with pytest.raises(UserError, match="name two checkpoints; name one"):
        workdir.split_checkpoint("runs/x@best", "latest")


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with (
        pytest.raises(UserError, match="has 300 bytes"),
        workdir.open_workdir(tmp_path / ("x" * 300), primary=True),
    ):
        pass
    with pytest.raises(UserError, match="no run here"):
        workdir.read_config(tmp_path / ("x" * 300))


def test_what_was_asked_for_is_no_advice():
    assert did_you_mean("a.py", ["a.py"]) == ""
    assert did_you_mean("a.py", ["a.py", "aa.py"]) == "; did you mean 'aa.py'?"
