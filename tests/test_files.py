"""Special files are refused before they are opened; files are written atomically."""

import contextlib
import os

import pytest

from flax_cnns.data.images import check_photos
from flax_cnns.errors import UserError
from flax_cnns.files import check_regular_file, replace_atomically, write_text


def test_a_pipe_or_a_device_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is a named pipe; expected a file"):
        check_regular_file(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"/dev/zero is a device"):
        check_regular_file("/dev/zero")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(UserError, match="link is a named pipe"):
        check_photos([tmp_path / "link"])  # raises instead of waiting for a writer
    for fine in (tmp_path, __file__, "not there", "", "\0"):
        check_regular_file(fine)


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with contextlib.suppress(KeyError), replace_atomically(path) as beside:
        beside.write_text("half of it")
        raise KeyError
    assert path.read_text() == "old"
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"  # the old file is still open and was never half overwritten
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(UserError, match=r"cannot write .*nowhere/x\.json: No such file"):
        write_text(tmp_path / "nowhere/x.json", "new")
