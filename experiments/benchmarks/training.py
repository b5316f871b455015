"""Times training and inference steps (`step`) and their compilation (`compile`)."""

from __future__ import annotations

import argparse
import contextlib
import time
import unittest.mock
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from experiments.benchmarks.flags import parse_dtype, parse_positive_int
from experiments.benchmarks.report import (
    Bars,
    BenchmarkReport,
    format_gigabytes,
    format_milliseconds,
    format_number,
    format_percent,
)
from flax_cnns import config
from flax_cnns import tree as pytree
from flax_cnns.analysis import device
from flax_cnns.analysis.cost import cost
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.data.augment import make_normalize
from flax_cnns.data.mix import make_mix
from flax_cnns.layers.conv import module as conv_module
from flax_cnns.models.registry import create_model, init_variables
from flax_cnns.train import evaluation_step, optimizers, parallel, schedules, steps
from flax_cnns.train.state import TrainState

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel in 0..1
RATE, MOMENTUM = 1e-3, 0.9
_DEFAULTS = config.make_defaults()
SGD = SimpleNamespace(**_DEFAULTS["optimizer"] | dict(name="sgd", momentum=MOMENTUM))
MIX = SimpleNamespace(**_DEFAULTS["mix"])  # off


def make_network(name: str, args: argparse.Namespace, **fields: Any) -> nn.Module:
    """Makes a registered network with the command's flags. Raises `UserError` if it is unknown."""
    fields["dtype"] = args.dtype
    if args.size:
        channels = create_model(name).input_size[-1]
        fields["input_size"] = (args.size, args.size, channels)
    return create_model(name, **fields)


