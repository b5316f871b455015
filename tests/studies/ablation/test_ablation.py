"""Rows and their mistakes, paired seeds, and cells that fail, diverge or are interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import chex
import numpy as np
import pytest
from rich.console import Console

from configs.common import get_config
from flax_cnns import tree as pytree
from flax_cnns.data import pipeline
from flax_cnns.data.fingerprint import DataSnapshot
from flax_cnns.errors import UserError
from flax_cnns.runs import build, child
from flax_cnns.studies.ablation import ablate, forecast, plan
from flax_cnns.studies.ablation.cells import run_cells
from tests.test_scripts import finish


@pytest.fixture
def config():
    """A few steps of LeNet-5 on noise."""
    config = get_config()
    config.data.update(dict(mock=64, validation=0, batch_size=16, eval_batch_size=64))
    config.train.update(dict(duration="4 steps", eval_every="0 steps", max_bad_steps=2))
    config.schedule.name = "constant"
    config.checkpoint.every = "0 steps"
    config.log.tensorboard = False
    return config


# ---- rows


def test_a_row_is_the_config_with_its_overrides(config):
    decay = ((".*/kernel", 1e-4), (".*", 0.0))
    rows = plan.make_rows(
        config,
        [
            ("base", {}),
            ("decay-0.1", {"optimizer.weight_decay": decay}),
            ("nested", {"data.augment": {"flip": True, "cutout": 4}}),
            ("own", {"model.dropout": 0.3}),
        ],
    )
    base, decayed, nested, own = (row.config for row in rows)
    assert base.to_dict() == config.to_dict()
    assert decayed.optimizer.weight_decay == decay
    assert (nested.data.augment.flip, nested.data.augment.cutout) == (True, 4)
    assert nested.data.augment.pad_crop == 0
    assert own.model.dropout == 0.3  # not a field of configs/common.py
    assert "dropout" not in config.model
    assert rows[1].overrides == {"optimizer.weight_decay": [[".*/kernel", 1e-4], [".*", 0.0]]}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (
            [("a", {"mix.mixupp": 0.2})],
            "row a: unknown field 'mix.mixupp'; did you mean",
        ),
        ([("a", {"mix.mixup": "much"})], "row a: config.mix.mixup: expected a number"),
        ([("a", {}), ("b", {}), ("a", {"mix.mixup": 0.2})], "two rows have the name 'a'"),
        ([("a/b", {})], "row name 'a/b' must also name a directory"),
        ([("..", {})], "row name '..' must also name a directory"),
        ([("", {})], "row name '' must also name a directory"),
        ([("report.md", {})], "a row cannot be called 'report.md'"),
        ([("a", {"seed": 3})], "row a: seed: every row has the same seeds"),
        (["a"], "expected (name, {field: value, ...}), got 'a'"),
        ([("a", {1: 2})], "expected (name, {field: value, ...})"),
        ([], "expected at least one row, got none"),
    ],
)
def test_a_mistake_in_a_row_is_reported(config, sweep, message):
    with pytest.raises(UserError) as error:
        plan.make_rows(config, sweep)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.widht": 3}, "row wrong: lenet5 has no field 'widht'"),
        ({"model.num_classes": 3}, "row wrong: model.num_classes: 3 classes are too few"),
        ({"optimizer.lr_mult": (("params/hed/.*", 2.0), (".*", 1.0))}, "row wrong: "),
        ({"train.duration": "0 steps"}, "row wrong: train.duration"),
    ],
)
def test_what_a_run_would_refuse_is_reported_before_any_runs(config, tmp_path, overrides, message):
    sweep = [("right", {}), ("wrong", overrides)]
    with pytest.raises(UserError, match=message):
        ablate.ablate(config, sweep, tmp_path / "sweep", seeds=1)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_mistake_of_the_script_is_one_line(tmp_path):
    file = tmp_path / "none.py"
    file.write_text("from configs.common import get_config\n")
    code, _, err = finish("ablate", f"--workdir={tmp_path / 'x'}", f"--config={file}")
    assert code == 2
    assert err.startswith(f"error: {file} has no sweep()")
    assert err.count("\n") == 1


def test_a_file_without_a_sweep(tmp_path):
    file = tmp_path / "none.py"
    file.write_text("from configs.common import get_config\n")
    with pytest.raises(UserError, match=r"none\.py has no sweep\(\)"):
        plan.load_sweep(file)
    file.write_text("def sweep():\n    [('a', {})]\n")
    with pytest.raises(UserError, match=r"must return or yield rows, got None"):
        plan.load_sweep(file)


# ---- cells


def test_seeds_are_paired_over_rows(config, tmp_path):
    rows = plan.make_rows(
        config, [("base", {}), ("mixed", {"mix.mixup": 0.2}), ("wide", {"model.num_classes": 12})]
    )
    cells = plan.make_cells(rows, tmp_path, 2)
    at = {(cell.row.name, cell.seed): cell.config for cell in cells}
    assert {at["base", s].seed for s in (0, 1)} == {config.seed, config.seed + 1}
    assert len({at[key].data.split_seed for key in at}) == 1

    def drawn(name, seed):
        """Returns (the first images, initial values by path)."""
        components = build.build_components(at[name, seed])
        stream = pipeline.train_batches(
            components.dataset, components.config.data, seed=components.config.seed
        )
        with contextlib.closing(stream):
            images = next(stream)["image"]
        return images, pytree.flatten(components.init_variables()["params"])

    images, params = drawn("base", 1)
    chex.assert_trees_all_equal(drawn("mixed", 1), (images, params))
    others, wide = drawn("wide", 1)
    np.testing.assert_array_equal(others, images)
    alike = {path for path in params if params[path].shape == wide[path].shape}
    assert 0 < len(params) - len(alike) <= 2  # the classifier
    chex.assert_trees_all_equal({p: wide[p] for p in alike}, {p: params[p] for p in alike})
    others, again = drawn("base", 0)
    assert (others != images).any()
    kernels = [path for path in params if path.endswith("kernel")]
    assert all((again[path] != params[path]).any() for path in kernels)


def test_a_cell_keeps_its_number_when_seeds_are_added(config, tmp_path):
    rows = plan.make_rows(config, [("a", {}), ("b", {})])
    few, many = (plan.make_cells(rows, tmp_path, n) for n in (2, 3))
    assert [c.name for c in many[:4]] == [c.name for c in few]
    assert [c.name for c in plan.select_cells(many, rows=["b"])] == [
        f"b, seed {s}" for s in range(3)
    ]
    assert [c.name for c in plan.select_cells(many, index=3)] == ["b, seed 1"]
    with pytest.raises(UserError, match="expected 0 to 5, got 6"):
        plan.select_cells(many, index=6)
    with pytest.raises(UserError, match="there is no row 'c'"):
        plan.select_cells(many, rows=["c"])


def test_a_folder_takes_more_seeds_and_rows_and_no_other_ablation(config, tmp_path):
    def record(sweep, seeds=2, names=()):
        rows = plan.make_rows(config, sweep)
        plan.write_plan(tmp_path, config, rows, seeds, names)
        return json.loads((tmp_path / "ablation.json").read_text())

    first = [("a", {}), ("b", {"mix.mixup": 0.1})]
    record([("a", {}), ("b", {"mix.mixup": 0.7})])  # nothing has run yet
    assert record(first)["rows"][1] == {"name": "b", "overrides": {"mix.mixup": 0.1}}
    for name in "ab":
        (tmp_path / name / "seed0").mkdir(parents=True)
        (tmp_path / name / "seed0/config.json").write_text("{}")
    more = record([*first, ("c", {"train.ema": 0.9})], seeds=4)
    assert (more["seeds"], [row["name"] for row in more["rows"]]) == (4, ["a", "b", "c"])
    fewer = record(first[:1], seeds=1)  # rows that have run stay
    assert (fewer["seeds"], [row["name"] for row in fewer["rows"]]) == (4, ["a", "b"])
    some = record([*first, ("c", {}), ("d", {})], names=["d"])  # b has runs and keeps its place
    assert [row["name"] for row in some["rows"]] == ["a", "b", "d"]
    with pytest.raises(UserError, match=r"row b: mix.mixup: 0.1 there, 0.4 here"):
        record([("a", {}), ("b", {"mix.mixup": 0.4})])
    with pytest.raises(UserError, match="baseline: a there, b here"):
        record(first[::-1])
    config.train.ema = 0.5
    with pytest.raises(UserError, match=r"train.ema: 0.0 there, 0.5 here"):
        record(first)


# ---- device slots


def test_each_job_has_a_gpu_or_cores_to_itself(monkeypatch):
    monkeypatch.setattr(child, "_devices", lambda: ("gpu", 3))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def seen(jobs):
        slots = child.make_device_slots(jobs)
        return [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots]

    assert seen(None) == ["0", "1", "2"]
    assert seen(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,8")
    assert seen(None) == ["5", "7", "8"]
    with pytest.raises(UserError, match="4 at once"):
        child.make_device_slots(4)
    monkeypatch.setattr(child, "_devices", lambda: ("tpu", 8))
    assert child.make_device_slots() == [child.DeviceSlot()]

    monkeypatch.setattr(child, "_devices", lambda: ("cpu", 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5}, raising=False)
    assert [share.cores for share in child.make_device_slots(2)] == [(0, 1), (2, 4, 5)]
    assert child.make_device_slots() == [child.DeviceSlot()]
    assert len(child.make_device_slots(7)) == 7


# ---- running cells, with children that only pretend to be runs

CHILD = """
import pathlib, signal, sys, time
name, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
again = workdir.exists()
if name == "early":
    print("error: before the first step")
    sys.exit(2)
