"""Two real processes of two devices each train together; one process of four goes on."""

from __future__ import annotations

import signal
import subprocess
import sys

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
    whole = launch(tmp_path / "whole", config)
    said = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, said

    cut = launch(tmp_path / "cut", config)
    said = ""
    for line in cut.stdout:
        said += line
        if "step 21/60" in line:
            cut.send_signal(signal.SIGTERM)
    assert cut.wait(timeout=60) == 75, said
    assert "the same command goes on" in said
    step = finding.latest_step(tmp_path / "cut")
    assert 21 <= step < 60

    summary = run(config, tmp_path / "cut")  # in this process, on its four devices
    assert summary["processes"] == 1
    assert summary["devices"] == 4
    found, expected = arrays(tmp_path / "cut"), arrays(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
    ours, theirs = records(tmp_path / "cut"), records(tmp_path / "whole")
    assert [list(r) for r in ours] == [list(r) for r in theirs]
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)


def test_processes_that_see_other_directories_say_so(config, tmp_path):
    """As when the run directory lies on each host's own disk, and only one holds the run."""
    config.train.duration = "1 steps"
    run(config, tmp_path / "0")
    code = (
        "import os, sys; from experiments import train, script;"
        "rank = os.environ['FLAX_CNNS_PROCESS_ID'];"
        "sys.argv = [a.replace('RANK', rank) for a in sys.argv]; script.main(train.train)"
    )
    command = [sys.executable, "-m", "flax_cnns.launch", "--local=2", "--devices=2", "--"]
    command += [sys.executable, "-c", code, f"--workdir={tmp_path / 'RANK'}", *overrides(config)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2, found.stderr
    assert "the hosts disagree about what the run directory holds" in found.stderr


def test_a_mistake_of_all_processes_ends_them_all(config, tmp_path):
    config.model.name = "lenet6"
    process = launch(tmp_path / "run", config)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2, said
    assert "unknown model 'lenet6'" in said
    assert not (tmp_path / "run").exists()
