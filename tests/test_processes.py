"""Two real processes with two devices each train together; a single process with four resumes."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flax_cnns import run
from flax_cnns.checkpoint import finding
from tests.tiny_runs import ROOT, arrays, overrides, records

pytestmark = pytest.mark.slow


def launch(workdir, config):
    command = [sys.executable, "-m", "flax_cnns.launch", "--local=2", "--devices=2", "--"]
    command += [sys.executable, "-m", "experiments.train", f"--workdir={workdir}"]
    return subprocess.Popen(
        command + overrides(config),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_two_processes_train_and_one_resumes_them(config, tmp_path, mode):
    config.train.parallel = mode
    config.train.duration = "60 steps"
    config.train.eval_every = "20 steps"
    config.checkpoint.every = "20 steps"
    run(config, tmp_path / "whole")  # in this process, which has four devices
    cut = launch(tmp_path / "cut", config)
    output = ""
    for line in cut.stdout:
        output += line
        if "step 21/60" in line:
            cut.send_signal(signal.SIGTERM)
    assert cut.wait(timeout=60) == 75, output
    assert "run the same command again to resume" in output
    step = finding.latest_step(tmp_path / "cut")
    assert 21 <= step < 60

    summary = run(config, tmp_path / "cut")  # in this process
    assert summary["processes"] == 1
    assert summary["devices"] == 4
    resumed, expected = arrays(tmp_path / "cut"), arrays(tmp_path / "whole")
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(resumed[name], value, rtol=0, atol=1e-6, err_msg=name)
    ours, theirs = records(tmp_path / "cut"), records(tmp_path / "whole")
    assert [list(r) for r in ours] == [list(r) for r in theirs]
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)


def test_two_processes_stop_between_two_calls(config, tmp_path):
    config.train.steps_per_call = 5
    config.log.every = "5 steps"
    config.train.duration = "60 steps"
    config.train.eval_every = config.checkpoint.every = "20 steps"
    cut = launch(tmp_path / "cut", config)
    output = ""
    for line in cut.stdout:
        output += line
        if "step 25/60" in line:
            cut.send_signal(signal.SIGTERM)
    assert cut.wait(timeout=60) == 75, output
    step = finding.latest_step(tmp_path / "cut")
    assert 25 <= step < 60
    assert step % 5 == 0


def test_processes_that_see_other_directories_say_so(config, tmp_path):
    """As if each host had its own disk, and only one of them had the run."""
    config.train.duration = "1 steps"
    run(config, tmp_path / "0")
    code = (
        "import os, sys; from flax_cnns.cli import flags, train;"
        "rank = os.environ['FLAX_CNNS_PROCESS_ID'];"
        "sys.argv = [a.replace('RANK', rank) for a in sys.argv]; flags.main(train.train)"
    )
    command = [sys.executable, "-m", "flax_cnns.launch", "--local=2", "--devices=2", "--"]
    command += [sys.executable, "-c", code, f"--workdir={tmp_path / 'RANK'}", *overrides(config)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "the processes disagree about what the run directory holds" in result.stderr


def test_a_mistake_of_all_processes_ends_them_all(config, tmp_path):
    config.model.name = "lenet6"
    process = launch(tmp_path / "run", config)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2, output
    assert "unknown model 'lenet6'" in output
    assert not (tmp_path / "run").exists()


OWN = """
from flax_cnns.config import complete

PARTS = "tests.runs.own_parts"


def get_config():
    return complete(
        {
            "model": {"name": f"{PARTS}:Net", "width": 2},
            "data": {
                "name": f"{PARTS}:batches",
                "batch_size": 16,
                "eval_batch_size": 64,
                "validation": 0.0,
            },
            "optimizer": {"name": f"{PARTS}:momentum"},
            "train": {
                "duration": "40 steps",
                "eval_every": "0 steps",
                "loss": f"{PARTS}:focal",
                "metrics": (f"{PARTS}:recall",),
                "regularizers": (f"{PARTS}:Shrink",),
            },
            "own": {"Shrink": {"rate": 0.01}},
            "checkpoint": {"every": "10 steps"},
            "log": {"every": "5 steps", "tensorboard": False},
        }
    )
"""


def test_own_parts_in_two_processes_of_which_one_is_killed(tmp_path):
    """The processes start outside the repository and get their batches from a factory."""
    (tmp_path / "mine.py").write_text(OWN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(workdir, *launcher):
        command = [sys.executable, *launcher, "-m", "experiments.train", "--config=mine.py"]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    two = ("-m", "flax_cnns.launch", "--local=2", "--devices=2", "--", sys.executable)
    run(runpy.run_path(str(tmp_path / "mine.py"))["get_config"](), tmp_path / "alone")
    cut, output = start("cut", *two), ""
    for line in cut.stdout:
        output += line
        if "step 15/40" in line:
            children = Path(f"/proc/{cut.pid}/task/{cut.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
    assert cut.wait(timeout=60) == 128 + signal.SIGKILL, output
    assert finding.latest_step(tmp_path / "cut") >= 10
    again = start("cut", *two)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert "resumed at step" in output
    resumed, expected = arrays(tmp_path / "cut"), arrays(tmp_path / "alone")
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(resumed[name], value, rtol=0, atol=1e-5, err_msg=name)
