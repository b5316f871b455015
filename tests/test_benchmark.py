"""The benchmark program on tiny cases: tables, JSON, pictures, one-line errors."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import (
    compiled,
    convolutions,
    corruptions,
    crops,
    input_stages,
    learning,
    savings,
    seeds,
    torch_side,
    training,
    zoo,
    zoo_networks,
)
from experiments.benchmarks.gpu_table import FAILED, Measure
from experiments.benchmarks.shapes import SHAPES
from flax_cnns.analysis import device
from flax_cnns.models.cifar_resnet import CifarResNet
from flax_cnns.models.registry import FAMILIES, list_models
from flax_cnns.runs.audit_table import NETWORKS
from flax_cnns.runtime.topologies import CompileTarget

ROOT = Path(__file__).resolve().parent.parent
has_torch = importlib.util.find_spec("torchvision") is not None


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Returns a function: `run(arguments ...)` -> (exit code, output, errors, JSON content)."""
    monkeypatch.setattr(device, "find_peak", lambda device, dtype: device_peak)
    device_peak = device.Peak(1e9, "a test")

    def run(*arguments, quick=True):
        out = tmp_path / "out.json"
        quick = ["--rounds=2", "--at-least=0", "--compilation-cache=off"] if quick else []
        kept = {
            name: getattr(jax.config, name)
            for name in ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
        }
        try:
            code = benchmark.main([*arguments, *quick, f"--out={out}"])
        finally:
            for name, value in kept.items():
                jax.config.update(name, value)
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_step(run, tmp_path, mode):
    code, out, _, found = run("step", "--model=lenet5", "--batch=4", f"--mode={mode}")
    assert code == 0
    (row,) = found["rows"]
    assert row["params"] == 61_706
    assert row["macs_per_image"] == 416_520
    training, inference = row["training"], row["inference"]
    assert len(training["rounds"]) == len(inference["rounds"]) == 2
    # A MAC is two FLOPs, and training costs three forward passes. The peak is for all devices.
    assert training["mfu"] * training["seconds"] * 1e9 == pytest.approx(3 * 2 * 4 * 416_520)
    assert inference["mfu"] * inference["seconds"] * 1e9 == pytest.approx(2 * 4 * 416_520)
    assert training["images_per_second"] * training["seconds"] == pytest.approx(4)
    assert row["program_memory"] > 2 * 4 * 61_706  # parameters and momentum
    total = row["init_seconds"] + row["trace_seconds"] + row["compile_seconds"]
    assert 0 < total < row["seconds_to_first_step"]
    assert found["environment"]["versions"]["jax"] == jax.__version__
    assert found["environment"]["device_kind"]
    assert found["flags"]["batch"] == 4
    assert found["date"]
    assert not found["interrupted"]
    assert "lenet5" in out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_explain(run, monkeypatch):
    small = partial(CifarResNet, depths=(1,), widths=(4,), num_classes=5, input_size=(8, 8, 3))
    monkeypatch.setattr(training, "create_model", lambda name, **fields: small())
    flags = ["--model=small", "--batch=6", "--integrated-batch=2", "--steps=3", "--size=0"]
    code, out, _, found = run("explain", *flags)
    assert code == 0
    weighed, integrated = found["rows"]
    assert (weighed["images"], integrated["images"]) == (6, 2)
    assert integrated["compared_with"] == "3 gradients"
    for row in found["rows"]:
        assert row["ratio"]["median"] > 0
        assert len(row["rounds"][row["method"]]["rounds"]) == 2
    assert "integrated_gradients, 3 steps" in out


@pytest.mark.slow
def test_crops(run, monkeypatch):
    small = partial(CifarResNet, depths=(1,), widths=(4,), num_classes=5, input_size=(8, 8, 3))
    monkeypatch.setattr(crops, "create_model", lambda name: small())
    code, out, _, found = run("crops", "--model=small", "--images=8", "--crops=5,10")
    assert code == 0
    assert [row["crops"] for row in found["rows"]] == [5, 10]
    assert all(row["ratio"]["median"] > 0 for row in found["rows"])
    assert "enlarged" in out


