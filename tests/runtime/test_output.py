"""Standard output and standard error that cannot be written."""

from __future__ import annotations

import importlib.util
import os
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


def test_a_missing_driver_is_not_said(monkeypatch, capfd):
    """The lines of CUDA's plugin, of JAX 0.10.2; other lines and the order stay."""
    said = [
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        "I0000 00:00:1.2 34 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU"
        " will not be used.",
        "an error of a library",
    ]

    def load():
        with output.without_driver_noise():
            os.write(2, "\n".join([*said, ""]).encode())

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    load()
    assert capfd.readouterr().err == "an error of a library\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    load()
    assert capfd.readouterr().err.splitlines() == said
