from __future__ import annotations

import socket
import sys

import pytest

from flax_cnns.errors import UserError
from flax_cnns.runtime import cluster, launch
from flax_cnns.runtime.logs import SHOWN, HostLog


def test_each_process_has_a_log_and_failures_are_in_one_place(tmp_path, capsys):
    code = (
        "import os, sys\n"
        f"index = os.environ['{cluster.PROCESS_ID}']\n"
        "print('from', index)\n"
        "if index == '1': sys.exit('error: the disk is full')\n"
    )
    for _ in range(2):  # a second start appends
        assert (
            launch.main(["--local=2", f"--logs={tmp_path}", "--", sys.executable, "-c", code]) == 1
        )
    err = capsys.readouterr().err
    assert f"[launch] the errors are in {tmp_path}/errors\n" in err
    for index in "01":
        text = (tmp_path / f"host{index}.log").read_text()
        assert text.count(f"from {index}\n") == text.count("==== ") == 2
    assert [path.name for path in (tmp_path / "errors").iterdir()] == ["host1.txt"]
    text = (tmp_path / "errors" / "host1.txt").read_text()
    assert "\nended with exit code 1\nerror: the disk is full\n" in text
    # The two streams of a process come in any order.
    assert "error: the disk is full\n" in text.partition("its last lines:\n")[2]


def test_one_process_of_a_cluster(tmp_path, monkeypatch, capfd):
    """Its environment stays as it is, and its output has no prefix."""
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.delenv(cluster.PROCESS_ID, raising=False)
    code = "import os; print(os.environ.get('FLAX_CNNS_PROCESS_ID'))"
    command = ["--", sys.executable, "-c", code]
    assert launch.main([f"--logs={tmp_path}", *command]) == 0
    assert capfd.readouterr().out == "None\n"
    assert (tmp_path / "host3.log").read_text().endswith("\nNone\n")


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"FLAX_CNNS_PROCESS_ID": "2", "SLURM_PROCID": "5"}, "host2"),
        ({"TPU_WORKER_ID": "0"}, "host0"),
        ({"JOB_COMPLETION_INDEX": "11"}, "host11"),
        ({"SLURM_PROCID": ""}, socket.gethostname()),
    ],
)
def test_the_name_of_a_host(environment, name):
    assert cluster.find_host_name(environment) == name


def test_a_failure_shows_the_last_lines(tmp_path):
    log = HostLog(tmp_path, "host0", ["train", "a b"])
    for i in range(100):
        log.write(f"line {i}\n")
    log.end("by SIGKILL", "")
    lines = (tmp_path / "errors" / "host0.txt").read_text().splitlines()
    assert lines[0].endswith(": train 'a b'")
    assert lines[1] == "ended by SIGKILL"
    assert lines[-SHOWN:] == [f"line {i}" for i in range(100 - SHOWN, 100)]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--logs: cannot write into"):
        HostLog(tmp_path / "file", "host0", ["train"])