@pytest.mark.slow
def test_frozen(run, monkeypatch):
    small = partial(CifarResNet, depths=(1,), widths=(4,), num_classes=5, input_size=(8, 8, 3))
    monkeypatch.setattr(training, "create_model", lambda name, **fields: small(**fields))
    code, out, _, found = run("frozen", "--model=small", "--batch=8")
    assert code == 0
    assert [row["learns"] for row in found["rows"]] == ["all", "stage1, head", "head"]
    params = [row["trainable_params"] for row in found["rows"]]
    assert params[0] > params[1] > params[2] == 4 * 5 + 5
    memory = [row["program_memory"] for row in found["rows"]]
    assert memory[0] > memory[2]
    assert found["rows"][0]["ratio"]["median"] == 1
    assert "stage1, head" in out


def test_conv(run):
    code, out, _, found = run("conv", "--stage=lenet-c3", "--no-torch")
    assert code == 0
    assert [row["pass"] for row in found["rows"]] == ["forward", "gradient"]
    for row in found["rows"]:
        assert set(row["seconds"]) == {"ours", "nn.Conv"}
        assert len(row["runs"]) in (1, 3)  # three if the first ratio was above 1.05
        assert row["ratios"]["nn.Conv"]["low"] <= row["ratios"]["nn.Conv"]["median"]
    assert len(found["summary"]) == 2
    assert "geometric mean" in out


def test_the_shapes():
    shapes = SHAPES
    assert len(shapes) >= 40
    assert len({shape.name for shape in shapes}) == len(shapes)
    named = {shape.name: shape for shape in shapes}
    assert named["resnext"][1:] == (16, 28, 128, 128, 32, 3, 1)
    assert named["depthwise"][1:] == (16, 56, 144, 144, 144, 3, 1)
    assert named["stem7-224"].macs == 8 * 112 * 112 * 49 * 3 * 64
    assert named["stem4-224"].out_size == 56
    assert named["depthwise5-14-down"].out_size == 7


def test_slower_shapes_are_measured_again_and_the_middle_counts(run, monkeypatch):
    ratios = iter([(2.0, 1.0), (3.0, 3.0), (1.2, 1.0), (1.0, 1.0)])  # ours, nn.Conv

    def compare(candidates, **_):
        ours, stock = next(ratios)
        return convolutions.Comparison(
            {"ours": [ours], "nn.Conv": [stock]}, dict.fromkeys(candidates, 1)
        )

    monkeypatch.setattr(convolutions, "time_candidates", compare)
    _, _, _, found = run("conv", "--stage=lenet-c3", "--no-torch")
    forward, gradient = found["rows"]
    assert len(forward["runs"]) == 3
    assert forward["ratios"]["nn.Conv"]["median"] == 1.2  # the median of 2, 1 and 1.2
    assert len(gradient["runs"]) == 1


def test_cond(run):
    code, _, _, found = run("cond", "--batch=2", "--size=4", "--channels=3", "--branches=2")
    assert code == 0
    (row,) = found["rows"]
    assert len(row["skipped"]["rounds"]) == len(row["masked"]["rounds"]) == 2


def test_skipped_and_masked_branches_compute_the_same():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    gates = np.float32([1, 0, 1])
    masked = convolutions.Branches(3, skip=False)
    variables = masked.init(jax.random.key(1), x, gates)
    skipped = convolutions.Branches(3, skip=True)
    difference = skipped.apply(variables, x, gates) - masked.apply(variables, x, gates)
    assert abs(difference).max() < 1e-5
    assert abs(masked.apply(variables, x, gates) - x).max() > 1e-2


@pytest.mark.slow
def test_compile(run, monkeypatch):
    one_stage = partial(CifarResNet, depths=(3,), widths=(2,), input_size=(8, 8, 3))
    monkeypatch.setattr(training, "make_network", lambda name, args, **fields: one_stage(**fields))
    programs, compile_step = [], training.Trainee.compile

    def compile_and_keep(trainee):
        result = compile_step(trainee)
        programs.append(result[0].as_text().count(" convolution("))
        return result

    monkeypatch.setattr(training.Trainee, "compile", compile_and_keep)
    code, _, _, found = run("compile", "--batch=4", "--stock")
    assert code == 0
    assert [row["scan"] for row in found["rows"]] == [False, True]
    for row, (ours, stock) in zip(found["rows"], (programs[:2], programs[2:])):
        assert row["seconds"] == row["trace_seconds"] + row["compile_seconds"] > 0
        assert row["stock_ratio"] == row["compile_seconds"] / row["stock_compile_seconds"]
        assert (ours < stock) == row["scan"]  # of so few channels, only loops have ours


