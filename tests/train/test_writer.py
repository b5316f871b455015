"""The log: only complete records, each step once, equal in JSONL and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from flax_cnns.errors import UserError
from flax_cnns.train.writer import Writer, read_jsonl


def steps(path, name="train/loss"):
    return [record["step"] for record in read_jsonl(path / "metrics.jsonl") if name in record]


def tensorboard_scalars(path, tag):
    """Returns [(step, value)] as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def log(path, values, **fields):
    with Writer(path, **fields) as writer:
        for step, value in values:
            writer.write(step, {"train/loss": value})


def test_records_come_back_as_written(tmp_path):
    with Writer(tmp_path / "new" / "run") as writer:
        writer.write(20, {"train/loss": np.float32(0.5), "train/accuracy": 0.25})
        writer.write(20, {"validation/accuracy": 0.75})
        writer.write(20, {})
    first, second = read_jsonl(tmp_path / "new" / "run" / "metrics.jsonl")
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 20, "train/loss": 0.5, "train/accuracy": 0.25}
    assert second == {"step": 20, "validation/accuracy": 0.75}


def test_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    log(tmp_path, [(1, math.nan), (2, math.inf), (3, -math.inf), (4, 1.0)])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for line in lines[:3]:
        strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert strict["train/loss"] is None
    values = [record["train/loss"] for record in read_jsonl(tmp_path / "metrics.jsonl")]
    assert np.isnan(values).tolist() == [True, True, True, False]
    log(tmp_path, [(5, 1.0)], resume_step=4)  # they are still valid after the file is rewritten
    assert (tmp_path / "metrics.jsonl").read_text().count("null") == 3
    assert np.isnan(tensorboard_scalars(tmp_path, "train/loss")[0][1])


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    log(tmp_path, [(s, float(s)) for s in (20, 40, 60)])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 80, "time": 17')
    assert steps(tmp_path) == [20, 40, 60]
    log(tmp_path, [(s, float(s) + 0.5) for s in (60, 80)], resume_step=40)
    assert steps(tmp_path) == [20, 40, 60, 80]
    assert read_jsonl(tmp_path / "metrics.jsonl")[2]["train/loss"] == 60.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_an_event_of_the_resumed_step_is_not_written_twice(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(40, {"train/loss": 1.0})
        writer.write(40, {"test/loss": 2.0})
    with Writer(tmp_path, resume_step=40) as writer:
        writer.write(40, {"test/loss": 2.0})  # a complete run that is started again
        writer.write(40, {"validation/loss": 3.0})  # the last session did not reach this one
    assert steps(tmp_path, "test/loss") == [40]
    assert steps(tmp_path, "validation/loss") == [40]
    assert tensorboard_scalars(tmp_path, "test/loss") == [(40, 2.0)]


def test_a_fresh_start_replaces_the_log(tmp_path):
    log(tmp_path, [(20, 1.0), (40, 1.0)])
    log(tmp_path, [(10, 2.0)])
    assert steps(tmp_path) == [10]
    assert tensorboard_scalars(tmp_path, "train/loss") == [(10, 2.0)]


def test_tensorboard_reads_each_step_once_after_resumes(tmp_path):
    log(tmp_path, [(s, 1.0) for s in (20, 40, 60)])
    [first] = (tmp_path / "tensorboard").iterdir()
    with open(first, "ab") as file:
        file.write(b"\x20\0\0\0\0\0\0\0torn")  # the process was killed while it wrote an event
    log(tmp_path, [(s, 2.0) for s in (60, 80, 100)], resume_step=40)
    log(tmp_path, [(s, 3.0) for s in (100, 120)], resume_step=80)  # all in one second
    expected = [(20, 1.0), (40, 1.0), (60, 2.0), (80, 2.0), (100, 3.0), (120, 3.0)]
    assert tensorboard_scalars(tmp_path, "train/loss") == expected
    found = [(r["step"], r["train/loss"]) for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert found == expected


@pytest.mark.slow
def test_a_killed_process_loses_nothing_it_wrote(tmp_path):
    code = """
        import os, signal, sys
        from flax_cnns.train.writer import Writer
        writer = Writer(sys.argv[1])
        for step in range(1, 101):
            writer.write(step, {"train/loss": float(step)})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command).returncode == -9
    assert steps(tmp_path) == list(range(1, 101))
    assert [s for s, _ in tensorboard_scalars(tmp_path, "train/loss")] == list(range(1, 101))


def test_only_the_primary_process_writes(tmp_path):
    log(tmp_path, [(1, 1.0)], primary=False)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_can_be_left_out(tmp_path):
    log(tmp_path, [(1, 1.0)], tensorboard=False)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("primary", [True, False])
def test_wandb_missing_says_how_to_install_it(tmp_path, monkeypatch, primary):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb: ImportError
    with pytest.raises(UserError, match=r'pip install "flax_cnns\[wandb\]"'):
        Writer(tmp_path, wandb="project", primary=primary)
    assert list(tmp_path.iterdir()) == []


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    inits, logs = [], []
    fake = types.ModuleType("wandb")

    def init(**fields):
        inits.append(fields)
        return types.SimpleNamespace(
            log=lambda values, step: logs.append((step, values)), finish=lambda: logs.append("end")
        )

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log(tmp_path, [(1, 1.0)], wandb="project", config={"seed": 3})
    log(tmp_path, [(2, 2.0)], wandb="project", resume_step=1)
    log(tmp_path, [(1, 3.0)], wandb="project")
    assert inits[0]["project"] == "project"
    assert inits[0]["config"] == {"seed": 3}
    assert inits[0]["id"] == inits[1]["id"] != inits[2]["id"]
    assert logs[:3] == [(1, {"train/loss": 1.0}), "end", (2, {"train/loss": 2.0})]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0}\nrubbish\n{"step": 2, "time": 0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .*rubbish"):
        Writer(tmp_path, resume_step=2)
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        read_jsonl(tmp_path / "none.jsonl")


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file, no folder")
    with pytest.raises(UserError, match=r"cannot write the log .*run") as error:
        Writer(tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full disk to offer")
def test_a_full_disk_is_one_line(tmp_path):
    with Writer(tmp_path, tensorboard=False) as writer:
        writer._file.close()
        writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(UserError, match="No space left"):
            writer.write(1, {"train/loss": 1.0})
