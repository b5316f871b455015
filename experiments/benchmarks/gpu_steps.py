"""What `gpu` measures of whole training steps: speed, memory, families, determinism, a profile."""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import plain_flax, torch_side, training
from experiments.benchmarks.gpu_table import Measure
from experiments.benchmarks.training import Trainee
from flax_cnns.analysis import device
from flax_cnns.analysis.flops import count_flops
from flax_cnns.analysis.timing import Comparison, Spread, time_candidates
from flax_cnns.analysis.trace_summary import read_trace
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model
from flax_cnns.runs.profile import find_folder, make_profiler
from flax_cnns.train.profiler import StepWindow

DTYPE = "bfloat16"
SMOKE: dict[str, Any] = dict(depths=(1, 1), width=4)  # fields of ResNet-50 for --smoke


class Skipped(Exception):
    """Raised by a case that cannot be measured here; the message says why."""


class GpuSettings(NamedTuple):
    """What is measured: ResNet-50 with `batch` images of `size` pixels, and how often."""

    batch: int
    size: int
    rounds: int
    warmup: int
    at_least: float  # seconds per round
    smoke: bool

    def __str__(self) -> str:
        text = f"batch {self.batch}, size {self.size}, rounds {self.rounds}"
        return f"{text}, smoke" if self.smoke else text

    @property
    def timing(self) -> dict[str, Any]:
        """Arguments of `time_candidates`."""
        return dict(rounds=self.rounds, warmup=self.warmup, at_least=self.at_least)


def make_resnet(settings: GpuSettings, **fields: Any) -> Any:
    """Makes ResNet-50 in bfloat16; with --smoke, a tiny one."""
    if settings.smoke:
        fields |= SMOKE
    size = (settings.size, settings.size, 3)
    return create_model("resnet50", dtype=DTYPE, input_size=size, **fields)


def make_trainee(model: Any, batch: int) -> Trainee:
    """Makes a network with its training step on one device."""
    return Trainee(model, batch, devices=jax.devices()[:1])


def describe_step(name: str, times: Comparison, batch: int, flops: int) -> list[Measure]:
    """Returns time, images per second and MFU of a step that needs `flops` useful FLOPs."""
    spread = Spread.of(times.seconds[name])
    speeds = Spread.of([batch / seconds for seconds in times.seconds[name]])
    rows = [
        Measure(f"{name}: step", *scale(spread, 1e3, "ms")),
        Measure(f"{name}: speed", *scale(speeds, 1, "images/s")),
    ]
    peak = find_peak()
    if peak is None:
        kind = jax.devices()[0].device_kind
        return [*rows, Measure(f"{name}: MFU", "", note=f"no {DTYPE} peak of {kind!r} is known")]
    shares = Spread.of([flops / seconds / peak.flops for seconds in times.seconds[name]])
    note = f"of {peak.flops / 1e12:.4g} TFLOP/s: {peak.source}"
    return [*rows, Measure(f"{name}: MFU", *scale(shares, 100, "%"), note=note)]


@functools.cache  # on a CPU, it is measured
def find_peak() -> device.Peak | None:
    """Returns the peak FLOP/s of the device; None if it is not known."""
    return device.find_peak(jax.devices()[0], DTYPE)


def scale(spread: Spread, factor: float, unit: str = "") -> tuple[float, str, float, float]:
    """Returns (value, unit, low, high) of a `Measure`, with six digits."""
    median, low, high = (float(f"{factor * value:.6g}") for value in spread)
    return median, unit, low, high


def to_gib(size: int | None) -> float | str:
    """Returns bytes as GiB with five digits; "" if they are not known."""
    return "" if size is None else float(f"{size / 2**30:.5g}")


def count_step_flops(trainee: Trainee) -> int:
    """Returns the FLOPs of the convolutions and matrix products of a training step."""
    return count_flops(trainee.trace().jaxpr, jax.devices()[0].platform)


# ---------------------------------------------------------------------------- resnet50


def measure_against_plain_flax(settings: GpuSettings) -> list[Measure]:
    """Times our step and that of Flax's example, in turn."""
    model = make_resnet(settings)
    trainee = make_trainee(model, settings.batch)
    flops = count_step_flops(trainee)
    compiled, traced, seconds = trainee.compile()
    fields = SMOKE if settings.smoke else {}
    plain = plain_flax.PlainResNet(dtype=jnp.dtype(DTYPE), **fields)
    batch = jax.device_put(
        training.make_examples(settings.batch, model.input_size, model.num_classes)
    )
    state = jax.jit(
        partial(
            plain_flax.make_plain_state,
            plain,
            images_shape=batch["image"].shape,
            rate=training.RATE,
            momentum=training.MOMENTUM,
            nesterov=False,
        )
    )(jax.random.key(0))
    step = jax.jit(plain_flax.make_plain_step(plain, weight_decay=0.0), donate_argnums=0)

    def take_plain_step() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    candidates = {"ours": trainee.make_train_call(compiled), "plain flax": take_plain_step}
    times = time_candidates(candidates, **settings.timing)
    rows = [row for name in candidates for row in describe_step(name, times, settings.batch, flops)]
    rows.append(Measure("ours / plain flax", *scale(times.ratio("ours", "plain flax"), 1)))
    gflops = 1e-9 * flops / settings.batch
    rows.append(Measure("useful FLOPs of a step", round(gflops, 3), "GFLOP/image"))
    rows.append(Measure("ours: trace and compile", round(traced + seconds, 1), "s"))
    return rows


