"""Scripts started as users start them: exit codes, one-line errors, kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import chex
import pytest
from absl import flags

from flax_cnns import run
from flax_cnns.checkpoint import finding
from flax_cnns.cli import flags as script
from flax_cnns.errors import UserError
from tests.tiny_runs import ROOT, arrays, overrides, records


def start(script, *flags, **kwargs):
    command = [sys.executable, "-m", f"experiments.{script}", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **pipes, **kwargs)


def finish(script, *flags):
    """Waits for a script and returns (exit code, output, errors)."""
    process = start(script, *flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def finish_each(script, cases):
    """Returns (exit code, output, errors) of a script for each case's flags."""
    command = [sys.executable, "-m", "tests.forked", f"experiments.{script}", json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_after_kill_9_the_same_command_resumes_bit_for_bit(config, tmp_path):
    config.train.duration = "160 steps"
    config.train.eval_every = "40 steps"
    config.checkpoint.every = "20 steps"
    config.log.every = "15 steps"
    flags = [f"--workdir={tmp_path / 'cut'}", *overrides(config)]
    process = start("train", *flags)
    deadline = time.time() + 120
    while (finding.latest_step(tmp_path / "cut") or 0) < 60 and time.time() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut/summary.json").exists()
    code, out, err = finish("train", *flags)
    assert code == 0, err
    assert "resumed at step" in out
    run(config, tmp_path / "whole")
    chex.assert_trees_all_equal(arrays(tmp_path / "cut"), arrays(tmp_path / "whole"))
    assert records(tmp_path / "cut") == records(tmp_path / "whole")

    code, out, err = finish("evaluate", f"--workdir={tmp_path / 'cut'}", "--checkpoint=best")
    assert code == 0, err
    assert "most often taken for" in out


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("--accept_changed_data", "--accept-changed-data"),
        ("--accept-changed-data", "--accept-changed-data"),
        ("--noaccept_changed_data", "--noaccept-changed-data"),
        ("--no-accept-changed_data", "--noaccept-changed-data"),
        ("--compilation-cache=a-b_c", "--compilation_cache=a-b_c"),
        ("--config.train.eval_every=1 steps", "--config.train.eval_every=1 steps"),
        ("accept_changed_data", "accept_changed_data"),
        ("--un-known_x", "--un-known_x"),
    ],
)
def test_a_flag_may_have_dashes_or_underscores(monkeypatch, given, taken):
    values = flags.FlagValues()
    flags.DEFINE_bool("accept-changed-data", False, "", flag_values=values)
    flags.DEFINE_string("compilation_cache", "", "", flag_values=values)
    monkeypatch.setattr(script.flags, "FLAGS", values)
    assert script._as_defined(given) == taken


@pytest.mark.slow
def test_a_signal_exits_with_75(config, tmp_path):
    config.train.duration = "100000 steps"
    process = start("train", f"--workdir={tmp_path / 'run'}", *overrides(config))
    deadline = time.time() + 120
    while not finding.all_steps(tmp_path / "run") and time.time() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again to resume" in out
    assert finding.latest_step(tmp_path / "run") >= 5


MISTAKES = [  # flags, and a part of the message
    (["--config.optimizer.nam=adam"], "did you mean 'optimizer.name'"),
    (["--config.seed=zero"], "seed"),
    (["--config.model.widht=3"], "lenet5 has no field 'widht'"),
    (["config.seed=3"], "unexpected argument 'config.seed=3'; flags begin with --"),
    (["--config=configs/digits_lenet5.py:smok"], "it has smoke"),
    (
        ["--config", "configs/digits_lenet5.py:smoke", "--config.model.name=lenet6"],
        "unknown model 'lenet6'",
    ),
    (["--config.optimizer.name=adan"], "did you mean 'adam'"),
    (["--config.model.name=resnet"], "unknown model 'resnet'"),
    (["--config=configs/nowhere.py"], "nowhere.py"),
    (["--config.data.name=cifar11"], "did you mean 'cifar10"),
    (["--accept-changed-data=b"], "or --noaccept-changed-data, got --accept-changed-data=b"),
]


def check_mistake(result, message, workdir):
    code, _, err = result
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert message in err
    assert not workdir.exists()


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path):
    flags, message = MISTAKES[0]
    result = finish("train", f"--workdir={tmp_path / 'run'}", *flags)
    check_mistake(result, message, tmp_path / "run")


@pytest.mark.slow
def test_every_mistake_is_one_line_and_leaves_nothing(tmp_path):
    workdirs = [tmp_path / str(i) for i in range(len(MISTAKES))]
    cases = [[f"--workdir={w}", *flags] for w, (flags, _) in zip(workdirs, MISTAKES)]
    for result, (_, message), workdir in zip(finish_each("train", cases), MISTAKES, workdirs):
        check_mistake(result, message, workdir)


@pytest.mark.slow
def test_a_required_flag_is_asked_for():
    code, _, err = finish("train")
    assert code == 2
    assert err == "error: expected --workdir=VALUE, got none (--help lists the flags)\n"


@pytest.mark.slow
def test_a_search_says_what_it_can_search(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    cases = {
        "got 'scalin'; did you mean 'scaling'": ["scalin", workdir],
        "expected one of sanity, scaling, tune, nas first, got ''": [workdir],
        "did you mean 'cifar10": ["scaling", workdir, "--step=7", "--config.data.name=cifar11"],
    }
    for result, message in zip(finish_each("search", list(cases.values())), cases):
        check_mistake(result, message, tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 4.00 GiB for an array"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.\nmore lines"),
    ],
)
def test_memory_that_runs_out_is_one_line(error, monkeypatch, capsys):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(script.app, "run", run)
    monkeypatch.setattr(script, "_on_interrupt", lambda handler: None)  # keeps pytest's handler
    with pytest.raises(SystemExit) as left:
        script.main(lambda argv: None)
    err = capsys.readouterr().err
    assert (left.value.code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: out of memory: {str(error).splitlines()[0]}; use less memory")


@pytest.mark.slow
def test_ctrl_c_leaves_at_once_while_jax_is_imported_and_at_the_end():
    """KeyboardInterrupt during JAX's import becomes an ImportError or a crash."""
    code = (
        "import signal, sys\n"
        "from flax_cnns.cli import flags as script\n"
        "def interrupt(*_):\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt: print('KeyboardInterrupt')\n"
        "where = sys.argv.pop()\n"
        "if where == 'import': script.compilation_cache.enable = interrupt\n"
        "else: script.compilation_cache.enable = lambda _: None\n"
        "try: script.main(interrupt if where == 'work' else lambda argv: None)\n"
        "finally:\n"
        "    if where == 'end': interrupt()\n"
    )
    for where, expected in {"import": 130, "work": 0, "end": -signal.SIGINT}.items():
        done = subprocess.run(
            [sys.executable, "-c", code, where], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == expected, (where, done.stderr)
        assert done.stderr.count("\n") == (where == "import"), done.stderr
        assert done.stdout == ("KeyboardInterrupt\n" if where == "work" else "")


@pytest.mark.parametrize(
    "join", [lambda pipe: [f"--config={pipe}"], lambda pipe: ["--config", pipe]]
)
def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path, join):
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(UserError, match=r"pipe\.py is a named pipe"):
        script._parse(["train", *join(f"{tmp_path}/pipe.py:mode")])


@pytest.mark.slow
def test_a_workdir_without_a_run_is_reported(tmp_path):
    code, _, err = finish("evaluate", f"--workdir={tmp_path}")
    assert code == 2
    assert "no run here" in err
