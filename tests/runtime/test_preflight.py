from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from flax_cnns.errors import UserError
from flax_cnns.runtime import cluster, preflight
from flax_cnns.runtime.preflight import Preflight, check_mount, read_seconds
from tests.tiny_runs import ROOT, overrides


@pytest.fixture
def alone(monkeypatch):
    for name in (cluster.COORDINATOR, cluster.NUM_PROCESSES, cluster.PROCESS_ID):
        monkeypatch.delenv(name, raising=False)
    with Preflight(seconds=0.2) as checks:
        yield checks


def test_a_folder_that_runs_can_use(alone, tmp_path, capsys):
    assert check_mount(alone, str(tmp_path / "new" / "run"))
    assert list(tmp_path.iterdir()) == []
    assert alone.finish() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", "workdir"],
        ["ok", "locks"],
        ["ok", "renames"],
        ["ok", "appends"],
    ]
    assert lines[-1] == "preflight: all 5 passed"


def fail_with(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("name", "replacement", "said"),
    [
        ("fcntl.flock", fail_with(errno.ENOLCK), "locks: .* has no locks"),
        ("fcntl.flock", lambda *_: None, "locks: .* got a lock that process 0 holds"),
        ("os.replace", lambda *_: None, "renames: .* does not see the file and the folder"),
        ("os.rename", fail_with(errno.ENOSYS), "renames: .* does not see"),
        ("tempfile.mkdtemp", fail_with(errno.EROFS), "cannot write into .*: Read-only file"),
    ],
)
def test_a_file_system_that_lacks_something(
    alone, tmp_path, capsys, monkeypatch, name, replacement, said
):
    monkeypatch.setattr(name, replacement)
    assert not check_mount(alone, str(tmp_path))
    monkeypatch.undo()
    assert alone.finish() == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=said):
        raise UserError(capsys.readouterr().err)


def test_an_appended_line_that_is_lost(alone, tmp_path, monkeypatch, capsys):
    """As on a bucket that is mounted without appends."""
    real = open

    def without_appends(path, mode="r", *rest):
        if mode == "a":
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return real(path, mode, *rest)

    monkeypatch.setattr(preflight, "open", without_appends, raising=False)
    assert not check_mount(alone, str(tmp_path))
    assert "does not see the line that process 0 appended" in capsys.readouterr().out


def test_checks_that_fail(alone, capsys):
    assert alone.gather("fine", lambda: "good")
    assert not alone.gather("data", lambda: {}["digits"])
    assert alone.finish() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: preflight: data: process 0 (on ")
    assert err.endswith("): KeyError: 'digits'\n")


@pytest.mark.parametrize("text", ["0", "-1", "x", "inf", "nan"])
def test_seconds_that_are_none(text):
    with pytest.raises(UserError, match="expected a number of seconds"):
        read_seconds({preflight.SECONDS_VARIABLE: text})
    assert read_seconds({}) == 60


def test_a_check_that_hangs_ends_the_process():
    code = (
        "import time; from flax_cnns.runtime.preflight import Preflight;"
        "Preflight(seconds=0.2).gather('devices', lambda: time.sleep(60))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLAX_CNNS_")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("): devices: no end after 0.2 s\n")


def check_two(tmp_path, broken, *, command=(), seconds=20):
    """Checks two processes; the shell code `broken` runs first in process 1. Returns (code, out,
    err)."""
    script = tmp_path / "start.sh"
    inner = " ".join(command) or f"{sys.executable} -m flax_cnns.runtime.preflight"
    first = f'if [ "$FLAX_CNNS_PROCESS_ID" = 1 ]; then\n{broken or ":"}\nfi'
    script.write_text(f'#!/bin/sh\n{first}\nexec {inner} "$@"\n')
    script.chmod(0o755)
    launcher = [sys.executable, "-m", "flax_cnns.launch", "--local=2", "--devices=2"]
    quick = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    environment = {**os.environ, preflight.SECONDS_VARIABLE: str(seconds), "XLA_FLAGS": quick}
    logs = f"--logs={tmp_path / 'logs'}"
    given = [] if command else [f"--workdir={tmp_path / 'shared'}"]
    done = subprocess.run(
        [*launcher, logs, "--", str(script), *given],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def fake_version(tmp_path, name, version):
    folder = tmp_path / "fake" / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return f"export PYTHONPATH={folder.parent}:$PYTHONPATH"


def test_another_version_is_named(tmp_path):
    code, out, err = check_two(tmp_path, fake_version(tmp_path, "optax", "9.9.9"))
    assert code == 2, err
    (line,) = [line for line in out.splitlines() if "FAILED" in line]
    assert line.startswith("[0] FAILED  optax")
    assert "process 1 (on " in line
    assert "has 9.9.9; process 0" in line
    # The reason is in the log of each process, and in one place.
    for host in ("host0", "host1"):
        text = (tmp_path / "logs" / "errors" / f"{host}.txt").read_text()
        assert "error: preflight: optax: process 1 (on " in text
    assert "FAILED  optax" in (tmp_path / "logs" / "host0.log").read_text()
    assert err.splitlines()[-1].startswith("[launch] process ")
    assert "error: preflight: optax" in err.splitlines()[-1]


@pytest.mark.slow
def test_an_address_that_is_wrong_on_one_process(tmp_path):
    broken = "export FLAX_CNNS_COORDINATOR=127.0.0.1:1"
    code, _, err = check_two(tmp_path, broken, seconds=2)
    assert code == 2
    assert "[1] error: process 1 (on " in err
    assert "nobody answers at 127.0.0.1:1 within 2 s (connection refused)" in err
    assert "[0] error: process 1 of 2 did not come to 127.0.0.1:" in err


@pytest.mark.slow
def test_another_disk_at_the_same_path(tmp_path):
    """Process 1 mounts another folder over the shared one, which only it sees."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "other").mkdir()
    mount = f"mount --bind {tmp_path}/other {tmp_path}/shared"
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("this user may not mount")
    broken = (
        f"exec {unshare} -m sh -c '{mount} && exec {sys.executable} -m flax_cnns.runtime.preflight"
        ' "$@"\' sh "$@"'
    )
    code, out, _ = check_two(tmp_path, broken, seconds=2)
    assert code == 2
    (line,) = [line for line in out.splitlines() if "FAILED" in line]
    assert "does not see the files that process 0 writes into" in line
    assert "process 1 (on " in line
    assert list((tmp_path / "shared").iterdir()) == list((tmp_path / "other").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", 'set -- "$@" --config.seed=7'])
def test_the_config_of_a_run(config, tmp_path, broken):
    config.model.name = "tests.runs.own_parts:Bare"  # compiles fast
    config.data.mock = 64
    config.data.augment.update(dict(pad_crop=0, rotate=0.0, scale=0.0))
    workdir = f"--workdir={tmp_path / 'run'}"
    start = [sys.executable, "-m", "experiments.train", "--check", workdir]
    start += [f"'{flag}'" for flag in overrides(config)]
    code, out, err = check_two(tmp_path, broken, command=start)
    assert not (tmp_path / "run").exists()
    if broken:
        assert code == 2
        said = "has another config than process 0 (seed: 0 there, 7 here)"
        assert said in err
        return
    assert code == 0, out + err
    facts = [line.split()[2] for line in out.splitlines() if line.startswith("[0] ok")]
    assert facts[:2] == ["processes", "python"]
    assert facts[-4:] == ["data", "data", "training", "loss"]
    assert f"preflight: all {len(facts)} passed" in out
    assert list((tmp_path / "logs" / "errors").iterdir()) == []