def measure_against_torch(settings: GpuSettings) -> list[Measure]:
    """Times our step and that of PyTorch: torch.compile, channels_last, autocast to bfloat16."""
    try:
        torch = torch_side.import_torch()
        torch_device = torch_side.find_torch_device(torch)
        models = torch_side.import_torchvision().models
    except UserError as error:
        raise Skipped(str(error)) from None
    model = make_resnet(settings)
    trainee = make_trainee(model, settings.batch)
    if settings.smoke:
        theirs = models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 32, 64])
    else:
        theirs = models.resnet50()
        count = sum(parameter.numel() for parameter in theirs.parameters())
        if count != trainee.trainable_params:
            ours = trainee.trainable_params
            raise UserError(f"{ours:,} parameters here, {count:,} in torchvision's resnet50")
    # With --smoke, another network, and no TorchInductor, which compiles C++ for a minute.
    backend = "eager" if settings.smoke else "inductor"
    batch = training.make_examples(settings.batch, model.input_size, model.num_classes)
    call = torch_side.make_torch_step(
        torch, torch.compile(theirs, backend=backend), batch, torch_device, DTYPE
    )
    name = f"torch.compile, {backend}"
    candidates = {"ours": trainee.make_train_call(), name: call}
    times = time_candidates(candidates, **settings.timing)
    flops = count_step_flops(trainee)
    rows = [row for each in candidates for row in describe_step(each, times, settings.batch, flops)]
    return [*rows, Measure(f"ours / {name}", *scale(times.ratio("ours", name), 1))]


# ---------------------------------------------------------------------------- memory


def measure_plan(settings: GpuSettings) -> list[Measure]:
    """Compares the memory of the step that is timed with the compiler's plan."""
    trainee = make_trainee(make_resnet(settings), settings.batch)
    compiled, _, _ = trainee.compile()
    return _compare_memory(compiled, trainee.make_train_call(compiled))


def measure_recipe(settings: GpuSettings) -> list[Measure]:
    """Compares the memory of a recipe's step with the bound of `fits`, which is computed for this
    device."""
    name, recipe = ("digits_lenet5", "") if settings.smoke else ("imagenet_resnet50", "modern")
    try:
        from flax_cnns.runs.fit_step import TargetStep

        config = importlib.import_module(f"configs.{name}").get_config(recipe)
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed, which a recipe needs") from None
    config.data.batch_size = settings.batch
    target = TargetStep(config, jax.devices()[:1], num_classes=10 if settings.smoke else 0)
    compiled = target.trace(settings.batch).lower().compile()

    def make(shapes: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)

    state, batch = make(target.state), make(target.make_batch(settings.batch))
    key = jax.device_put(jax.random.key(0), jax.tree.leaves(state)[0].sharding)

    def step() -> Any:
        nonlocal state
        state, sums = compiled(state, batch, key)
        return state, sums

    return _compare_memory(compiled, step)


def _compare_memory(compiled: Any, step: Callable[[], Any]) -> list[Measure]:
    one = jax.devices()[0]
    before, plan = device.peak_memory(one), device.program_memory(compiled)
    for _ in range(3):
        jax.block_until_ready(step())
    peak = device.peak_memory(one)
    rows = [Measure("bound: the compiler's plan", to_gib(plan), "GiB")]
    if peak is None or before is None:
        return [*rows, Measure("peak", "", "GiB", note=f"a {one.platform} does not report it")]
    # The search for the fastest kernels, while the step compiles, allocates memory too.
    rows.append(Measure("peak before the first step", to_gib(before), "GiB"))
    rows.append(Measure("peak", to_gib(peak), "GiB"))
    if plan:
        rows.append(Measure("peak / bound", round(peak / plan, 4)))
    return rows


# ---------------------------------------------------------------------------- families

