"""Standard output and standard error that cannot be written."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.console import Console

from flax_cnns.runtime import output
from tests.tiny_runs import ROOT

SCRIPT = """
import sys
from flax_cnns.runtime import output
with output.safe():
    for i in range(5000):
        print("a line of some length", i)
    print("done", file=sys.stderr)
    sys.exit(75)
"""


@pytest.fixture
def full(monkeypatch):
    """Makes standard output write to a full disk."""
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield stream


def test_a_full_disk_costs_lines_and_is_said_once(full, capsys):
    monkey = sys.stdout = full  # capsys has replaced sys.stdout
    with output.safe():
        print("plain", flush=True)
        Console().print("rich")
        print("again", flush=True)
    assert sys.stdout is monkey
    full.flush()  # as the interpreter does when it exits
    said = capsys.readouterr().err
    assert said == "warning: standard output cannot be written: No space left on device\n"


def test_another_error_of_a_stream_stays_one(monkeypatch, capsys):
    with output.safe(), pytest.raises(TypeError):
        sys.stdout.write(3)
    with output.safe(), output.safe():
        print("said")
    assert capsys.readouterr().out == "said\n"


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("{} | head -1; exit ${{PIPESTATUS[0]}}", "done\n"),
        ("{} > /dev/full 2>&1", ""),
        ("{} >&- 2>&-", ""),
    ],
    ids=["head", "full", "closed"],
)
def test_the_exit_code_is_that_of_the_script(shell, said):
    command = shell.format(f"{sys.executable} -c '{SCRIPT}'")
    found = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (75, said)
