"""Every command refuses the address of a bucket in one line, and creates nothing."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from flax_cnns import config as configs
from flax_cnns import files, run
from flax_cnns.checkpoint.graft.sources import open_source
from flax_cnns.checkpoint.locations import check_location
from flax_cnns.cli.__main__ import COMMANDS
from flax_cnns.data.load import load_dataset
from flax_cnns.errors import UserError
from flax_cnns.runs import workdir as workdirs
from tests.tiny_runs import ROOT

BUCKET = "gs://bucket/x"
# An address in every place where a command takes one.
GIVEN = [
    ["train", f"--workdir={BUCKET}"],
    ["evaluate", f"--workdir={BUCKET}"],
    ["evaluate", f"--ensemble=runs/a,{BUCKET}@best"],
    ["predict", f"--workdir={BUCKET}", "a.png"],
    ["predict", "--model=resnet18", f"--weights=timm={BUCKET}", "a.png"],
    ["inspect", BUCKET],
    ["compare", "runs/a", BUCKET],
    ["compare", f"--chart={BUCKET}"],
    ["tabulate", BUCKET],
    ["convert", "--model=resnet18", "--source=timm", f"--out={BUCKET}"],
    ["finetune", f"--workdir={BUCKET}"],
    ["ablate", f"--workdir={BUCKET}"],
    ["search", "scaling", f"--workdir={BUCKET}"],
    ["visualize", "features", f"--workdir={BUCKET}", "a.png"],
    ["fits", "--config=digits_lenet5", "--topology=v5e-8", f"--cache={BUCKET}"],
    ["audit", f"--table={BUCKET}", "--topology=v5e-8"],
]

# Starts the commands as `flax-cnns` does, each in a fork, because importing takes longest.
START = """
import json, os, sys
import flax_cnns.cli.flags
from flax_cnns.cli import __main__
for arguments in json.loads(sys.argv[1]):
    sys.stderr.flush()
    if os.fork() == 0:
        sys.argv = ["flax-cnns", *arguments]
        __main__.main()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.parametrize(
    "given", [GIVEN[:1] + GIVEN[6:7], pytest.param(GIVEN, marks=pytest.mark.slow)]
)
def test_every_command_refuses_an_address(tmp_path, given):
    assert {arguments[0] for arguments in GIVEN} == set(COMMANDS)
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(given)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2"] * len(given), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(given)
    for line in lines:
        assert line.startswith("error: ")
        assert f"{BUCKET}" in line
        assert "is an address, not a path" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", [BUCKET, pathlib.Path(BUCKET), "s3://b", "hdfs://a/b", "file:///a"]
)
def test_the_library_refuses_it_too(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = configs.default_config()
    for call in (
        lambda: check_location(name),
        lambda: run(config, name),
        lambda: open_source(name),
        lambda: workdirs.split_checkpoint(name),
    ):
        with pytest.raises(UserError, match="is an address, not a path: runs need locks"):
            call()
    for field, source in (("dir", "tfds"), ("dir", "archive"), ("dir", "folder")):
        config = configs.default_config()
        config.data.name, config.data.source = "cifar10", source
        setattr(config.data, field, os.fspath(name))
        with pytest.raises(UserError, match=r"^config\.data\.dir: .* mount it, for example"):
            load_dataset(config.data)
    config.data.update(name=f"{name}/a.npz", source="auto", dir="")
    with pytest.raises(UserError, match=r"^config\.data\.name: "):
        load_dataset(config.data)
    assert os.listdir(tmp_path) == []


def test_paths_that_are_no_addresses():
    for path in ("runs/x", "./gs:/x", "C:/x", "/a/gs://b", "timm:resnet18=w.pth", "a:b", ""):
        files.check_local(path)
    with pytest.raises(UserError, match="download it"):
        files.check_local("https://a.b/c.png")
