"""The benchmark for a GPU, and the networks on plain Flax that it compares ours with."""

from __future__ import annotations

import os
import sys
from functools import partial

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import gpu, gpu_parts, gpu_steps, plain_flax
from experiments.benchmarks.gpu_table import Measure, Origin, ResultTable, lock
from flax_cnns.errors import UserError
from flax_cnns.models.registry import FAMILIES, create_model, init_variables

SETTINGS = gpu_steps.GpuSettings(4, 32, 2, 1, 0.0, smoke=True)
ORIGIN = Origin(str(SETTINGS), "some GPU", "3.12", "1", "1", "1", "1", "")


def read(path):
    """(case, measure, value, status) of each row."""
    rows = ResultTable(path, ORIGIN).rows
    return [(row["case"], row["measure"], row["value"], row["status"]) for row in rows]


@pytest.fixture
def cases(monkeypatch):
    """The cases of the only part, "some", and the list of those that ran."""
    ran = []

    def make_cases(settings, table):
        def run(name):
            ran.append(name)
            if name == "skipped":
                raise gpu_steps.Skipped("torch is not installed")
            if name == "large":
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore")
            return [Measure("step", 2.5, "ms", 2.0, 3.0), Measure("speed", 7)]

        return {name: partial(run, name) for name in ("large", "skipped", "good")}

    monkeypatch.setattr(gpu_parts, "PARTS", {"some": gpu_parts.Part("Some", make_cases, 60)})
    monkeypatch.setattr(gpu, "PARTS", gpu_parts.PARTS)
    return ran


def test_what_fails_is_a_row_and_nothing_is_measured_twice(tmp_path, cases, capsys):
    path = tmp_path / "x.csv"
    for _ in range(2):
        table = ResultTable(path, ORIGIN)
        gpu_parts.run_cases("some", ["large", "skipped", "good"], SETTINGS, table)
    assert cases == ["large", "skipped", "good"]
    found = [(case, measure, status) for case, measure, _, status in read(path)]
    assert found == [
        ("large", "seconds", "failed"),
        ("skipped", "seconds", "skipped"),
        *(("good", measure, "ok") for measure in ("step", "speed", "seconds")),
    ]
    notes = [row["note"] for row in ResultTable(path, ORIGIN).rows]
    assert notes[:2] == [
        "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
        "torch is not installed",
    ]
    assert "2.5 ms (2.0 to 3.0)" in capsys.readouterr().out
    table.forget("some", ["failed"])
    assert gpu.find_left("some", "*", SETTINGS, ResultTable(path, ORIGIN)) == ["large"]
    gpu.print_forecast(["some"], "*", SETTINGS, table)
    assert "1 cases left" in capsys.readouterr().out


def test_a_table_that_was_cut_off_loses_one_case(tmp_path, cases):
    path = tmp_path / "x.csv"
    gpu_parts.run_cases("some", ["skipped", "good"], SETTINGS, ResultTable(path, ORIGIN))
    whole, complete = read(path), path.read_bytes()
    path.write_bytes(complete[: complete.rindex(b"good,seconds") + 20])
    assert read(path) == whole[:1]
    assert b"good" not in path.read_bytes()
    path.write_bytes(complete)
    with pytest.raises(UserError, match="jax='1', and this machine measures with '2'"):
        ResultTable(path, ORIGIN._replace(jax="2"))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of this benchmark"):
        ResultTable(path, ORIGIN)