def make_examples(batch: int, shape: tuple[int, ...], classes: int) -> dict[str, np.ndarray]:
    """Returns a batch of noise: {"image" u8 [N H W C], "label" i32 [N]}."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *shape), np.uint8)
    return {"image": images, "label": rng.integers(0, classes, batch).astype(np.int32)}


class Trainee:
    """A network with its state on all devices, and its steps, which compile when first called."""

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        *,
        mode: str = "shard_map",
        devices: list | None = None,
        trainable: pytree.Rules = (),
    ) -> None:
        self.model, self.mode = model, mode
        self.mesh = parallel.make_mesh(devices)
        parallel.check_batch(batch, self.mesh, what="--batch")
        shape, classes = model.input_size, model.num_classes
        began = time.perf_counter()
        variables = init_variables(model, jax.random.key(0), (1, *shape))
        jax.block_until_ready(variables)
        self.init_seconds = time.perf_counter() - began
        if getattr(model, "scan", False):
            variables = pytree.stack_blocks(variables)  # as a run does
        optimizer = optimizers.make_optimizer(
            SimpleNamespace(**vars(SGD) | {"trainable": trainable}),
            variables["params"],
            schedules.constant(RATE),
            batch_stats=variables.get("batch_stats"),
        )
        learns, _ = pytree.partition(variables["params"], optimizer.trainable)
        self.trainable_params = pytree.count(learns)
        state = TrainState.create(variables, optimizer.init(variables["params"]))
        self.state = parallel.replicate(state, self.mesh)
        self.key = parallel.replicate(jax.random.key(1), self.mesh)
        batch = make_examples(batch, shape, classes)
        self.batch = parallel.shard_batch(batch, self.mesh, mode)
        mask = np.ones(len(batch["label"]), np.float32)
        self.masked = parallel.shard_batch(batch | {"mask": mask}, self.mesh, mode)
        channels = shape[-1]
        normalize = make_normalize(
            SimpleNamespace(normalize=True), mean=MEAN[:channels], std=STD[:channels]
        )
        step = steps.make_train_step(
            model.apply,
            optimizer,
            augment=lambda images, keys: normalize(images),
            mix=make_mix(MIX, classes),
            aux_weights=[(".*", schedules.constant(0.3))],
        )
        self._step = parallel.parallelize(step, self.mesh, mode=mode)
        evaluation = evaluation_step.make_eval_step(
            model.apply, normalize=normalize, num_classes=classes
        )
        self._eval = parallel.parallelize(evaluation, self.mesh, mode=mode, donate=False)

    def trace(self) -> Any:
        """Traces the training step, not of pmap; the result has `jaxpr` and `lower()`."""
        return self._step.trace(self.state, self.batch, self.key)

    def compile(self) -> tuple[Any, float, float]:
        """Returns (the compiled training step, seconds to trace it, seconds to compile it)."""
        began = time.perf_counter()
        lowered = self._step.lower(self.state, self.batch, self.key)
        traced = time.perf_counter()
        compiled = lowered.compile()
        return compiled, traced - began, time.perf_counter() - traced

    def make_train_call(self, step: Callable | None = None) -> Callable[[], Any]:
        """Returns a function that takes a training step and returns the arrays to wait for."""
        step = step or self._step

        def train() -> Any:
            self.state, sums = step(self.state, self.batch, self.key)
            return self.state, sums

        return train

    def make_inference_call(self) -> Callable[[], Any]:
        """Returns a function that takes an evaluation step and returns the arrays to wait for."""
        variables = jax.tree.map(lambda x: x.copy(), self.state.variables)  # the state is donated
        return lambda: self._eval(variables, self.masked, None)


class Speed(NamedTuple):
    """The speed of a step over a batch."""

    seconds: float
    images_per_second: float
    mfu: float | None  # counted FLOP/s divided by the device's peak

    @classmethod
    def of(cls, seconds: float, batch: int, flops: int, peak: float | None) -> Speed:
        return cls(seconds, batch / seconds, None if peak is None else flops / seconds / peak)


# ---------------------------------------------------------------------------- step


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="resnet18", help="names of networks, separated by commas"
    )
    parser.add_argument(
        "--batch", type=parse_positive_int, default=32, help="images per step, over all devices"
    )
    parser.add_argument(
        "--size", type=int, default=0, help="image height and width; 0: the network's"
    )
    parser.add_argument("--dtype", type=parse_dtype, default="float32", help="float32 or bfloat16")
    parser.add_argument("--mode", default="shard_map", choices=("shard_map", "pmap"))
    parser.add_argument(
        "--scan", action="store_true", help="run repeated blocks of a stage by nn.scan"
    )
    parser.add_argument(
        "--remat", action="store_true", help="recompute blocks in the backward pass"
    )


def measure_steps(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times training and inference steps of each network, and their compilation without a cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    fields = {name: True for name in ("scan", "remat") if getattr(args, name)}
    models = {name: make_network(name, args, **fields) for name in args.model.split(",")}
    device0 = jax.devices()[0]
    best = device.find_peak(device0, args.dtype)
    # All of JAX's CPU devices share the cores.
    count = 1 if device0.platform == "cpu" else jax.device_count()
    total = best and best.flops * count
    if best is None:
        report.summary.append(
            f"no MFU: flax_cnns/analysis/device.py has no {args.dtype} peak for "
            f"{device0.device_kind!r}"
        )
    else:
        report.summary.append(
            f"MFU relative to {total / 1e12:.4g} TFLOP/s ({best.source}); a training step counts"
            " as three forward passes, a MAC as two FLOPs"
        )
    for name, model in models.items():
        report.print_line(f"{name}: compiling")
        row = measure_network(model, args, total)
        row = {"model": name, **row}
        train, infer = row["training"], row["inference"]
        report.add(
            row,
            (
                name,
                f"{args.batch} x {model.input_size[0]}",
                format_milliseconds(train["seconds"]),
                format_number(train["images_per_second"]),
                format_percent(train["mfu"]),
                format_milliseconds(infer["seconds"]),
                format_number(infer["images_per_second"]),
                format_percent(infer["mfu"]),
                format_gigabytes(row["peak_memory"] or row["program_memory"]),
                f"{row['init_seconds']:.1f} s",
                f"{row['trace_seconds']:.1f} + {row['compile_seconds']:.1f} s",
                f"{row['seconds_to_first_step']:.1f} s",
            ),
        )
        report.bars = Bars(
            [row["model"] for row in report.rows],
            {
                kind: [row[kind]["images_per_second"] for row in report.rows]
                for kind in ("training", "inference")
            },
            "images per second",
        )


STEP_COLUMNS = (
    *("model", "batch", "training", "images/s", "MFU", "inference", "images/s", "MFU"),
    *("memory", "init", "trace + compile", "first step after"),
)


def measure_network(
    model: nn.Module, args: argparse.Namespace, peak: float | None
) -> dict[str, Any]:
    """Times the steps of a network; returns its row of the report."""
    before = device.peak_memory(jax.devices()[0])
    began = time.perf_counter()
    trainee = Trainee(model, args.batch, mode=args.mode)
    compiled, trace_seconds, compile_seconds = trainee.compile()
    train = trainee.make_train_call(compiled)
    jax.block_until_ready(train())
    first = time.perf_counter() - began
    timing = dict(rounds=args.rounds, warmup=args.warmup, at_least=args.at_least)
    training_times = time_candidates({"training": train}, **timing)
    after = device.peak_memory(jax.devices()[0])
    inference_times = time_candidates({"inference": trainee.make_inference_call()}, **timing)
    counted = cost(model, (args.batch, *model.input_size))
    flops = 2 * counted.macs
    training = Speed.of(training_times.median("training"), args.batch, 3 * flops, peak)
    inference = Speed.of(inference_times.median("inference"), args.batch, flops, peak)
    return {
        "batch": args.batch,
        "input_size": list(model.input_size),
        "dtype": args.dtype,
        "mode": args.mode,
        "scan": args.scan,
        "remat": args.remat,
        "params": counted.params,
        "macs_per_image": counted.macs // args.batch,
        "peak_flops": peak,
        "training": training._asdict() | training_times.as_dict()["training"],
        "inference": inference._asdict() | inference_times.as_dict()["inference"],
        # The peak since the start of the process: this network's peak only if it is a new maximum.
        "peak_memory": after if after is not None and after > (before or 0) else None,
        "program_memory": device.program_memory(compiled),  # of the training step, per device
        "init_seconds": trainee.init_seconds,
        "trace_seconds": trace_seconds,
        "compile_seconds": compile_seconds,
        "seconds_to_first_step": first,
    }


# ---------------------------------------------------------------------------- compile

COMPILE_COLUMNS = ("model", "scan", "trace", "compile", "together", "init", "nn.Conv compiles in")


def add_compile_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="cifar_resnet110", help="names of networks, separated by commas"
    )
    parser.add_argument("--batch", type=parse_positive_int, default=32)
    parser.add_argument(
        "--size", type=int, default=0, help="image height and width; 0: the network's"
    )
    parser.add_argument("--dtype", type=parse_dtype, default="float32", help="float32 or bfloat16")
    parser.add_argument("--scan", default="both", choices=("both", "on", "off"))
    parser.add_argument(
        "--stock", action="store_true", help="also compile our network with nn.Conv's convolution"
    )


def replace_convolution() -> contextlib.AbstractContextManager[Any]:
    """In this context, a network that is traced has nn.Conv's convolution in place of ours."""
    library = jax.lax.conv_general_dilated
    return unittest.mock.patch.object(conv_module, "conv_general_dilated", library)


