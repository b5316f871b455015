import os
import signal
import subprocess
import sys
import time

import pytest

from flax_cnns.checkpoint.lock import DirectoryLock
from flax_cnns.errors import UserError

HOLD = """
import sys, time
from flax_cnns.checkpoint.lock import DirectoryLock
with DirectoryLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_reads_who_holds_it_and_kill_9_frees_it(tmp_path):
    run = tmp_path / "runs" / "x"  # created if it is missing
    child = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{run} is in use by pid {child.pid} on host \S+;"):
            DirectoryLock(run)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with DirectoryLock(run):
        assert (run / ".lock").read_text().startswith(f"pid {os.getpid()} on host ")


def test_one_process_too_takes_it_once(tmp_path):
    with DirectoryLock(tmp_path), pytest.raises(UserError, match="in use by pid"):
        DirectoryLock(tmp_path)
    DirectoryLock(tmp_path).release()


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    with DirectoryLock(tmp_path):
        child = subprocess.Popen(["sleep", "60"])
    try:
        DirectoryLock(tmp_path).release()
    finally:
        child.kill()
        child.wait()


def test_a_directory_cleared_away_between_open_and_lock(tmp_path, monkeypatch):
    take, cleared = DirectoryLock._take, []

    def take_after_another_process_left(self, file):
        if not cleared:
            cleared.append((tmp_path / ".lock").unlink())
        take(self, file)

    monkeypatch.setattr(DirectoryLock, "_take", take_after_another_process_left)
    with DirectoryLock(tmp_path), pytest.raises(UserError, match="in use"):
        DirectoryLock(tmp_path)


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*file/run: not a directory"):
        DirectoryLock(tmp_path / "file" / "run")


def test_locking_imports_no_jax():
    code = "import sys, flax_cnns.checkpoint.lock; sys.exit('jax' in sys.modules)"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - began < 5