def test_a_case_that_ends_its_process_is_a_row(tmp_path, cases, monkeypatch):
    # The first case kills its process, the second hangs, the third prints an error.
    code = """if True:
        import json, os, pathlib, sys, time
        job = json.loads(sys.stdin.readline())
        (case, *_) = job["cases"]
        pathlib.Path(job["running"]).write_text(case)
        if case == "large":
            os.kill(os.getpid(), 9)
        if case == "skipped":
            time.sleep(99)
        sys.exit("no " + os.environ["CUDA_VISIBLE_DEVICES"])
    """
    monkeypatch.setattr(gpu, "CHILD", (sys.executable, "-S", "-c", code))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    out, running = tmp_path / "x.csv", tmp_path / "x.csv.running"
    job = {"out": str(out), "running": str(running), "origin": ORIGIN._asdict()}
    job |= {"settings": SETTINGS._asdict(), "deadline": float("inf")}
    table = gpu.run_part("some", "*", job, case_seconds=0.7)
    notes = {row["case"]: (row["status"], row["note"]) for row in table.rows}
    assert notes == {
        "large": ("failed", "killed by SIGKILL"),
        "skipped": ("failed", "the case took longer than 1 s"),
        "good": ("failed", "exit code 1: no 3"),
    }
    table.forget("some", ["failed"])
    gpu.run_part("some", "*", job | {"deadline": 0.0}, case_seconds=9)
    assert read(out) == []  # what there was no time for is not a row


def test_one_process_writes_a_table(tmp_path):
    descriptor = lock(tmp_path / "x.csv.running")
    with pytest.raises(UserError, match="another process"):
        lock(tmp_path / "x.csv.running")
    os.close(descriptor)
    os.close(lock(tmp_path / "x.csv.running"))


def test_every_family_has_a_network():
    names = gpu_steps.NETWORKS
    assert len(set(names)) == len(names)
    uncovered = [f.__name__ for f in FAMILIES if not f.VARIANTS.keys() & set(names)]
    assert uncovered == []
    known = {name for family in FAMILIES for name in family.VARIANTS}
    assert set(names) <= known


def test_deterministic_kernels_are_compared_between_processes(tmp_path):
    table = ResultTable(tmp_path / "x.csv", ORIGIN)
    settings = SETTINGS._replace(smoke=False)
    compare = gpu_parts.PARTS["deterministic"].make_cases(settings, table)["on / off"]
    with pytest.raises(gpu_steps.Skipped, match="off 1, on 1, off 2, on 2"):
        compare()
    for name, ms, digest in (
        ("off 1", 2, "a"),
        ("on 1", 3, "b"),
        ("off 2", 2, "c"),
        ("on 2", 5, "b"),
    ):
        rows = [Measure("step", ms), Measure("weights after 5 steps", digest)]
        table.add("deterministic", name, rows, seconds=1)
    rows = {row.measure: row for row in compare()}
    assert rows["on / off"][1:5] == (2.0, "", 1.5, 2.5)
    assert rows["on: the same bits in both processes"].value == "yes"
    assert rows["off: the same bits in both processes"].value == "no"
    assert gpu_parts.find_xla_flags("deterministic", "on 2") == "--xla_gpu_deterministic_ops=true"
    assert not gpu_parts.find_xla_flags("deterministic", "off 2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add --smoke"),
        (["--smoke", "--parts=familie"], "did you mean 'families'"),
        (["--smoke", "--out=x.json"], "a .csv file, got 'x.json'"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert benchmark.main(["gpu", "--compilation-cache=off", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_the_plain_resnet_has_the_parameters_of_ours():
    depths = (2, 1, 1, 1)
    ours = create_model("resnet50", depths=depths)
    ours = jax.eval_shape(partial(init_variables, ours), jax.random.key(0))
    plain = plain_flax.PlainResNet(depths)
    state = partial(plain_flax.make_plain_state, plain, images_shape=(2, 224, 224, 3))
    state = jax.eval_shape(state, jax.random.key(0))

    def shapes(tree):
        return sorted(x.shape for x in jax.tree.leaves(tree))

    assert shapes(state.params) == shapes(ours["params"])
    assert shapes(state.batch_stats) == shapes(ours["batch_stats"])


def test_the_plain_step_learns():
    model = plain_flax.PlainResNet(depths=(1,), width=4, num_classes=5)
    state = plain_flax.make_plain_state(model, jax.random.key(0), (8, 16, 16, 3))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    batch = {"image": images, "label": rng.integers(0, 5, 8).astype(np.int32)}
    step = jax.jit(plain_flax.make_plain_step(model))
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 3
    assert metrics["accuracy"] == 1