workdir.mkdir(exist_ok=True)
if name == "slow":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (workdir / "begun").touch()
    for _ in range(600):  # a signal may come just before a sleep, which then sleeps on
        time.sleep(0.1)
if name == "killed":
    import os
    os.kill(os.getpid(), signal.SIGKILL)
if name == "silent":
    sys.exit(1)
if name == "crash" or (name == "crash_once" and not again):
    print("error: boom")
    sys.exit(1)
if name in ("diverge", "mistake"):
    print(f"error: {name}")
    sys.exit(3 if name == "diverge" else 2)
(workdir / "summary.json").write_text('{"test/accuracy": 0.5}')
"""


@pytest.fixture
def pretend(monkeypatch, config, tmp_path):
    """(rows, jobs, seeds) -> (counts, started cells, printed lines)."""
    started = []

    def start(config, workdir, out, share, *, accept_changed_data):
        started.append(f"{workdir.parent.name}/{workdir.name}")
        command = [sys.executable, "-S", "-c", CHILD, workdir.parent.name, str(workdir)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out)

    monkeypatch.setattr(child, "start", start)

    def work(names, jobs=1, seeds=1, data=DataSnapshot({}), **given):  # noqa: B008
        started.clear()
        rows = plan.make_rows(config, [(name, {}) for name in names])
        cells = plan.make_cells(rows, tmp_path, seeds)
        sizes = {name: forecast.RowCost(1, 1, 1, data) for name in names}
        with (tmp_path / "output.txt").open("w") as file:
            console = Console(file=file)
            shares = [child.DeviceSlot()] * jobs
            counts = run_cells(cells, shares, sizes, console=console, **given)
        return counts, list(started), (tmp_path / "output.txt").read_text()

    return work


def state(tmp_path, name, seed=0):
    return json.loads((tmp_path / name / f"seed{seed}.json").read_text())


def test_a_broken_cell_is_marked_and_does_not_affect_the_others(pretend, tmp_path):
    names = ["crash", "killed", "diverge", "mistake", "crash_once", "fine"]
    counts, started, output = pretend(names, jobs=2)
    assert counts == {"failed": 3, "diverged": 1, "complete": 2}
    attempts = {name: state(tmp_path, name)["attempts"] for name in names}
    assert attempts == dict(crash=2, killed=2, diverge=1, mistake=1, crash_once=2, fine=1)
    assert state(tmp_path, "crash")["error"] == "boom"
    assert "SIGKILL" in state(tmp_path, "killed")["error"]
    assert state(tmp_path, "fine")["status"] == "complete"
    assert "6/6" not in output  # a failed cell is not done
    assert "fine, seed 0: complete, 50.00% test" in output
    assert "crash, seed 0: failed" in output
    assert "ETA" not in output.splitlines()[-1]  # a failed cell waits for another start

    counts, started, output = pretend(names)  # the same command again
    assert sorted(set(started)) == ["crash/seed0", "killed/seed0", "mistake/seed0"]
    assert state(tmp_path, "crash")["attempts"] == 4
    assert "diverge, seed 0 diverged before; remove" in output


def test_a_cell_that_fails_before_its_first_step_has_failed(pretend, tmp_path):
    """Such a cell has no directory. While its status was "missing", SLURM restarted it forever."""
    counts, _, _ = pretend(["early"])
    assert counts == {"failed": 1}
    assert state(tmp_path, "early")["error"] == "before the first step"
    assert pretend(["early"])[:2] == ({"failed": 1}, ["early/seed0"])


def test_a_run_that_is_removed_is_made_again(pretend, tmp_path):
    pretend(["fine", "diverge"])
    for name in ("fine", "diverge"):
        for path in (tmp_path / name / "seed0").iterdir():
            path.unlink()
        (tmp_path / name / "seed0").rmdir()
    assert pretend(["fine", "diverge"])[1] == ["fine/seed0", "diverge/seed0"]


def test_a_cell_whose_data_changed_is_renamed_and_runs_again(pretend, config, tmp_path):
    was = dict(reader="folder", classes=["a", "b"], splits={"train": {"images": 4}})
    now = was | {"splits": {"train": {"images": 5}}}
    pretend(["fine", "diverge", "old"])
    config.data.dir = "old"
    old = json.dumps(config.to_dict())
    config.data.dir = ""
    for name in ("fine", "diverge", "old"):
        facts = {"class_names": ["a", "b"]} | ({} if name == "old" else {"fingerprint": was})
        (tmp_path / name / "seed0/dataset.json").write_text(json.dumps(facts))
        (tmp_path / name / "seed0/metrics.jsonl").touch()
        (tmp_path / name / "seed0/config.json").write_text(old)
    assert pretend(["fine", "diverge", "old"], data=DataSnapshot(was))[1] == []
    assert json.loads((tmp_path / "old/seed0/dataset.json").read_text())["fingerprint"] == was
    assert json.loads((tmp_path / "fine/seed0/config.json").read_text())["data"]["dir"] == ""

    started, output = pretend(
        ["fine", "diverge"], data=DataSnapshot(now), accept_changed_data=True
    )[1:]
    assert started == []
    assert "fine, seed 0: its data changed: train had 4 images, has 5; it is kept" in output
    facts = json.loads((tmp_path / "fine/seed0/dataset.json").read_text())
    (change,) = facts["accepted_changes"]
    assert (facts["fingerprint"], change["was"], change["is"]) == (was, was, now)

    started, output = pretend(["fine", "diverge"], data=DataSnapshot(now))[1:]
    assert started == ["fine/seed0", "diverge/seed0"]
    assert "fine, seed 0: its data changed: train had 4 images, has 5; it is renamed to" in output
    assert (tmp_path / "fine/old-data-1-seed0/summary.json").exists()
    assert state(tmp_path, "fine")["attempts"] == 1  # the status is of the new run only


def test_a_cell_that_ended_after_its_parent_is_complete(pretend, tmp_path):
    (tmp_path / "fine/seed0").mkdir(parents=True)
    (tmp_path / "fine/seed0/summary.json").write_text("{}")
    cut = {"status": "interrupted", "attempts": 1, "error": "", "seconds": 0.0}
    (tmp_path / "fine/seed0.json").write_text(json.dumps(cut))
    assert pretend(["fine"])[:2] == ({"complete": 1}, [])
    assert state(tmp_path, "fine")["status"] == "complete"


def test_a_cell_that_another_process_runs_is_waited_for(pretend, tmp_path):
    (tmp_path / "theirs/seed0").mkdir(parents=True)
    out = child.lock_log(tmp_path / "theirs/seed0.txt")

    def end():
        while not (tmp_path / "fine/seed0/summary.json").exists():
            time.sleep(0.01)
        (tmp_path / "theirs/seed0/summary.json").write_text("{}")
        out.close()

    threading.Thread(target=end, daemon=True).start()
    counts, started, output = pretend(["theirs", "fine"])
    assert (counts, started) == ({"complete": 2}, ["fine/seed0"])
    assert output.count("theirs, seed 0: another process is running it") == 1


def test_the_error_of_a_cell_is_in_its_newest_output(pretend, tmp_path):
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent/seed0.txt").write_text("error: an older one\n")
    assert pretend(["silent"])[0] == {"failed": 1}
    assert state(tmp_path, "silent")["error"] == "exit code 1"


def test_the_status_file_of_a_cell_may_be_damaged(pretend, tmp_path):
    for name, text in (("fine", ""), ("fine2", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "seed0.json").write_text(text)
    assert pretend(["fine", "fine2"])[0] == {"complete": 2}


def ask_when_it_is_slow(tmp_path, number):
    def ask():
        while not (tmp_path / "slow/seed0/begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()


def test_ctrl_c_stops_the_cells_and_is_an_interrupt(pretend, tmp_path):
    ask_when_it_is_slow(tmp_path, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        pretend(["slow", "fine"])
    assert state(tmp_path, "slow")["status"] == "interrupted"
    assert not (tmp_path / "fine/seed0").exists()


def test_a_signal_reaches_the_cells_and_begins_no_other(pretend, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    ask_when_it_is_slow(tmp_path, signal.SIGTERM)
    counts, started, output = pretend(["slow", "fine"])
    assert counts == {"interrupted": 1, "missing": 1}
    assert started == ["slow/seed0"]
    assert "stopping: running cells save" in output
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_time_of_a_cell_is_estimated_from_complete_cells(config, tmp_path):
    rows = plan.make_rows(config, [("a", {}), ("b", {})])
    cells = plan.make_cells(rows, tmp_path, 2)
    sizes = {"a": forecast.RowCost(1, 100, 10), "b": forecast.RowCost(1, 300, 20)}
    assert forecast.estimate_seconds(sizes, cells) == {}
    cells[0].workdir.mkdir(parents=True)
    (cells[0].workdir / "summary.json").write_text("{}")
    cells[0].write_status({"status": "complete", "attempts": 1, "error": "", "seconds": 10.0})
    seconds = forecast.estimate_seconds(sizes, cells)
    assert seconds == {"a": 10.0, "b": pytest.approx(60.0)}
    assert forecast.compute_makespan([60.0, 10.0, 60.0], 1) == pytest.approx(130.0)
    assert forecast.compute_makespan([60.0, 10.0, 60.0], 2) == pytest.approx(70.0)
    assert forecast.compute_makespan([60.0], 2) == pytest.approx(60.0)
    assert forecast.compute_makespan([], 2) == 0.0


# ---- running cells, with real runs


@pytest.mark.slow
def test_a_sweep_of_runs_ends_in_a_report(config, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("XLA_FLAGS")  # one device is faster
    sweep = [("base", {}), ("hot", {"schedule.learning_rate": 1e30})]
    counts = ablate.ablate(config, sweep, tmp_path, seeds=1, jobs=2)
    assert counts == {"complete": 1, "diverged": 1}
    assert "weights of 2 steps in a row were not finite" in state(tmp_path, "hot")["error"]
    summary = json.loads((tmp_path / "base/seed0/summary.json").read_text())
    assert summary["seed"] == config.seed
    assert "report.md" in capsys.readouterr().out
    assert "1 diverged" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"graft.source": "nowhere/run"}, "row own: there is no checkpoint or run 'nowhere/run'"),
        ({"log.wandb": "project"}, "row own: log.wandb is set, but wandb is not installed"),
    ],
)
def test_what_a_row_needs_is_checked_before_anything_runs(
    config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(child, "start", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(UserError, match=message):
        ablate.ablate(config, [("base", {}), ("own", overrides)], tmp_path / "a", seeds=1)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_cell_saves_and_leaves_when_its_parent_is_gone(config, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    config.train.duration = "1000000 steps"
    config.log.every = "5 steps"
    workdir, log = tmp_path / "run", tmp_path / "run.txt"
    with child.lock_log(log) as out:
        process = child.start(config, workdir, out, child.DeviceSlot())
    assert child.lock_log(log) is None
    while not (workdir / "metrics.jsonl").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    process.stdin.close()  # as if the parent was killed
    assert child.read_outcome(process.wait(timeout=60), log).status == "interrupted"
    child.lock_log(log).close()
    assert list((workdir / "checkpoints").glob("[0-9]*"))


def test_a_report_without_results_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="no ablation here"):
        ablate.write_report(tmp_path)