def test_input(run, monkeypatch):
    missing = ImportError("no", name="a_package")

    def make_missing(root, batch, size):
        raise missing

    def make_other(root, batch, size):
        assert len(list(root.glob("*/*.jpg"))) == 8
        return lambda: (i for i in range(100))

    others = dict(make_torchvision=make_missing, make_opencv=make_other, make_tf_data=make_missing)
    others["make_by_opencv"] = make_missing
    for name, make in others.items():
        monkeypatch.setattr(input_stages, name, make)
    flags = ["--rounds=2", "--batches=1", "--batch=2", "--jpegs=8", "--size=16"]
    flags += ["--jpeg-size=40x30", "--images-per-second=100"]
    cores = os.sched_getaffinity(0)
    code, out, _, found = run("input", *flags, quick=False)
    assert code == 0
    assert os.sched_getaffinity(0) == cores
    assert [row["what"] for row in found["rows"]] == [*input_stages.STAGES, "Grain + OpenCV"]
    assert "tf.data: skipped, a_package is not installed" in out
    stages = found["rows"][:-1]
    whole = stages[-1]["seconds_per_image"]
    assert sum(row["stage_seconds"] for row in stages) == pytest.approx(whole)
    assert stages[-1]["cores"] == pytest.approx(100 * whole)
    assert found["rows"][-1]["over_ours"]["median"] < 1
    assert re.search(r"100 images/s need \d+ cores? like this one", out)


def test_a_loader_is_timed_after_what_it_read_ahead():
    clock, closed = [], []

    def make(name):
        try:
            for i in itertools.count():
                clock.append((name, i))
                yield i
        finally:
            closed.append(name)

    times = input_stages.time_streams({n: partial(make, n) for n in "ab"}, rounds=2, batches=4)
    assert closed == ["a", "b", "a", "b"]
    assert clock == [(n, i) for n in "abab" for i in range(input_stages.READ_AHEAD + 4)]
    assert {name: len(rounds) for name, rounds in times.seconds.items()} == {"a": 2, "b": 2}


def make_zoo_measures(ratio):
    measures = [Measure(n, 1.0, "s") for n in ("tracing", "lowering", "XLA")]
    measures.append(Measure("memory of the training step", 10**9, "bytes"))
    for kind in ("training", "inference"):
        measures.append(Measure(f"{kind}, ours", 0.5, "s", 0.4, 0.6))
        if ratio:
            measures.append(Measure(f"{kind}, ours / PyTorch", ratio, "", 0.9, 3.0))
    return measures


def test_zoo_goes_on_and_names_the_slowest(tmp_path, capsys, monkeypatch):
    measured, ratios = [], {"resnet": 1.25, "vgg": 2.5, "lenet": None}

    def measure(name, settings, table):
        measured.append(name)
        if name == "vgg" and measured.count("vgg") == 1:
            table.add(zoo.PART, name, [], seconds=1.0, status=FAILED, note="exit code 1")
        else:
            found = [] if name == zoo.MACHINE else make_zoo_measures(ratios[name])
            note = "" if name == zoo.MACHINE else zoo.NETWORKS[name].describe()
            table.add(zoo.PART, name, found, seconds=30.0, note=note)

    monkeypatch.setattr(zoo, "_measure_in_process", measure)
    flags = ["zoo", "--families=resnet,lenet,vgg", f"--out={tmp_path / 'z.csv'}"]
    assert benchmark.main(flags) == 1
    assert "failed: vgg; --retry measures them again" in capsys.readouterr().out
    assert benchmark.main([*flags, "--retry"]) == 0
    assert measured == [zoo.MACHINE, "resnet", "lenet", "vgg", "vgg"]
    out = capsys.readouterr().out
    assert "1 left, about 0 minutes, by the networks so far" in out
    assert "slowest training steps, ours / PyTorch: vgg11_bn 2.50, resnet50 1.25" in out
    assert (tmp_path / "z.png").stat().st_size > 0
    monkeypatch.setitem(zoo.NETWORKS, "lenet", zoo.NETWORKS["lenet"]._replace(batch=2))
    assert benchmark.main(flags) == 0
    assert measured[5:] == ["lenet"]  # its batch has changed
    capsys.readouterr()
    assert benchmark.main(["zoo", "--families=resent", f"--out={tmp_path / 'z.csv'}"]) == 2
    assert "did you mean 'resnet'" in capsys.readouterr().err


