"""The compilation cache, tested with small programs in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import pytest

from flax_cnns.runtime.compilation_cache import find_default_folder, prune
from tests.tiny_runs import ROOT

PROGRAM = """
import sys
from flax_cnns.runtime import compilation_cache
print("folder", compilation_cache.enable(*sys.argv[1:]))
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
def f(x):
    return jnp.sin(x @ x).sum()
print("value", float(jax.jit(jax.grad(f))(jnp.arange(9.0).reshape(3, 3)).sum()))
print("read", events.count("cache_hits"), "written", events.count("cache_misses"))
"""


def start(*arguments, **environment):
    keep = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    keep["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=keep | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Returns ({"folder": ..., "value": ..., "read": ...}, stderr)."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return dict(line.split(" ", 1) for line in out.splitlines()), err


def program(*arguments, **environment):
    return finish(start(*arguments, **environment))


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "cut":
        del raw[len(raw) // 2 :]
    elif how == "empty":
        raw.clear()
    elif how == "flip":
        raw[len(raw) // 2] ^= 1
    else:  # valid for zlib, but not an executable for XLA
        raw = zlib.compress(b"\0\0\0\1" + b"no executable" * 50)
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Returns (folder, output of the program) of a run that writes and a run that reads."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, [program(folder), program(folder)]


def test_the_second_process_reads_what_the_first_compiled(filled):
    folder, ((cold, said), (warm, said_again)) = filled
    assert cold["folder"] == warm["folder"] == str(folder)
    written = int(cold["read"].split()[-1])
    assert written > 0
    assert cold["read"] == f"0 written {written}"
    assert warm["read"] == f"{written} written 0"
    assert warm["value"] == cold["value"]
    assert said == said_again == ""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "empty", "flip", "nonsense"])
def test_a_damaged_entry_is_said_removed_and_made_again(filled, how):
    folder, value = filled[0], filled[1][0][0]["value"]
    (entry,) = folder.glob("jit_f-*-cache")
    damage(entry, how)
    found, said = program(folder)
    assert found["value"] == value
    assert found["read"].endswith("written 1")
    assert said.startswith("warning: damaged jit_f in the compilation cache; compiling it again")
    assert said.count("\n") == 1
    found, said = program(folder)
    assert (found["value"], said) == (value, "")
    assert found["read"].endswith("written 0")


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path):
    processes = [start(tmp_path / "cache") for _ in range(3)]
    assert len({finish(process)[0]["value"] for process in processes}) == 1
    found, said = program(tmp_path / "cache")
    assert found["read"].endswith("written 0")
    assert said == ""


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path):
    (tmp_path / "file").touch()
    found, said = program(tmp_path / "file" / "cache")
    assert found["folder"] == ""
    assert found["read"] == "0 written 0"
    assert said.startswith(f"warning: no compilation cache: {tmp_path}/file/cache cannot be")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_off_is_off_wherever_the_environment_points(tmp_path):
    found, _ = program("off", JAX_COMPILATION_CACHE_DIR=tmp_path / "cache")
    assert (found["folder"], found["read"]) == ("", "0 written 0")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "~/.cache/flax_cnns/xla"),
        ({"XDG_CACHE_HOME": "/scratch/me"}, "/scratch/me/flax_cnns/xla"),
        ({"XDG_CACHE_HOME": "here"}, "~/.cache/flax_cnns/xla"),
        ({"XDG_CACHE_HOME": "/a", "JAX_COMPILATION_CACHE_DIR": "/b"}, "/b"),
    ],
)
def test_where_it_is(environment, folder):
    assert find_default_folder(environment) == folder


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    for i, name in enumerate(("a", "b", "c")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + i, 1000 + i))
    os.utime(tmp_path / "a-cache", (2000, 1000))  # read more recently
    (tmp_path / "notes").write_bytes(bytes(100))
    prune(tmp_path, max_bytes=200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cache", "c-cache", "notes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "found"),
    [(None, "XDG/flax_cnns/xla True"), ("here", "here True"), ("off", "None False")],
)
def test_every_script_turns_it_on_and_has_the_flag(tmp_path, flag, found):
    code = """
from flax_cnns.cli import flags
def show(argv):
    import jax
    print(jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)
flags.main(show)
"""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code, *([f"--compilation_cache={flag}"] if flag else [])],
        env=environment | {"XDG_CACHE_HOME": f"{tmp_path}/XDG", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.removeprefix(f"{tmp_path}/").strip() == found, done.stderr
