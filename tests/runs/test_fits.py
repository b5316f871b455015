"""`fits`: the real step of a config on four simulated devices, and the search for a batch on a
made-up compiler whose memory is a line."""

from __future__ import annotations

import csv
import importlib.util
import math
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest

from configs.common import get_config
from flax_cnns.analysis.device import Peak
from flax_cnns.errors import UserError
from flax_cnns.runs import fit_remedies, fit_step, fit_table, fit_text, fits
from flax_cnns.runtime import topologies
from flax_cnns.runtime.topologies import GIB, CompileTarget
from tests.tiny_runs import ROOT

MIB = 2**20
CPU = CompileTarget("cpu-4", "cpu", "4", 4, 64 * MIB, 1e10)


def make_config(**changes):
    """A small network on black images in the shape of MNIST, which is not there."""
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "model.name": "tests.runs.own_parts:Net",
                "data.name": "mnist",
                "data.image_size": 8,
                "data.batch_size": 32,
                "data.augment.pad_crop": 1,
                "mix.mixup": 0.2,
                "train.ema": 0.9,
                "optimizer.name": "adam",
                **changes,
            }
        )
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compilations")


@pytest.fixture(scope="module")
def real(folder):
    """(a report of the real step, what it said)."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "find_peak", lambda *_: Peak(1e9, "made up"))
        report = fits.find_fit(
            make_config(), CPU, cache=folder, devices=jax.devices()[:4], say=said.append
        )
    return report, said


def test_the_real_step_of_a_config(real):
    report, said = real
    assert "mnist was not read: assumed 10 classes, 60,000 training images of 8x8x1" in said[0]
    assert report.fits
    # By hand: conv1 3*3*1*4 + 4, norm 4 + 4, conv2 3*3*4*8 + 8, head 8*10 + 10 parameters.
    parameters = 4 * (40 + 8 + 296 + 90)
    parts = report.parts
    assert parts["parameters"] == parameters
    assert parts["batch_stats"] == 4 * 8
    assert parts["ema"] == parameters + 4 * 8
    # Adam: two moments; and a few counters.
    assert parts["optimizer"] == pytest.approx(2 * parameters, abs=32)
    # 8 images of 64 bytes and 8 labels of 4 on each device; three more batches wait.
    assert (parts["batch"], parts["waiting_batches"]) == (8 * 68, 3 * 8 * 68)
    assert sum(parts.values()) == report.total
    # 8 images: 2 * 4*4 * 9*4 and 2 * 2*2 * 36*8 and 2 * 80 per image forward; three times that,
    # less the gradient by the images.
    conv1, conv2, head = 2 * 16 * 36, 2 * 4 * 288, 2 * 80
    assert report.compiled.flops == 8 * (3 * (conv1 + conv2 + head) - conv1)
    # Gradients, statistics and sums are averaged over the devices.
    calls, size = report.compiled.collectives["all-reduce"]
    assert calls >= 1
    assert size == pytest.approx(parameters + 4 * 8, abs=64)
    assert report.bound.compute == pytest.approx(report.compiled.flops / 1e9)
    assert report.bound.memory == pytest.approx(report.compiled.traffic / 1e10)
    assert report.step.unit == 2  # mixup takes pairs
    assert report.largest % 8 == 0
    text = fit_text.format_report(report)
    assert f"largest batch: {report.largest} (by the line through two batches" in text
    assert "roofline bound (not a forecast)" in text


def test_a_repeated_command_compiles_nothing(real, folder, monkeypatch):
    report, _ = real
    monkeypatch.setattr(fits, "find_peak", lambda *_: None)
    said = []
    periods = dict.fromkeys(("log.every", "train.eval_every", "checkpoint.every"), "2 steps")
    config = make_config(**{"train.steps_per_call": 2, **periods})
    again = fits.find_fit(config, CPU, cache=folder, devices=jax.devices()[:4], say=said.append)
    assert "single steps; a run also keeps all training images" in said[1]
    assert "3.7 MiB" in said[1]  # 60,000 images of 64 bytes
    assert not any("compiling" in line for line in said)
    assert again.compilations == report.compilations
    assert "peak not known" in fit_text.format_report(again)


def test_an_entry_is_of_one_program_target_and_compiler(real, folder, monkeypatch):
    """Another batch, target or compiler is compiled; a damaged entry too."""
    step, compiled = real[0].step, []

    def lowered(text):
        def compile(**_):
            compiled.append(text)
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM (9G)\nmore"
            )

        return types.SimpleNamespace(as_text=lambda: text, compile=compile)

    def trace(batch):
        low = lowered(f"program of {batch}")
        return types.SimpleNamespace(jaxpr=jax.make_jaxpr(lambda: 0)(), lower=lambda: low)

    monkeypatch.setattr(step, "trace", trace)

    def compile(batch=4, target=CPU, compiler="c 1", quick=False):
        return fit_step.compile_step(
            step, target, batch, compiler=compiler, cache=folder, quick=quick
        )

    first = compile()
    assert first.refusal == "RESOURCE_EXHAUSTED: Ran out of memory on HBM (9G)"
    assert compile() == first
    assert len(compiled) == 1
    compile(8)
    compile(target=CPU._replace(layout="5"))
    compile(compiler="c 2")
    assert len(compiled) == 4
    compile(quick=True)  # a CPU's compiler has no such option
    assert len(compiled) == 4
    monkeypatch.setitem(fit_step.QUICK_OPTIONS, "cpu", {"effort": -1.0})
    assert compile(quick=True).quick
    assert len(compiled) == 5
    for path in folder.glob("*.json"):
        path.write_text(path.read_text()[:50])
    compile()
    assert len(compiled) == 6


# ---- a made-up compiler


V5E = topologies.find_target("v5e-8")


class Compiler:
    """Memory of a device: `fixed` + `per_image` * images, and `bend` * images^2."""

    def __init__(self, fixed, per_image, bend=0.0, refuses=True):
        self.fixed, self.per_image, self.bend, self.refuses = fixed, per_image, bend, refuses
        self.compiled, self.quick = [], []

    def __call__(self, step, target, batch_size, *, say, quick=False, **_):
        images = batch_size // step.devices
        say(f"compiling {images}")
        self.compiled.append(images)
        self.quick += [images] if quick else []
        total = int(self.fixed + self.per_image * images + self.bend * images**2)
        zeros = dict(arguments=0, temporaries=0, traffic=1, collectives={}, seconds=1.0, flops=1)
        if self.refuses and total > target.memory:
            text = (
                f"RESOURCE_EXHAUSTED: total memory required ({total / GIB:.2f}G) exceeds available"
            )
            total, zeros["refusal"] = 0, text
        return fit_step.CompiledStep(batch_size, total=total, quick=quick, **zeros)


def search(monkeypatch, compiler, batch, *, unit=1, check=False, target=V5E):
    config = make_config()
    step = types.SimpleNamespace(
        **dict(devices=8, unit=unit, batch_size=batch, notes=[], config=config, per_state={}),
        measure_batch=lambda size: 0,
        trace=lambda batch: None,
    )
    monkeypatch.setattr(fits, "TargetStep", lambda *_: step)
    monkeypatch.setattr(fits, "compile_step", compiler)
    chip = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    path = pathlib.Path()
    return fits.find_fit(
        config, target, cache=path, devices=[chip], check=check, say=lambda text: None
    )


@pytest.mark.parametrize("unit", [1, 6])
@pytest.mark.parametrize("batch", [48, 8 * 102, 8 * 240, 8 * 6000])
@pytest.mark.parametrize("refuses", [True, False])
def test_a_line_is_found_from_two_batches(monkeypatch, unit, batch, refuses):
    """(15.75 GiB - 0.5 GiB) / 65 MiB = 240.2 images per device."""
    compiler = Compiler(0.5 * GIB, 65 * MIB, refuses=refuses)
    report = search(monkeypatch, compiler, batch, unit=unit)
    assert report.largest == 8 * 240
    assert report.fits == (batch <= 8 * 240)
    assert report.model.fixed == pytest.approx(0.5 * GIB, rel=1e-3)
    assert len(compiler.compiled) == (2 if batch <= 8 * 102 else 3)


@pytest.mark.parametrize(("batch", "quick"), [(48, [53]), (8 * 80, [160]), (8 * 6000, [86])])
def test_a_batch_far_from_the_configs_is_compiled_quickly(monkeypatch, batch, quick):
    """The numbers that are shown are those of a complete compilation."""
    compiler = Compiler(0.5 * GIB, 65 * MIB)
    report = search(monkeypatch, compiler, batch)
    assert compiler.quick == quick
    assert not report.compiled.quick
    assert report.largest == 8 * 240


def test_a_batch_that_does_not_fit_names_one_that_does(monkeypatch):
    report = search(monkeypatch, Compiler(0.5 * GIB, 65 * MIB), 8 * 300)
    with pytest.raises(UserError) as told:
        fit_text.raise_if_too_large(report)
    message = str(told.value)
    assert "data.batch_size=2400 does not fit on v5e-8" in message
    assert "batch 1920 fits" in message
    assert "\n" not in message
    fit_text.raise_if_too_large(search(monkeypatch, Compiler(0.5 * GIB, 65 * MIB), 8 * 240))


def test_nothing_fits(monkeypatch):
    report = search(monkeypatch, Compiler(16 * GIB, 1 * MIB), 64)
    assert report.largest == 0
    assert "the compiler refused: RESOURCE_EXHAUSTED" in fit_text.format_report(report)
    with pytest.raises(UserError, match="no batch fits"):
        fit_text.raise_if_too_large(report)


def test_a_single_batch_that_fits_is_named(monkeypatch):
    """One image per device fits and two do not, so there is no line."""
    compiler = Compiler(GIB, 10 * GIB)
    report = search(monkeypatch, compiler, 8 * 3)
    assert (report.model, report.largest, report.checked) == (None, 8, True)
    assert 2 in compiler.compiled
    with pytest.raises(UserError, match="; batch 8 fits; --remedies"):
        fit_text.raise_if_too_large(report)


def test_the_check_corrects_a_curve(monkeypatch):
    """Memory that bends: 65 MiB + 0.1 MiB * images. The line through small batches promises more
    than fits; the roots of the parabola give 185 images."""
    curve = Compiler(0.5 * GIB, 65 * MIB, bend=0.1 * MIB)
    root = (-65 + math.sqrt(65**2 + 4 * 0.1 * 15.25 * 1024)) / 0.2
    plain = search(monkeypatch, curve, 8 * 16)
    assert plain.largest // 8 > root
    assert not plain.checked
    for refuses in (True, False):
        curve = Compiler(0.5 * GIB, 65 * MIB, bend=0.1 * MIB, refuses=refuses)
        checked = search(monkeypatch, curve, 8 * 16, check=True)
        assert checked.checked
        assert 0.9 * root < checked.largest // 8 <= root
        assert checked.largest // 8 in curve.compiled


def test_a_compiler_that_recomputes_near_the_limit(monkeypatch):
    """A made-up compiler gets up to 150 % of the memory into 100 %. 240 images fit by the line; 300
    fit because they were compiled, and do not bend the line."""

    class Recomputes(Compiler):
        def __call__(self, step, target, batch_size, **kwargs):
            result = super().__call__(step, target, batch_size, **kwargs)
            memory = target.memory
            total = memory if memory < result.total < 1.5 * memory else result.total
            return result._replace(total=total)

    compiler = Recomputes(0.5 * GIB, 65 * MIB, refuses=False)
    report = search(monkeypatch, compiler, 8 * 300)
    assert report.model.per_image == pytest.approx(65 * MIB, rel=1e-3)
    assert report.fits
    assert report.largest == 8 * 300
    report = search(monkeypatch, compiler, 8 * 100)
    assert report.largest == 8 * 240


def test_the_check_of_a_compiler_that_recomputes_to_just_above_the_limit(monkeypatch):
    """As LeNet-5 on an H100: three batches in a row needed some MiB more than the memory."""

    class Recomputes(Compiler):
        def __call__(self, step, target, batch_size, **kwargs):
            result = super().__call__(step, target, batch_size, **kwargs)
            memory = target.memory
            total = memory + MIB if 0.97 * memory < result.total < 1.5 * memory else result.total
            return result._replace(total=total)

    compiler = Recomputes(0.5 * GIB, 65 * MIB, refuses=False)
    report = search(monkeypatch, compiler, 8 * 100, check=True)
    assert 225 <= report.largest // 8 < 0.97 * 240.2
    assert report.checked


def test_memory_that_does_not_grow(monkeypatch):
    report = search(monkeypatch, Compiler(GIB, 0), 64)
    assert report.largest is None
    assert "memory does not grow" in fit_text.describe_largest(report)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        # libtpu 0.0.42, two programs that did not fit.
        ("the total memory required for HLO temporaries (128.00G) exceeds available HBM", 128),
        ("XLA:TPU compile error. Used ... required 242.08G exceeds available HBM", 242.08),
        ("no number", None),
    ],
)  # fmt: skip
def test_what_a_refusal_needs(message, gib):
    assert fits.read_needed_memory(message) == (None if gib is None else gib * GIB)


def test_a_batch_that_does_not_divide_is_refused_as_in_a_run(folder):
    for changes, message in (
        ({"data.batch_size": 30}, "30 examples cannot be split evenly over 4 devices"),
        ({"train.accumulate": 16}, "8 examples per device cannot be split into 16 equal"),
        ({"data.batch_size": 36}, "each device needs an even number of images; got 9"),
        ({"optimizer.name": "adamm"}, "adamm"),
    ):
        with pytest.raises(UserError, match=message):
            fits.find_fit(make_config(**changes), CPU, cache=folder, devices=jax.devices()[:4])


# ---- remedies, the table, the command


def test_remedies_are_sorted_by_flops(real, folder, monkeypatch):
    report, _ = real

    def fake(step, target, batch_size, **_):
        config = step.config
        total = (50 if config.model.dtype == "bfloat16" else 100) // config.train.accumulate * MIB
        zeros = dict(arguments=0, temporaries=0, traffic=1, collectives={}, seconds=1.0)
        return fit_step.CompiledStep(batch_size, total=total, flops=10, **zeros)

    monkeypatch.setattr(fit_remedies, "compile_step", fake)
    monkeypatch.setattr(
        fit_remedies, "TargetStep", lambda config, devices, classes: check_step(config, report.step)
    )
    found = fit_remedies.try_remedies(report, cache=folder)
    commands = [one.command for one in found]
    assert commands == [
        *("--config.model.dtype=bfloat16", "--config.train.accumulate=2"),
        *("--config.model.scan=True", "--config.model.remat=True"),
    ]
    assert [one.fits for one in found] == [True, True, False, False]
    assert found[2].reason == "no field scan"
    text = fit_remedies.format_remedies(found, report)
    assert "not possible: no field scan" in text


def check_step(config, step):
    for name in ("scan", "remat"):
        if config.model.get(name):
            raise UserError(f"no field {name}")
    return types.SimpleNamespace(config=config, measure_batch=step.measure_batch)


def test_pieces_divide_the_images_of_a_device(real):
    report = real[0]._replace(model=fits.MemoryModel(10 * MIB, 40 * MIB), batch_size=4 * 24)
    # 10 + 40 * 24 / pieces <= 64 MiB: at least 17.8 pieces, but 24 divides by 8, not by 16.
    assert fit_remedies.find_pieces(report) == 8
    assert fit_remedies.find_pieces(report._replace(batch_size=4 * 32)) == 32
    assert fit_remedies.find_pieces(report._replace(batch_size=4 * 25)) is None


def test_the_table_keeps_other_rows_and_continues(real, tmp_path, monkeypatch):
    report, _ = real
    path, asked = tmp_path / "fits.csv", []

    def find(config, target, *, cache):
        asked.append(config.model.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return report._replace(target=target)

    monkeypatch.setattr(fit_table, "find_fit", find)
    names = ("digits_lenet5", "imagenet_resnet50:modern")
    with pytest.raises(KeyboardInterrupt):
        fit_table.write_table(str(path), V5E, names, cache=tmp_path)
    assert asked == ["lenet5", "resnet50"]
    rows = list(csv.DictReader(path.open()))
    assert [(row["recipe"], row["topology"]) for row in rows] == [("digits_lenet5", "v5e-8")]
    assert rows[0]["largest_batch"] == str(report.largest)
    fit_table.write_table(str(path), topologies.find_target("h100"), names, cache=tmp_path)
    fit_table.write_table(str(path), V5E, names, cache=tmp_path)
    rows = list(csv.DictReader(path.open()))
    assert [(row["recipe"], row["topology"]) for row in rows] == [
        (name, target) for target in ("h100", "v5e-8") for name in names
    ]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a table of this command"):
        fit_table.write_table(str(path), V5E, names, cache=tmp_path)


def test_the_default_recipes_exist():
    for name in fit_table.RECIPES:
        assert fit_table.load_recipe(name).data.batch_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --topology=NAME, one of v4-8"),
        (["--topology=v5e-8", "--table=x.csv", "--check"], "--check does not go with --table"),
    ],
)
def test_what_the_command_refuses(arguments, message):
    done = run_command(arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def run_command(arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.fits", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_folder_of_compilations(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert fit_step.find_default_folder() == pathlib.Path("/x/flax_cnns/fits")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert fit_step.find_default_folder() == pathlib.Path.home() / ".cache/flax_cnns/fits"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_a_real_tpu_compiler(tmp_path):
    """40 million images of LeNet-5 do not fit on eight v5e chips; the message names what does."""
    flags = ["--config=digits_lenet5", "--topology=v5e-8", f"--cache={tmp_path}"]
    done = run_command([*flags, "--config.data.name=mnist", "--config.data.batch_size=40000000"])
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data.batch_size=40000000 does not fit on v5e-8: the compiler says 'RESOURCE_EX" in line
    fitting = int(re.search(r"; batch (\d+) fits by estimate", line)[1])
    assert 100_000 < fitting < 40_000_000
    assert "roofline bound" in done.stdout
    assert f"largest batch: {fitting} (by the line" in done.stdout