def test_the_zoo_has_a_network_of_each_family():
    assert set(zoo_networks.NETWORKS) == set(NETWORKS)


@pytest.mark.slow
def test_zoo_measures_in_processes(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(zoo, "NETWORKS", {"lenet": zoo_networks.ZooNetwork("lenet5", 2)})
    monkeypatch.setattr(zoo, "MACHINE", "broken")  # a job without a network
    path = tmp_path / "z.csv"
    assert benchmark.main(["zoo", "--rounds=1", f"--out={path}"]) == 1
    rows = {r["measure"]: r for r in csv.DictReader(path.open()) if r["case"] == "lenet"}
    parts = [float(rows[name]["value"]) for name in ("tracing", "lowering", "XLA")]
    assert all(0 < part < 100 for part in parts)
    assert rows["parameters"]["value"] == "61706"
    assert 0 < float(rows["training, ours"]["low"]) <= float(rows["training, ours"]["high"])
    assert rows["training, ours"]["note"] == "PyTorch has no such network"
    assert "broken: exit code 1: KeyError: 'network'" in capfd.readouterr().out
    (failed,) = [r for r in csv.DictReader(path.open()) if r["status"] == "failed"]
    assert failed["note"] == "exit code 1: KeyError: 'network'"


@pytest.mark.slow
def test_seeds(run, monkeypatch):
    make = seeds.make_candidates

    def make_and_compare(*arguments):
        candidates = make(*arguments)
        states, together = (take() for take in candidates.values())
        for seed, state in enumerate(states):
            ours = jax.tree.map(lambda x, seed=seed: x[seed], together)
            chex.assert_trees_all_close(ours.params, state.params, rtol=1e-4, atol=1e-6)
        first, second = (jax.tree.leaves(state.params)[0] for state in states)
        assert not np.allclose(first, second)
        return candidates

    tiny = CifarResNet(depths=(1,), widths=(2,), input_size=(8, 8, 3))
    monkeypatch.setattr(seeds, "create_network", lambda name: tiny)
    monkeypatch.setattr(seeds, "make_candidates", make_and_compare)
    code, _, _, found = run("seeds", "--model=tiny", "--batch=2", "--seeds=2")
    assert code == 0
    assert [row["how"] for row in found["rows"]] == ["one by one", "vmap"]
    assert found["rows"][1]["ratio"]["median"] > 0


@pytest.mark.slow
def test_drop_path(run, monkeypatch):
    tiny = dict(depths=(3,), widths=(4,), input_size=(4, 4, 3))
    make = training.make_network
    monkeypatch.setattr(
        savings, "make_network", lambda *args, **fields: make(*args, **tiny, **fields)
    )
    flags = ["--model=cifar_resnet20", "--batch=4", "--rates=0.6", "--steps=2"]
    code, _, _, found = run("drop-path", *flags)
    rows = found["rows"]
    assert code == 0
    cases = [(row["mode"], row["drop_path"]) for row in rows]
    assert cases == [("batch", 0.0), ("batch", 0.6), ("sample", 0.6)]
    assert [row["computed"] for row in rows] == pytest.approx([1, 1 - (0.2 + 0.4 + 0.6) / 3, 1])
    assert rows[0]["ratio"]["median"] == 1
    assert all(row["seconds"] > 0 for row in rows)


def test_compiled(run, monkeypatch):
    """Two small programs in place of the training steps, compiled for a CPU."""
    target = CompileTarget("cpu-1", "cpu", "1", 1, 2**30, 1e10)
    monkeypatch.setattr(compiled.topologies, "find_target", lambda name: target)
    monkeypatch.setattr(compiled.topologies, "make_devices", lambda target: jax.devices()[:1])

    def trace(doublings):
        x = jax.ShapeDtypeStruct((64, 64), np.float32)
        return jax.jit(lambda x: jax.numpy.sin(x.T @ x) @ x * doublings).trace(x)

    monkeypatch.setattr(compiled, "trace_plain", lambda devices, batch, size: trace(1.0))
    monkeypatch.setattr(compiled, "trace_ours", lambda devices, batch, size: trace(2.0))
    code, out, _, found = run("compiled", "--batch=4", quick=False)
    assert code == 0
    plain, ours = found["rows"]
    assert (plain["step"], ours["step"]) == ("plain Flax", "flax_cnns")
    assert plain["temporaries_ratio"] == plain["moved_ratio"] == 1
    assert ours["moved_ratio"] == ours["moved"] / plain["moved"]
    assert plain["moved"] >= 3 * 4 * 64 * 64
    assert "plain Flax: compiling for cpu-1" in out
    assert sum(size for _, size, _ in plain["kernels"]) == plain["moved"]
    assert "flax_cnns: 0.00 GB by " in out


@pytest.mark.slow
def test_learn(run):
    pytest.importorskip("configs.common", exc_type=ImportError)
    code, out, _, found = run("learn", "--models=lenet5", "--steps=60", quick=False)
    (row,) = found["rows"]
    assert (code, row["learned"], row["params"]) == (0, True, 61_706)
    assert len(row["losses"]) == row["steps"] == 60
    assert row["last_loss"] == pytest.approx(np.mean(row["losses"][-5:]))
    assert row["last_loss"] < row["first_loss"] / 2
    assert row["accuracy"] > 0.8
    assert row["deterministic"]
    assert row["statistics_moved"] is None  # the network has no statistics
    assert "lenet5" in out


@pytest.mark.slow
def test_learn_says_what_did_not(run, monkeypatch):
    pytest.importorskip("configs.common", exc_type=ImportError)
    # With this rate nothing changes.
    case = learning.LearningCase(8, 6, 1e-9, dict(depths=(1,), widths=(2,)))
    monkeypatch.setitem(learning.CASES, "cifar_resnet20", case)
    code, out, _, found = run("learn", "--models=cifar_resnet20", quick=False)
    (row,) = found["rows"]
    assert (code, row["learned"], row["statistics_moved"]) == (1, False, True)
    assert "networks that did not learn: cifar_resnet20" in out


def test_every_family_learns_by_a_network_that_is_registered():
    uncovered = [
        family.__name__ for family in FAMILIES if not family.VARIANTS.keys() & learning.CASES.keys()
    ]
    assert uncovered == []
    assert learning.CASES.keys() <= set(list_models())


def test_pipeline(run):
    flags = ["--mock=20", "--batches=2", "--batch=4", "--jpegs=20", "--size=16"]
    flags += ["--images-per-second=1000000"]
    code, out, _, found = run("pipeline", *flags, "--source=config,folder,arrays")
    assert code == 0
    mock, folder, arrays = found["rows"]
    assert (arrays["examples"], len(arrays["speed_over_config"])) == (18, 3)  # 2 are for validation
    assert mock["in_memory"]
    assert not folder["in_memory"]
    assert folder["image_shape"] == [16, 16, 3]
    cores = folder["processor_seconds_per_image"] * 1e6
    assert folder["cores"] == pytest.approx(cores)
    assert f"1,000,000 images/s need {math.ceil(cores)} cores like these" in out
    for row in (mock, folder, arrays):
        assert row["images_per_second"] == pytest.approx(2 * 4 / row["median"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stpe"], "step"),
        (["step", "--model=lenet6"], "did you mean 'lenet5'"),
        (["step", "--model=lenet5", "--batch=6"], "4 or 8"),  # four devices
        (["step", "--model=lenet5", "--batch=0"], "--batch"),
        (["step", "--model=lenet5", "--dtype=float8"], "float32 or bfloat16"),
        (["step", "--model=lenet5", "--scan"], "'scan'"),
        (["step", "--batch=x"], "a whole number of at least 1, got 'x'"),
        (["step", "--modle=lenet5"], "--modle"),
        (["step", "--device=tpu"], "it has cpu"),
        (["learn", "--models=lenet6"], "did you mean 'lenet5'"),
        (["conv", "--stage=resnxt"], "the shapes are resnext, depthwise"),
        (["vs-torch", "--model=mobilnet_v2"], "mobilenet_v2" if has_torch else "[bench]"),
        (["pipeline", "--source=disk"], "--source"),
        (["pipeline", "--config=configs/digit_lenet5.py"], "configs/digits_lenet5.py"),
        (["pipeline", "--config=configs/digits_lenet5.py:smok"], "smoke"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(run, arguments, message):
    code, _, err, found = run(*arguments, quick=False)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err
    assert found is None


def test_an_out_that_cannot_be_written_is_said_at_once(capsys):
    assert benchmark.main(["step", "--out=/proc/nowhere/x.json"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert benchmark.main(["step", "--out=x.txt"]) == 2
    assert ".json" in capsys.readouterr().err


def test_without_pytorch_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(torch_side, "find_torch", lambda: None)
    code, _, err, found = run("vs-torch", "--model=resnet18")
    assert (code, err.count("\n"), found) == (2, 1, None)
    assert "[bench]" in err


def test_an_interruption_keeps_what_was_measured(run, monkeypatch):
    original = convolutions.make_jax_convolution

    def interrupted(kind, shape, dtype, passes):
        if passes == "gradient":
            raise KeyboardInterrupt
        return original(kind, shape, dtype, passes)

    monkeypatch.setattr(convolutions, "make_jax_convolution", interrupted)
    code, _, err, found = run("conv", "--stage=lenet-c3", "--no-torch")
    assert (code, err) == (130, "error: interrupted\n")
    assert found["interrupted"]
    assert [row["pass"] for row in found["rows"]] == ["forward"]


def test_out_of_memory_is_one_line(run, monkeypatch):
    def compile(self):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(training.Trainee, "compile", compile)
    code, _, err, found = run("step", "--model=lenet5", "--batch=4")
    assert (code, found) == (2, None)
    assert err == "error: the device is out of memory; choose a smaller --batch\n"


@pytest.mark.slow
def test_it_starts_where_only_jax_and_flax_are():
    """A GPU machine may lack Grain, TFDS and ml_collections."""
    absent = ("grain", "tensorflow_datasets", "ml_collections", "tensorboardX", "sklearn", "torch")
    absent += ("torchvision", "timm", "scipy", "matplotlib", "PIL", "h5py")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from experiments.benchmark import main\n"
        "from experiments.benchmarks import gpu_child, gpu_steps\n"  # a process of `gpu`
        "settings = gpu_steps.GpuSettings(4, 32, 2, 1, 0.0, smoke=True)\n"
        "for measure in gpu_steps.measure_against_torch, gpu_steps.measure_recipe:\n"
        "    try: measure(settings)\n"
        "    except gpu_steps.Skipped as error: print('skipped:', error)\n"
        "sys.exit(main(['cond', '--batch=1', '--size=2', '--channels=1', '--branches=1', "
        "'--rounds=1', '--at-least=0', '--compilation-cache=off', '--out=none']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "written" not in done.stdout
    assert "skipped: PyTorch is not installed" in done.stdout
    assert re.search("skipped: .* is not installed, which a recipe needs", done.stdout)


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.skipif(not has_torch, reason="torchvision is not installed")
def test_against_pytorch(run):
    code, _, err, found = run("vs-torch", "--model=resnet18", "--batch=2", "--size=32")
    assert code == 0, err
    (row,) = found["rows"]
    assert row["params"] == 11_689_512
    assert len(row["ours"]["rounds"]) == len(row["torch"]["rounds"]) == 2
    code, _, err, found = run("conv", "--stage=lenet-c3,groups2-alexnet")
    assert code == 0, err
    assert all("torch" in row["seconds"] for row in found["rows"])


@pytest.mark.slow
def test_corruptions(run, monkeypatch):
    small = partial(CifarResNet, depths=(1,), widths=(4,), num_classes=5, input_size=(8, 8, 3))
    monkeypatch.setattr(corruptions, "create_model", lambda name: small())
    flags = ["--images=8", "--batch=4", "--corruptions=brightness,contrast", "--severities=1,5"]
    code, out, _, found = run("corruptions", *flags)
    assert code == 0
    assert [row["corruption"] for row in found["rows"]] == ["brightness", "contrast", "all"]
    assert found["rows"][2]["seconds"] == pytest.approx(
        sum(row["seconds"] for row in found["rows"][:2])
    )
    assert "contrast" in out
