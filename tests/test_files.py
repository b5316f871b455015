"""What is no file is refused before it is opened."""

import os

import pytest

from flax_cnns.data.images import check_photos
from flax_cnns.errors import UserError
from flax_cnns.files import check_regular


def test_a_pipe_or_a_device_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is a named pipe; expected a file"):
        check_regular(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"/dev/zero is a device"):
        check_regular("/dev/zero")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(UserError, match="link is a named pipe"):
        check_photos([tmp_path / "link"])  # and does not wait for a writer
    for fine in (tmp_path, __file__, "not there", "", "\0"):
        check_regular(fine)
