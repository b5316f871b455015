"""The templates in experiments/launch, with the commands of clusters replaced by `echo`.

docs/accelerators.md lists the validators that were tried by hand.
"""

from __future__ import annotations

import os
import subprocess

import pytest
import yaml

from flax_cnns import recipes
from flax_cnns.runtime import cluster
from tests.tiny_runs import ROOT

FOLDER = ROOT / "experiments" / "launch"


def start(script, tmp_path, *arguments, commands=(), **environment):
    """Runs a script with commands that print their arguments, one line each."""
    for name in commands:
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", script, *arguments],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, ""),
        ({"CHECK": "1"}, "python -m flax_cnns.launch --check -- "),
        ({"LOGS": "/a b"}, "python -m flax_cnns.launch --logs=/a b -- "),
        ({"CHECK": "1", "LOGS": "/l"}, "python -m flax_cnns.launch --check --logs=/l -- "),
    ],
)
def test_slurm_and_tpu_pods(tmp_path, environment, launcher):
    given = ("--workdir=a b", "--config=x")
    lines = start(FOLDER / "slurm.sbatch", tmp_path, *given, commands=["srun"], **environment)
    assert lines == [f"srun --label {launcher}python -m experiments.train --workdir=a b --config=x"]
    environment = {**environment, "TPU": "pod", "ZONE": "zone"}
    lines = start(FOLDER / "tpu_pod.sh", tmp_path, *given, commands=["gcloud"], **environment)
    sent = lines[0].partition("--command=")[2]
    assert sent.startswith("cd ~/flax_cnns && python3 -m ")
    # What a host's shell makes of the command:
    words = subprocess.run(
        ["bash", "-c", f'python3() {{ echo python3 "$@"; }}; cd() {{ :; }}; {sent}'],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = f"{launcher}python -m experiments.train --workdir=a b --config=x"
    assert words.stdout == expected.replace("python -m", "python3 -m") + "\n"


def test_the_jobset():
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    name = jobset["metadata"]["name"]
    pod = job["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        variables = {each["name"]: each for each in container["env"]}
        # JobSet names a pod <jobset>-<group>-<job>-<pod>.<jobset>
        host = f"{name}-{group['name']}-0-0.{name}"
        assert variables[cluster.COORDINATOR]["value"] == f"{host}:8476"
        assert int(variables[cluster.NUM_PROCESSES]["value"]) == job["completions"]
        assert cluster.PROCESS_ID in variables
        flags = dict(word.lstrip("-").split("=") for word in container["args"][2:])
        assert recipes.find(flags["config"])
        assert container["command"][:3] == ["python", "-m", "flax_cnns.launch"]
    assert job["completions"] == job["parallelism"]


def test_the_task_of_skypilot(tmp_path):
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert recipes.find(task["envs"]["CONFIG"])
    (tmp_path / "run.sh").write_text(f"{task['run']}\nenv | grep ^FLAX_CNNS | sort")
    environment = dict(SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2")
    environment |= dict(SKYPILOT_NODE_RANK="1", **task["envs"])
    lines = start(tmp_path / "run.sh", tmp_path, commands=["python"], **environment)
    train = "flax-cnns train --workdir=/runs/resnet50 --config=imagenet_resnet50"
    train += " --config.data.dir=/runs/data"
    assert lines == [
        f"python -m flax_cnns.launch --check --timeout=300 -- {train}",
        f"python -m flax_cnns.launch --logs=/runs/logs/resnet50 -- {train}",
        "FLAX_CNNS_COORDINATOR=10.0.0.1:8476",
        "FLAX_CNNS_NUM_PROCESSES=2",
        "FLAX_CNNS_PROCESS_ID=1",
    ]


def test_the_container_copies_what_there_is():
    lines = (FOLDER / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "flax_cnns", "configs"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