def measure_compilation(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Times tracing and compiling of the training step, without a compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    scans = {"both": (False, True), "on": (True,), "off": (False,)}[args.scan]
    names = args.model.split(",")
    for name in names:
        # Reports unknown names, and networks without scan, before anything is compiled.
        make_network(name, args, **({} if scans == (False,) else {"scan": True}))
    for name in names:
        for scan in scans:
            report.print_line(f"{name}, scan={scan}: compiling")
            jax.clear_caches()
            trainee = Trainee(
                make_network(name, args, **({"scan": True} if scan else {})), args.batch
            )
            _, traced, compiled = trainee.compile()
            seconds = (traced, compiled, traced + compiled, trainee.init_seconds)
            keys = ("trace_seconds", "compile_seconds", "seconds", "init_seconds")
            row = {"model": name, "scan": scan, "batch": args.batch, **dict(zip(keys, seconds))}
            stock = "-"
            if args.stock:
                report.print_line(f"{name}, scan={scan}, with nn.Conv: compiling")
                jax.clear_caches()
                with replace_convolution():
                    row["stock_compile_seconds"] = trainee.compile()[2]
                row["stock_ratio"] = compiled / row["stock_compile_seconds"]
                stock = f"{row['stock_compile_seconds']:.1f} s ({row['stock_ratio']:.2f})"
            cells = (name, "on" if scan else "off", *(f"{value:.1f} s" for value in seconds), stock)
            report.add(row, cells)
    labels = [f"{row['model']}{', scan' if row['scan'] else ''}" for row in report.rows]
    report.bars = Bars(
        labels,
        {"trace + compile": [row["seconds"] for row in report.rows]},
        "seconds to trace and compile the training step",
    )
