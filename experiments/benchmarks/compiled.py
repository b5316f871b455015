"""The compiled training step of ResNet-50 against plain Flax's, for a device that is not there."""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import plain_flax
from experiments.benchmarks.flags import parse_positive_int
from experiments.benchmarks.report import Bars, BenchmarkReport
from flax_cnns.analysis.hlo import list_kernels, read_traffic
from flax_cnns.runtime import topologies
from flax_cnns.train import parallel

COLUMNS = ("step", "temporaries", "of plain", "bytes moved", "of plain", "seconds to compile")
CLASSES = 1000


def add_compiled_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="h100", help="what to compile for, as in fits")
    parser.add_argument("--batch", type=parse_positive_int, default=256, help="global batch")
    parser.add_argument("--size", type=parse_positive_int, default=224, help="height and width")
    parser.add_argument(
        "--kernels", type=int, default=10, help="kernels to list, those that move the most bytes"
    )


def compare_compiled(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Compiles ResNet-50's training step in bfloat16, ours (configs/imagenet_resnet50.py, images
    augmented by the loader but for the flips) and that of Flax's ImageNet example, and compares the
    bytes of temporaries and the bytes that the kernels move, per device."""
    target = topologies.find_target(args.topology)
    devices = topologies.make_devices(target)
    plain = measure(trace_plain(devices, args.batch, args.size), target, report, "plain Flax")
    ours = measure(trace_ours(devices, args.batch, args.size), target, report, "flax_cnns")
    for row in (plain, ours):
        row |= {
            f"{name}_ratio": row[name] / max(1, plain[name]) for name in ("temporaries", "moved")
        }
        cells = (
            row["step"],
            f"{row['temporaries'] / 1e9:.3f} GB",
            f"{row['temporaries_ratio']:.3f}",
            f"{row['moved'] / 1e9:.3f} GB",
            f"{row['moved_ratio']:.3f}",
            f"{row['seconds']:.0f}",
        )
        report.add(row, cells)
        report.summary += [
            f"{row['step']}: {size / 1e9:.2f} GB by {kernel}, {source or 'no name'}"
            for kernel, size, source in row["kernels"][: args.kernels]
        ]
    names = ("temporaries", "moved")
    report.bars = Bars(
        ["temporaries", "bytes moved"],
        {row["step"]: [row[name] / 1e9 for name in names] for row in report.rows},
        f"GB per device, {args.topology}, batch {args.batch}",
    )


def trace_ours(devices: list[Any], batch: int, size: int) -> Any:
    """Traces the step of the recipe imagenet_resnet50 in bfloat16."""
    from flax_cnns import recipes
    from flax_cnns.runs.fit_step import TargetStep

    config = recipes.load(recipes.find("imagenet_resnet50")).get_config()
    config.model.dtype, config.data.image_size = "bfloat16", size
    config.data.batch_size = config.data.eval_batch_size = batch
    config.optimizer.nesterov = True
    return TargetStep(config, devices).trace(batch)


def trace_plain(devices: list[Any], batch: int, size: int) -> Any:
    """Traces the step of Flax's ImageNet example in bfloat16."""
    mesh, axis = parallel.make_mesh(devices), "batch"
    model = plain_flax.PlainResNet(num_classes=CLASSES, dtype=jnp.bfloat16)
    step = plain_flax.make_plain_step(model, axis_name=axis)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(), check_vma=False)
    shape = (batch, size, size, 3)
    state = jax.eval_shape(lambda key: plain_flax.make_plain_state(model, key, shape), KEY)

    def place(x: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    batches = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    state = jax.tree.map(lambda x: place(x, P()), state)
    batches = jax.tree.map(lambda x: place(x, P(axis)), batches)
    return jax.jit(mapped, donate_argnums=0).trace(state, batches)


KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)  # of the random numbers


def measure(
    traced: Any, target: topologies.CompileTarget, report: BenchmarkReport, name: str
) -> dict[str, Any]:
    """Compiles a step for `target`; returns its bytes per device."""
    report.print_line(f"{name}: compiling for {target.name}")
    began = time.perf_counter()
    compiled = topologies.compile_for(target, traced.lower())
    text = compiled.as_text()
    traffic = read_traffic(text)
    return {
        "step": name,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "moved": traffic.bytes,
        "collectives": {kind: each._asdict() for kind, each in traffic.collectives.items()},
        "kernels": [tuple(kernel) for kernel in list_kernels(text)],
        "seconds": time.perf_counter() - began,
    }