# One network of each family, those that are used most first.
NETWORKS = (
    *("resnet18", "efficientnet_b0", "convnext_tiny", "vit_b_16", "mobilenet_v2", "vgg16_bn"),
    *("densenet121", "mobilenet_v3_large", "resnext50_32x4d", "wrn_28_10", "cifar_resnet110"),
    *("inception_v3", "seresnet50", "resnetv2_50", "alexnet", "googlenet", "squeezenet1_1"),
    *("xception", "mobilenet_v1_100", "pyramidnet_110_a48", "shakeshake_26_2x32d", "lenet5"),
    *("cifar_preact110", "inception_v4", "inception_resnet_v2", "nasnet_a_mobile"),
    *("pnasnet5large", "fractalnet_20", "nas_bench_201_resnet", "nas_v1", "rir_18", "nin_cifar10"),
    *("all_cnn_c", "dsn", "highway_19", "zfnet_fig3", "simpnet_5m", "sparsenet_40_24"),
    *("sparse_densenet_bc", "deck003_cifar100_example", "airbench94"),
)
SMOKE_NETWORKS: dict[str, dict[str, Any]] = {
    "lenet5": {},
    "cifar_resnet20": dict(depths=(1,), widths=(4,), input_size=(8, 8, 3)),
}


def measure_network(name: str, settings: GpuSettings) -> list[Measure]:
    """Times training and inference of a network in bfloat16; its loss must be finite."""
    fields = SMOKE_NETWORKS[name] if settings.smoke else {}
    model = create_model(name, dtype=DTYPE, **fields)
    pixels = model.input_size[0]
    batch = settings.batch if pixels < 64 else max(1, settings.batch // (2 if pixels < 290 else 8))
    trainee = make_trainee(model, batch)
    flops = count_step_flops(trainee)
    compiled, traced, seconds = trainee.compile()
    train = trainee.make_train_call(compiled)
    _, sums = jax.device_get(train())
    loss = float(sums["loss"] / sums["count"])
    if not math.isfinite(loss) or sums["bad"]:
        raise FloatingPointError(f"the first step is not finite: loss {loss}, bad {sums['bad']}")
    candidates = {"training": train, "inference": trainee.make_inference_call()}
    times = time_candidates(candidates, **settings.timing)
    rows = describe_step("training", times, batch, flops)
    speeds = Spread.of([batch / each for each in times.seconds["inference"]])
    plan = device.program_memory(compiled)
    return [
        *(row._replace(note=row.note or f"batch {batch}, {pixels} pixels") for row in rows),
        Measure("inference: speed", *scale(speeds, 1, "images/s")),
        Measure("loss of the first step", round(loss, 4)),
        Measure("the compiler's plan", to_gib(plan), "GiB"),
        Measure("trace and compile", round(traced + seconds, 1), "s"),
    ]


# ---------------------------------------------------------------------------- deterministic

STEPS = 5  # before the digest of the weights


def measure_digest(settings: GpuSettings) -> list[Measure]:
    """Digests the weights after some steps, then times the step. The flags are the process's."""
    trainee = make_trainee(make_resnet(settings), settings.batch)
    train = trainee.make_train_call()
    for _ in range(STEPS):
        train()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(trainee.state.params)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    times = time_candidates({"step": train}, **settings.timing)
    return [
        Measure("step", *scale(Spread.of(times.seconds["step"]), 1e3, "ms")),
        Measure(f"weights after {STEPS} steps", digest.hexdigest()[:16], "sha256"),
    ]


# ---------------------------------------------------------------------------- profile

SHOWN = 10  # kinds of operations in the table


def measure_profile(settings: GpuSettings, folder: Path) -> list[Measure]:
    """Profiles ten steps as `train --profile` does, into the folder `profile` of `folder`."""
    trainee = make_trainee(make_resnet(settings), settings.batch)
    train = trainee.make_train_call()
    shutil.rmtree(folder / "profile", ignore_errors=True)
    window = StepWindow(6, 15)
    profiler = make_profiler(
        window, folder, start=0, total_steps=window.last, say=partial(print, flush=True)
    )
    assert profiler is not None  # the folder is new
    for step in range(1, window.last + 1):
        if not profiler.covers(step):
            jax.block_until_ready(train())
            continue
        if step == window.first:
            profiler.start(None)
        profiler.begin_step(step)
        profiler.mark("input")  # the batch is on the device
        result = train()
        profiler.mark("dispatch")
        jax.block_until_ready(result)
        profiler.mark("compute")
        profiler.end_step()
    (trace,) = find_folder(folder, window).rglob("*.xplane.pb")
    summary = read_trace(trace)
    unit = 1e3 / (window.last - window.first + 1) / summary.devices
    rows = []
    for kind in summary.by_kind()[:SHOWN]:
        share = f"{kind.seconds / summary.seconds:.1%} of all operations"
        rows.append(Measure(kind.name, float(f"{kind.seconds * unit:.6g}"), "ms", note=share))
    return rows
